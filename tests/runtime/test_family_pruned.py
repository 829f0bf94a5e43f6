"""Families that differ in what was pruned from their U-Net or distilled into it, against diffusers' pipelines."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from family_oracle import OTHER, PROMPT, SIZE, image_of, sibling, square
from task_oracle import compare, diffusers_pipeline, record_diffusers, record_ours, watched

from latentrt.runtime import Pipeline

if TYPE_CHECKING:
    from families import Sources

PIPELINES = {
    "bk_sdm_tiny": "StableDiffusionPipeline",
    "sd_turbo": "StableDiffusionPipeline",
    "ssd_1b": "StableDiffusionXLPipeline",
    "koala": "StableDiffusionXLPipeline",
    "sdxl_lightning": "StableDiffusionXLPipeline",
    "lcm_sdxl": "StableDiffusionXLPipeline",
}
# Distilled without a change of the networks' form: the bundle that has the same ones, with another schedule.
SAME_NETWORKS = {"sd_turbo": "sd21", "sdxl_lightning": "sdxl_base"}
Opened = Callable[[str], tuple[Pipeline, Any]]


@pytest.fixture(scope="module")
def opened(
    family_sources: Callable[[str], Sources],
    family_bundle: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Opened:
    """Ours and diffusers', by family; one of each is kept."""

    def rescheduled(name: str, checkpoint: Path) -> Path:
        folder = tmp_path_factory.mktemp(name) / "bundle"
        shutil.copytree(family_bundle(SAME_NETWORKS[name]), folder)
        (folder / "manifest.json").unlink()
        shutil.copytree(checkpoint / "scheduler", folder / "scheduler", dirs_exist_ok=True)
        return folder

    @functools.cache
    def both(name: str) -> tuple[Pipeline, Any]:
        checkpoint = family_sources(name).path
        bundle = rescheduled(name, checkpoint) if name in SAME_NETWORKS else family_bundle(name)
        return Pipeline.load(bundle), diffusers_pipeline(checkpoint, PIPELINES[name])

    return both


@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("name", ["bk_sdm_tiny", "ssd_1b", "koala"])
def test_pruned_unets(name: str, guidance: float, opened: Opened) -> None:
    ours, theirs = opened(name)
    wanted = record_diffusers(
        theirs, prompt=PROMPT, negative_prompt=OTHER, num_inference_steps=4, guidance_scale=guidance, height=64,
        width=96, seed=3,
    )  # fmt: skip
    settings: dict[str, Any] = {"steps": 4, "guidance": guidance, "height": 64, "width": 96, "seed": 3}
    compare(record_ours(ours, PROMPT, negative_prompt=OTHER, **settings), wanted)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["sd_turbo", "sdxl_lightning"])
def test_few_steps_of_a_trailing_schedule(name: str, steps: int, guidance: float, opened: Opened) -> None:
    ours, theirs = opened(name)
    wanted = record_diffusers(theirs, prompt=PROMPT, num_inference_steps=steps, guidance_scale=guidance, seed=3, **SIZE)
    with watched(ours, "unet") as unet:
        found = record_ours(ours, PROMPT, steps=steps, guidance=guidance, seed=3)
    assert unet.rows == [2 if guidance > 1 else 1] * steps
    compare(found, wanted)


@pytest.mark.parametrize("guidance", [None, 1.0, 8.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_distilled_sdxl_is_told_the_scale(steps: int, guidance: float | None, opened: Opened) -> None:
    """Without a scale, that of SDXL's pipeline, which has no other one for distilled U-Nets."""
    ours, theirs = opened("lcm_sdxl")
    scale: dict[str, Any] = {} if guidance is None else {"guidance_scale": guidance}
    wanted = record_diffusers(theirs, prompt=PROMPT, num_inference_steps=steps, seed=3, **scale, **SIZE)
    with watched(ours, "unet") as unet:
        found = record_ours(ours, PROMPT, steps=steps, guidance=guidance, seed=3)
    assert unet.rows == [1] * steps
    compare(found, wanted)


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (5, 1.0)])
def test_a_distilled_sdxl_starts_from_an_image_as_any_sdxl(steps: int, strength: float, opened: Opened) -> None:
    """The last steps are taken: spreading all of them over a shorter range is the other LCM pipeline's."""
    ours, theirs = opened("lcm_sdxl")
    wanted = record_diffusers(
        sibling(theirs, "StableDiffusionXLImg2ImgPipeline"), prompt=PROMPT, image=image_of(square(64, 96)),
        strength=strength, num_inference_steps=steps, guidance_scale=8.0, seed=3,
    )  # fmt: skip
    found = record_ours(ours, PROMPT, image=square(64, 96), strength=strength, steps=steps, guidance=8.0, seed=3)
    compare(found, wanted)
