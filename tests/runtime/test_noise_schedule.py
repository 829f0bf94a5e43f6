"""noise_schedule and betas against diffusers' tables, and the options that are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from latentrt.runtime.errors import ConfigError
from latentrt.runtime.noise_schedule import NoiseSchedule

# diffusers hands NumPy 2 torch tensors in a way that torch does not take yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

STABLE_DIFFUSION_1_5 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


CLASSES = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)


@pytest.mark.parametrize(
    "config",
    [
        {},
        STABLE_DIFFUSION,
        {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 37, "beta_end": 0.3},
        {"trained_betas": [0.001, 0.01, 0.02, 0.3], "num_train_timesteps": 4},
    ],
)
def test_tables_equal_those_of_diffusers(config: dict[str, Any]) -> None:
    schedule = NoiseSchedule.from_config(config)
    theirs = diffusers.EulerDiscreteScheduler(**config)
    np.testing.assert_array_equal(schedule.alphas_cumprod.astype(np.float32), theirs.alphas_cumprod.numpy())
    # One float32 ulp: PyTorch's vectorised square root is not always rounded correctly.
    np.testing.assert_allclose(schedule.sigmas, theirs.sigmas.numpy()[:-1][::-1], rtol=1.5e-7)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_zero_terminal_snr(beta_schedule: str) -> None:
    config = {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": True}
    schedule = NoiseSchedule.from_config(config)
    theirs = diffusers.DDIMScheduler(**config)
    assert schedule.alphas_cumprod[-1] == 0
    # The square roots of the rescaling, each an ulp off at worst, compared near 0.
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=1e-6)
    sigmas = diffusers.EulerDiscreteScheduler(**config).sigmas.numpy()[:-1][::-1]
    np.testing.assert_allclose(schedule.sigmas, sigmas, rtol=1e-6)


def test_sigma_and_timestep_are_inverse() -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    timesteps = np.array([schedule.sigma_to_timestep(sigma) for sigma in schedule.sigmas])
    # sigma moves by 1e-3 a timestep or more, float32 rounds it to 6e-8: 1e-4 of a timestep.
    np.testing.assert_allclose(timesteps, np.arange(1000), atol=2e-4)


@pytest.mark.parametrize("sigma", [1e-12, 0.01, 0.0292, 0.4, 3.0, 14.6, 500.0])
def test_sigma_to_timestep_as_diffusers(sigma: float) -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    theirs = diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION)
    log_sigmas = np.log(np.array(((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod) ** 0.5))
    expected = float(theirs._sigma_to_t(np.float64(sigma), log_sigmas))
    assert schedule.sigma_to_timestep(sigma) == pytest.approx(expected, abs=2e-4)


def test_reads_the_config_of_stable_diffusion() -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION_1_5)
    assert schedule.num_train_timesteps == 1000
    assert schedule.steps_offset == 1
    assert schedule.prediction_type == "epsilon"
    assert schedule.timestep_spacing is None
    assert schedule.options["set_alpha_to_one"] is False
    assert schedule.options["skip_prk_steps"] is True


@pytest.mark.parametrize("class_name", [*CLASSES, "UniPCMultistepScheduler", "HeunDiscreteScheduler"])
def test_reads_what_diffusers_saves(class_name: str, tmp_path: Path) -> None:
    cls = getattr(diffusers, class_name)
    known = cls._get_init_keys(cls)
    options = {"clip_sample": False} if "clip_sample" in known else {}
    saved = cls(**STABLE_DIFFUSION, **options)
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    schedule = NoiseSchedule.from_config(config)
    np.testing.assert_array_equal(schedule.alphas_cumprod, saved.alphas_cumprod.numpy().astype(np.float64))
    assert schedule.prediction_type == saved.config.prediction_type


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timestep_spacing", "uniform"),
        ("beta_schedule", "laplace"),
        ("final_sigmas_type", "one"),
        ("steps_offset", -1),
        ("steps_offset", 0.5),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", "1000"),
        ("beta_start", math.nan),
        ("beta_end", 2),
        ("beta_end", "0.012"),
        ("trained_betas", [0.1, 0.2]),
        ("trained_betas", [math.nan] * 1000),
        ("trained_betas", ["a"]),
        ("an_option_of_tomorrow", 1),
    ],
)
def test_an_unsupported_option_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: expected "):
        NoiseSchedule.from_config({name: value})


def test_a_rectified_flow_predicts_its_velocity() -> None:
    assert NoiseSchedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"}).prediction_type == (
        "flow_prediction"
    )
    assert NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler"}).prediction_type == "epsilon"


def test_two_sigma_spacings_are_refused() -> None:
    with pytest.raises(ConfigError, match="use_exponential_sigmas"):
        NoiseSchedule.from_config({"use_karras_sigmas": True, "use_exponential_sigmas": True})
