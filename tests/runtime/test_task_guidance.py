"""Guidance of every kind, beside diffusers, beside its formula, and by the rows that the U-Net is called with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_oracle import compare, diffusers_pipeline, record_diffusers, record_ours, relative_l2, watched

from latentrt.runtime import Pipeline, UsageError
from latentrt.runtime.guidance import Guidance, compose, guide

PROMPT = "a small red circle on a blue background"
SMALL: dict[str, Any] = {"height": 64, "width": 64, "sampler": "Euler"}


@pytest.fixture(scope="module")
def reference(shapes_checkpoint: Path) -> Any:
    return diffusers_pipeline(shapes_checkpoint)


@pytest.fixture(scope="module")
def ours(shapes_bundle: Path) -> Pipeline:
    return Pipeline.load(shapes_bundle, precision="fp32")


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescale_is_that_of_diffusers(rescale: float, ours: Pipeline, reference: Any) -> None:
    wanted = record_diffusers(
        reference, "EulerDiscreteScheduler", prompt=[PROMPT, "a green star"], negative_prompt=["", "yellow"],
        num_inference_steps=4, guidance_scale=9.0, guidance_rescale=rescale, height=64, width=64, seed=[5, 6],
    )  # fmt: skip
    found = record_ours(
        ours, [PROMPT, "a green star"], negative_prompt=["", "yellow"], steps=4, guidance=9.0, guidance_rescale=rescale,
        seed=5, **SMALL,
    )  # fmt: skip
    compare(found, wanted)


def test_guidance_off_ends_guiding(ours: Pipeline) -> None:
    """At 1 and below, rescaling has nothing to rescale and negative prompts nothing to lead away from."""
    plain = ours(PROMPT, steps=3, guidance=1.0, seed=5, decode=False, **SMALL).latents
    other = ours(PROMPT, negative_prompt="red", steps=3, guidance=0.0, guidance_rescale=0.7, seed=5, **SMALL).latents
    np.testing.assert_array_equal(plain, other)


@pytest.mark.parametrize(
    ("interval", "steps", "rows"),
    [
        ((0.0, 1.0), 4, [2, 2, 2, 2]),
        ((0.25, 0.75), 4, [1, 2, 2, 1]),
        ((0.0, 0.5), 5, [2, 2, 2, 1, 1]),
        ((0.5, 1.0), 3, [1, 1, 2]),
        ((0.3, 0.3), 4, [1, 1, 1, 1]),
    ],
)
def test_interval_costs_rows_only_inside(
    interval: tuple[float, float], steps: int, rows: list[int], ours: Pipeline
) -> None:
    with watched(ours, "unet") as unet:
        ours(PROMPT, steps=steps, guidance=5.0, guidance_interval=interval, decode=False, **SMALL)
    assert unet.rows == rows


def test_interval_is_guidance_off_outside(ours: Pipeline) -> None:
    """Its steps are those of a guided run as long as it lasts, then those of an unguided one."""
    half = record_ours(ours, PROMPT, steps=4, guidance=5.0, guidance_interval=(0.0, 0.5), seed=2, **SMALL)
    whole = record_ours(ours, PROMPT, steps=4, guidance=5.0, seed=2, **SMALL)
    for step in range(2):
        np.testing.assert_array_equal(half.latents[step], whole.latents[step])
    assert relative_l2(half.latents[2], whole.latents[2]) > 1e-3
    never = record_ours(ours, PROMPT, steps=4, guidance=5.0, guidance_interval=(0.5, 0.5), seed=2, **SMALL)
    off = record_ours(ours, PROMPT, steps=4, guidance=1.0, seed=2, **SMALL)
    np.testing.assert_array_equal(never.latents[-1], off.latents[-1])


@pytest.mark.parametrize("curve", ["linear", "cosine"])
def test_a_scale_that_changes(curve: str, ours: Pipeline, reference: Any) -> None:
    """diffusers' guidance_scale set anew before each step, by the curve's formula."""
    steps, first, last = 5, 8.0, 2.0
    shares = [step / (steps - 1) for step in range(steps)]
    weights = shares if curve == "linear" else [(1 - math.cos(math.pi * share)) / 2 for share in shares]
    scales = [first + (last - first) * weight for weight in weights]

    calls = 0
    unet = reference.unet
    original = unet.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        reference._guidance_scale = scales[calls]
        calls += 1
        return original(*args, **kwargs)

    unet.forward = forward
    try:
        wanted = record_diffusers(
            reference, "EulerDiscreteScheduler", prompt=PROMPT, num_inference_steps=steps, guidance_scale=first,
            height=64, width=64, seed=5,
        )  # fmt: skip
    finally:
        del unet.forward
    assert calls == steps
    found = record_ours(
        ours, PROMPT, steps=steps, guidance=first, guidance_end=last, guidance_curve=curve, seed=5, **SMALL
    )
    compare(found, wanted)


def test_a_scale_that_falls_to_1_saves_rows(ours: Pipeline) -> None:
    with watched(ours, "unet") as unet:
        ours(PROMPT, steps=4, guidance=4.0, guidance_end=1.0, decode=False, **SMALL)
    assert unet.rows == [2, 2, 2, 1]


def test_the_curve_of_a_single_step_is_its_beginning() -> None:
    assert Guidance(scale=5.0, end=1.0).at(0, 1) == 5.0


def test_composition_is_its_formula() -> None:
    """Liu et al. 2022, equation 11: negative + scale * sum of weight * (part - negative), image by image."""
    rng = np.random.default_rng(0)
    negative, parts = (rng.standard_normal((n, 4, 3, 3)).astype(np.float32) for n in (2, 5))
    owner, weights = np.array([0, 0, 1, 1, 1]), np.array([1.0, -0.5, 0.2, 0.9, 1.5], np.float32)
    found = guide(negative, parts, owner, weights, 6.0)
    for image in range(2):
        total = sum(w * (parts[i] - negative[image]) for i, w in enumerate(weights) if owner[i] == image)
        np.testing.assert_allclose(found[image], negative[image] + 6.0 * total, rtol=2e-5, atol=2e-5)


def test_a_single_weighted_prompt_scales_guidance() -> None:
    """As in the web UI, where a prompt that ends in ":0.5" is a composition of one part."""
    rng = np.random.default_rng(0)
    negative, part = (rng.standard_normal((1, 4, 3, 3)).astype(np.float32) for _ in range(2))
    found = guide(negative, part, np.array([0]), np.array([0.5], np.float32), 6.0)
    np.testing.assert_allclose(found, negative + 3.0 * (part - negative), rtol=1e-5, atol=1e-6)


def test_composition_without_guidance_is_the_weighted_mean() -> None:
    parts = np.stack([np.full((4, 2, 2), value, np.float32) for value in (1.0, 4.0, 7.0)])
    found = compose(parts, np.array([0, 0, 1]), np.array([1.0, 2.0, 3.0], np.float32), 2)
    np.testing.assert_allclose(found[0], 3.0)
    np.testing.assert_allclose(found[1], 7.0)


def test_composition_through_the_pipeline(ours: Pipeline, reference: Any) -> None:
    """One step by hand, with diffusers' U-Net and text encoder: three rows in one call."""
    import torch

    texts = ("", "a red circle", "a blue background")
    with watched(ours, "unet") as unet:
        found = record_ours(
            ours, "a red circle AND a blue background :0.7", steps=1, guidance=5.0, seed=5, decode=False, **SMALL
        )
    assert unet.rows == [3]
    with torch.no_grad():
        embeds = torch.cat([reference.encode_prompt(text, "cpu", 1, False)[0] for text in texts])
        sample, timestep = (torch.from_numpy(unet.feeds[0][name]) for name in ("sample", "timestep"))
        output = reference.unet(sample, timestep[0], encoder_hidden_states=embeds).sample.numpy()
    negative, first, second = output
    epsilon = negative + 5.0 * ((first - negative) + 0.7 * (second - negative))
    scale = 1 / math.sqrt(float(sigma_of(ours)) ** 2 + 1)
    latents = unet.feeds[0]["sample"][0].astype(np.float64) / scale - sigma_of(ours) * epsilon
    assert relative_l2(found.latents[0][0], latents) <= 1e-4


def sigma_of(pipe: Pipeline) -> float:
    """The noise level of a run's only step."""
    levels: list[float] = []
    pipe(PROMPT, steps=1, guidance=1.0, decode=False, on_step=lambda step: levels.append(step.sigma), **SMALL)
    return levels[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval: expected two rising shares"),
        ({"guidance_interval": (0.0, float("nan"))}, "guidance_interval"),
        ({"guidance_curve": "steep"}, "guidance_curve: expected linear or cosine"),
        ({"guidance_rescale": 1.5}, "guidance_rescale: expected a number from 0 to 1"),
        ({"guidance_rescale": float("nan")}, "guidance_rescale"),
    ],
)
def test_what_is_out_of_range_is_refused(settings: dict[str, Any], message: str, ours: Pipeline) -> None:
    with pytest.raises(UsageError, match=message):
        ours(PROMPT, steps=1, **settings)
