"""SDXL's refiner alone and after the base, beside diffusers' pipelines on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from family_oracle import OTHER, PROMPT, image_of, square
from task_oracle import Floats, Recorded, compare, diffusers_pipeline, record_diffusers, record_ours, relative_l2

from latentrt.runtime import Pipeline, UsageError, base_and_refiner

if TYPE_CHECKING:
    from families import Sources

SIZE: dict[str, Any] = {"height": 64, "width": 96}
SETTINGS: dict[str, Any] = {"negative_prompt": OTHER, "guidance": 5.0, "seed": 3, **SIZE}
ARGUMENTS: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": OTHER, "guidance_scale": 5.0}
SCHEDULERS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "Euler": (None, {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
}


@pytest.fixture(scope="module")
def base(family_sources: Callable[[str], Sources]) -> Any:
    return diffusers_pipeline(family_sources("sdxl_base").path, "StableDiffusionXLPipeline")


@pytest.fixture(scope="module")
def refiner(family_sources: Callable[[str], Sources]) -> Any:
    return diffusers_pipeline(family_sources("sdxl_refiner").path, "StableDiffusionXLImg2ImgPipeline")


@pytest.fixture(scope="module")
def our_base(family_bundle: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(family_bundle("sdxl_base"))


@pytest.fixture(scope="module")
def our_refiner(family_bundle: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(family_bundle("sdxl_refiner"))


def in_two_parts(
    base: Any, refiner: Any, sampler: str, steps: int, switch: float, **arguments: Any
) -> tuple[Recorded, Recorded]:
    """diffusers' recipe: the base down to a share of the noise levels, its latents handed to the refiner."""
    scheduler, options = SCHEDULERS[sampler]
    common = {**ARGUMENTS, "num_inference_steps": steps, "seed": 3, **arguments}
    first = record_diffusers(base, scheduler, options, denoising_end=switch, **SIZE, **common)
    noisy = torch.from_numpy(first.latents[-1])
    return first, record_diffusers(refiner, scheduler, options, denoising_start=switch, image=noisy, **common)


@pytest.mark.parametrize(("steps", "switch"), [(5, 0.8), (6, 0.5), (4, 0.3), (5, 0.399)])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_base_and_refiner(
    sampler: str, steps: int, switch: float, base: Any, refiner: Any, our_base: Pipeline, our_refiner: Pipeline
) -> None:
    """0.399 of 1000 timesteps leaves 601, which is a step: the base's."""
    first, second = in_two_parts(base, refiner, sampler, steps, switch)
    latents: list[Floats] = []
    found = base_and_refiner(
        our_base, our_refiner, PROMPT, switch=switch, sampler=sampler, steps=steps,
        on_step=lambda step: latents.append(np.asarray(step.latents, np.float32)), **SETTINGS,
    )  # fmt: skip
    assert len(first.latents) >= 1
    assert len(second.latents) >= 1
    compare(Recorded(latents, found.images), Recorded([*first.latents, *second.latents], second.pictures))


def test_two_pictures_with_a_crop(base: Any, refiner: Any, our_base: Pipeline, our_refiner: Pipeline) -> None:
    """diffusers' recipe makes new generators for the refiner, which then draws the base's first numbers again."""
    _, second = in_two_parts(
        base, refiner, "Euler a", 5, 0.6, num_images_per_prompt=2, seed=[3, 4], crops_coords_top_left=(8, 16)
    )
    found = base_and_refiner(
        our_base, our_refiner, PROMPT, switch=0.6, sampler="Euler a", steps=5, batch=2, crop=(8, 16), **SETTINGS
    )
    assert relative_l2(found.latents, second.latents[-1]) <= 1e-4


def test_the_base_says_which_sampler(family_bundle: Callable[[str], Path], our_refiner: Pipeline) -> None:
    """Turbo's own is another than the refiner's."""
    turbo = Pipeline.load(family_bundle("sdxl_turbo"))
    settings: dict[str, Any] = {"schedule": "trailing", "steps": 4, "switch": 0.5, "seed": 3, "decode": False}
    default = base_and_refiner(turbo, our_refiner, PROMPT, **settings).latents
    same = base_and_refiner(turbo, our_refiner, PROMPT, sampler="Euler a", **settings).latents
    other = base_and_refiner(turbo, our_refiner, PROMPT, sampler="Euler", **settings).latents
    np.testing.assert_array_equal(default, same)
    assert relative_l2(other, same) > 1e-2


def test_heun_divides_between_two_whole_steps(
    base: Any, refiner: Any, our_base: Pipeline, our_refiner: Pipeline
) -> None:
    """A step of Heun is two calls. diffusers' base stops between them, and its refiner then repeats the step's first.

    Ours goes on where it stopped, at a noise level that both know. The reference is a whole run of each model: the
    base's up to the last step above the share, and the refiner's from there, started at a share one step lower.
    """
    steps, switch = 6, 0.5
    common = {**ARGUMENTS, "num_inference_steps": steps, "seed": 3}
    whole = record_diffusers(base, "HeunDiscreteScheduler", **SIZE, **common)
    found = our_base(PROMPT, sampler="Heun", steps=steps, denoising_end=switch, **SETTINGS)
    # Timesteps of the plan: 831, 665, 499, … with leading spacing, of which 500 and above are the base's.
    done = 2
    assert relative_l2(found.latents, whole.latents[done - 1]) <= 1e-4
    rest = record_diffusers(
        refiner,
        "HeunDiscreteScheduler",
        image=torch.from_numpy(whole.latents[done - 1]),
        denoising_start=0.65,
        **common,
    )
    both = base_and_refiner(our_base, our_refiner, PROMPT, switch=switch, sampler="Heun", steps=steps, **SETTINGS)
    assert len(rest.latents) == steps - done
    assert relative_l2(both.latents, rest.latents[-1]) <= 1e-4


SCORES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "scores": ({"aesthetic_score": 7.5, "negative_aesthetic_score": 1.0},) * 2,
    "sizes": (
        {"original_size": (80, 72), "crop": (4, 12)},
        {"original_size": (80, 72), "crops_coords_top_left": (4, 12)},
    ),
    "negative sizes": (
        {"negative_original_size": (16, 24), "negative_crop": (30, 2)},
        {"negative_original_size": (16, 24), "negative_crops_coords_top_left": (30, 2)},
    ),
    "no negative": ({"negative_prompt": None}, {"negative_prompt": None}),
    "unguided": ({"guidance": 1.0}, {"guidance_scale": 1.0}),
    "clip skip": ({"clip_skip": 1}, {"clip_skip": 1}),
}


@pytest.mark.parametrize("name", SCORES)
def test_image_to_image(name: str, refiner: Any, our_refiner: Pipeline) -> None:
    """The refiner has a negative prompt that was not given encoded as empty text."""
    settings, arguments = SCORES[name]
    wanted = record_diffusers(
        refiner, image=image_of(square(64, 96)), strength=0.5, num_inference_steps=6, seed=3,
        **{**ARGUMENTS, **arguments},
    )  # fmt: skip
    found = record_ours(our_refiner, PROMPT, image=square(64, 96), strength=0.5, steps=6, **{**SETTINGS, **settings})
    compare(found, wanted)


def test_those_matter(our_refiner: Pipeline) -> None:
    """Each of those cases draws something else."""
    latents = [
        our_refiner(
            PROMPT, image=square(64, 96), strength=0.5, steps=6, decode=False, **{**SETTINGS, **settings}
        ).latents
        for settings, _ in SCORES.values()
    ]
    for index, one in enumerate(latents):
        assert all(relative_l2(other, one) > 1e-4 for other in latents[index + 1 :])


def test_a_share_without_a_step(our_base: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"denoising_end: expected a share of the noise levels with a step in it"):
        our_base(PROMPT, steps=2, denoising_end=0.01)


def test_scores_of_a_pair_reach_the_refiner(our_base: Pipeline, our_refiner: Pipeline) -> None:
    """The base has no such input, and refuses them when it draws alone."""
    settings: dict[str, Any] = {"switch": 0.5, "steps": 4, **SETTINGS}
    usual, same = (base_and_refiner(our_base, our_refiner, PROMPT, **settings).latents for _ in range(2))
    scored = base_and_refiner(our_base, our_refiner, PROMPT, aesthetic_score=1.0, **settings).latents
    np.testing.assert_array_equal(same, usual)
    assert relative_l2(scored, usual) > 2e-5
    with pytest.raises(UsageError, match=r"^aesthetic_score: expected 6\.0 but for the SDXL refiner"):
        our_base(PROMPT, aesthetic_score=1.0, **SETTINGS)
