"""Dynamic thresholding and clipping against diffusers, whole arrays."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from sampler_oracle import STABLE_DIFFUSION, check_parity

from latentrt.runtime.sampler_names import SAMPLERS
from latentrt.runtime.sampler_spec import correction_of
from latentrt.runtime.thresholding import dynamic_threshold


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("sample_max_value", [0.7, 1.0, 1.5, 10.0])
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (1, 4, 5, 7), (2, 1, 1, 1)])
def test_dynamic_thresholding(ratio: float, sample_max_value: float, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    # Rows of very different size: each has its own percentile, below, between and above its bounds.
    rows = np.array([0.3, 1.0, 6.0])[: shape[0]].reshape(-1, 1, 1, 1)
    denoised = np.asarray(rows * rng.standard_normal(shape), np.float32)
    scheduler = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=sample_max_value
    )
    untouched = denoised.copy()
    ours = dynamic_threshold(denoised, ratio=ratio, sample_max_value=sample_max_value)
    theirs = scheduler._threshold_sample(torch.from_numpy(denoised)).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(denoised, untouched)


def test_a_row_does_not_depend_on_its_batch() -> None:
    batch = np.asarray(3 * np.random.default_rng(2).standard_normal((4, 4, 8, 8)), np.float32)
    together = dynamic_threshold(batch, ratio=0.95, sample_max_value=2.0)
    for i in range(4):
        alone = dynamic_threshold(batch[i : i + 1], ratio=0.95, sample_max_value=2.0)
        np.testing.assert_array_equal(alone, together[i : i + 1])


def test_what_the_options_ask_for() -> None:
    denoised = np.linspace(-3, 3, 16, dtype=np.float32).reshape(1, 1, 4, 4)
    thresholding = {"thresholding": True, "dynamic_thresholding_ratio": 0.5, "sample_max_value": 2.0}
    clipping = {"clip_sample": True, "clip_sample_range": 1.5}
    assert correction_of({"thresholding": False, "clip_sample": False}) is None
    clip, both = correction_of(clipping), correction_of({**thresholding, **clipping})
    assert clip is not None
    assert both is not None
    np.testing.assert_array_equal(clip(denoised), denoised.clip(-1.5, 1.5))
    # As in diffusers, thresholding comes first and alone.
    expected = dynamic_threshold(denoised, ratio=0.5, sample_max_value=2.0)
    np.testing.assert_array_equal(both(denoised), expected)


def _with(option: str) -> list[Any]:
    """Samplers whose diffusers class has the option, and uses it."""
    known = []
    for spec in SAMPLERS:
        if spec.scheduler and option in spec.options:
            assert option in inspect.signature(getattr(diffusers, spec.scheduler).__init__).parameters
            known.append(spec)
    return known


@pytest.mark.filterwarnings("ignore:`algorithm_types dpmsolver", "ignore:__array_wrap__ must accept context")
@pytest.mark.parametrize("spec", _with("thresholding"), ids=lambda spec: spec.name)
def test_every_sampler_that_thresholds(spec: Any) -> None:
    config = {**STABLE_DIFFUSION, **spec.preset, "thresholding": True, "sample_max_value": 1.5}
    config |= {"dynamic_thresholding_ratio": 0.9, "timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}
    check_parity(spec.name, config, 10)
    with pytest.raises(AssertionError):
        check_parity(spec.name, config, 10, options={"thresholding": False})


@pytest.mark.parametrize("spec", _with("clip_sample"), ids=lambda spec: spec.name)
def test_every_sampler_that_clips(spec: Any) -> None:
    config = {**STABLE_DIFFUSION, **spec.preset, "clip_sample": True, "clip_sample_range": 1.1}
    config["timestep_spacing"] = "leading"
    check_parity(spec.name, config, 10)
    with pytest.raises(AssertionError):
        check_parity(spec.name, config, 10, options={"clip_sample": False})
