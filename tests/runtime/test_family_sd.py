"""Families on Stable Diffusion 1 and 2's networks: v-prediction, inpainting with 9 channels, editing with 8."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from family_oracle import OTHER, PROMPT, SIZE, image_of, rectangle, sibling, square
from task_oracle import compare, diffusers_pipeline, record_diffusers, record_ours, relative_l2, watched

from latentrt.runtime import Pipeline, UsageError

if TYPE_CHECKING:
    from families import Sources

# Our settings, the diffusers class, and its options beside the checkpoint's config.
Case = tuple[dict[str, Any], str | None, dict[str, Any]]
SAMPLERS: dict[str, Case] = {
    "the checkpoint's": ({}, None, {}),
    "PLMS": ({"sampler": "PLMS"}, "PNDMScheduler", {}),
    "Euler": ({"sampler": "Euler"}, "EulerDiscreteScheduler", {}),
    "Euler a": ({"sampler": "Euler a"}, "EulerAncestralDiscreteScheduler", {}),
    "Heun": ({"sampler": "Heun"}, "HeunDiscreteScheduler", {}),
    "DPM++ 2M Karras": ({"sampler": "DPM++ 2M Karras"}, "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC": ({"sampler": "UniPC"}, "UniPCMultistepScheduler", {}),
    "DPM++ SDE": ({"sampler": "DPM++ SDE"}, "DPMSolverSDEScheduler", {"noise_sampler_seed": 3}),
}


@pytest.fixture(scope="module")
def sd21(family_sources: Callable[[str], Sources]) -> Any:
    return diffusers_pipeline(family_sources("sd21").path)


@pytest.fixture(scope="module")
def our_sd21(family_bundle: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(family_bundle("sd21"))


@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_v_prediction(name: str, guidance: float, our_sd21: Pipeline, sd21: Any) -> None:
    settings, scheduler, options = SAMPLERS[name]
    wanted = record_diffusers(
        sd21, scheduler, options, prompt=PROMPT, negative_prompt=OTHER, num_inference_steps=5,
        guidance_scale=guidance, seed=3, **SIZE,
    )  # fmt: skip
    found = record_ours(our_sd21, PROMPT, negative_prompt=OTHER, steps=5, guidance=guidance, seed=3, **settings)
    compare(found, wanted)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "DPM++ SDE"])
def test_v_prediction_from_an_image(name: str, our_sd21: Pipeline, sd21: Any) -> None:
    settings, scheduler, options = SAMPLERS[name]
    wanted = record_diffusers(
        sibling(sd21, "StableDiffusionImg2ImgPipeline"), scheduler, options, prompt=PROMPT,
        image=image_of(square(64, 96)), strength=0.7, num_inference_steps=6, guidance_scale=6.0, seed=3,
    )  # fmt: skip
    found = record_ours(our_sd21, PROMPT, image=square(64, 96), strength=0.7, steps=6, guidance=6.0, seed=3, **settings)
    compare(found, wanted)


def with_schedule(bundle: Path, folder: Path, **config: Any) -> Pipeline:
    """A bundle's networks with another schedule; without manifest, as optimum writes bundles."""
    shutil.copytree(bundle, folder)
    (folder / "manifest.json").unlink()
    path = folder / "scheduler" / "scheduler_config.json"
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name not in config}
    path.write_text(json.dumps({**kept, **{name: value for name, value in config.items() if value is not None}}))
    return Pipeline.load(folder)


OLD: dict[str, dict[str, Any]] = {
    "lacking": {"steps_offset": None, "clip_sample": None},
    "old": {"steps_offset": 0, "clip_sample": True},
}


@pytest.mark.parametrize("sampler", [None, "DDPM", "PLMS"])
@pytest.mark.parametrize("name", OLD)
def test_old_schedules_are_corrected(
    name: str,
    sampler: str | None,
    family_sources: Callable[[str], Sources],
    family_bundle: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """diffusers' pipelines of Stable Diffusion 1 and 2 raise steps_offset to 1 and switch clipping off.

    That lasts for another class made from the config if the config holds the values, else it has its own defaults; of
    these, clipping is not followed.
    """
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(family_sources("sd21").path, checkpoint)
    ours = with_schedule(family_bundle("sd21"), tmp_path / "bundle", **OLD[name])
    shutil.copy(tmp_path / "bundle" / "scheduler" / "scheduler_config.json", checkpoint / "scheduler")
    with pytest.warns(FutureWarning, match=r"clip_sample|steps_offset"):
        theirs = diffusers_pipeline(checkpoint)
    scheduler = {None: None, "DDPM": "DDPMScheduler", "PLMS": "PNDMScheduler"}[sampler]
    wanted = record_diffusers(
        theirs, scheduler, {"clip_sample": False} if sampler == "DDPM" else {}, prompt=PROMPT, num_inference_steps=4,
        guidance_scale=6.0, seed=3, **SIZE,
    )  # fmt: skip
    compare(record_ours(ours, PROMPT, sampler=sampler, steps=4, guidance=6.0, seed=3), wanted)


ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def our_zero_snr(family_bundle: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return with_schedule(family_bundle("sd21"), tmp_path_factory.mktemp("zero-snr") / "bundle", **ZERO_SNR)


@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", ["the checkpoint's", "Euler", "Euler a"])
def test_zero_terminal_snr(name: str, steps: int, guidance: float, our_zero_snr: Pipeline, sd21: Any) -> None:
    """From pure noise, with trailing spacing and the guidance rescaled: Lin et al. 2023."""
    settings, scheduler, options = SAMPLERS[name]
    wanted = record_diffusers(
        sd21, scheduler or "DDIMScheduler", {**options, **ZERO_SNR}, prompt=PROMPT, num_inference_steps=steps,
        guidance_scale=guidance, guidance_rescale=0.7, seed=3, **SIZE,
    )  # fmt: skip
    found = record_ours(our_zero_snr, PROMPT, steps=steps, guidance=guidance, guidance_rescale=0.7, seed=3, **settings)
    # One step of Euler from noise level 4096 down to 0 costs diffusers, in float32, all but four digits.
    compare(found, wanted, bound=3e-4 if steps == 1 else 1e-4)


@pytest.fixture(scope="module")
def inpaint(family_sources: Callable[[str], Sources]) -> Any:
    return diffusers_pipeline(family_sources("sd15_inpaint").path, "StableDiffusionInpaintPipeline")


@pytest.fixture(scope="module")
def our_inpaint(family_bundle: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(family_bundle("sd15_inpaint"))


@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize(("steps", "strength"), [(4, 1.0), (7, 0.6)])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("DPM++ SDE", "UniPC")])
def test_inpainting(
    name: str, steps: int, strength: float, guidance: float, our_inpaint: Pipeline, inpaint: Any
) -> None:
    settings, scheduler, options = SAMPLERS[name]
    wanted = record_diffusers(
        inpaint, scheduler, options, prompt=PROMPT, negative_prompt=OTHER, image=image_of(square(64, 96)),
        mask_image=image_of(rectangle(64, 96)), strength=strength, num_inference_steps=steps, guidance_scale=guidance,
        height=64, width=96, seed=3,
    )  # fmt: skip
    found = record_ours(
        our_inpaint, PROMPT, negative_prompt=OTHER, image=square(64, 96), mask=rectangle(64, 96), strength=strength,
        steps=steps, guidance=guidance, seed=3, **settings,
    )  # fmt: skip
    compare(found, wanted)


def test_a_batch_of_inpaintings(our_inpaint: Pipeline, inpaint: Any) -> None:
    """Each picture is drawn as it is alone. diffusers repeats the first one's sample of the masked picture."""
    settings: dict[str, Any] = {"image": square(), "mask": rectangle(), "steps": 3, "strength": 0.7, "guidance": 4.0}
    together = record_ours(our_inpaint, PROMPT, batch=2, seed=3, sampler="Euler a", **settings)
    for index in range(2):
        wanted = record_diffusers(
            inpaint, "EulerAncestralDiscreteScheduler", prompt=PROMPT, image=image_of(square()),
            mask_image=image_of(rectangle()), strength=0.7, num_inference_steps=3, guidance_scale=4.0, seed=3 + index,
            **SIZE,
        )  # fmt: skip
        assert relative_l2(together.latents[-1][index], wanted.latents[-1][0]) <= 1e-4


def test_inpainting_sees_mask_and_picture(our_inpaint: Pipeline) -> None:
    """Channels 5 to 9: the mask by nearest neighbour, then the latents of the picture with the mask blanked."""
    with watched(our_inpaint, "unet") as unet, watched(our_inpaint, "vae_encoder") as encoder:
        our_inpaint(PROMPT, image=square(), mask=rectangle(), steps=1, seed=3)
    sample = unet.feeds[0]["sample"]
    assert sample.shape == (2, 9, 8, 8)
    assert sample[0, 4, 3:7, 4:8].all()
    assert sample[:, 4].sum() == 2 * 16
    blanked = encoder.feeds[0]["sample"][0]
    assert (blanked[:, rectangle() == 255] == 0).all()
    assert (blanked[:, rectangle() == 0] != 0).any()


def test_inpainting_needs_both(our_inpaint: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"mask: expected one for this inpainting checkpoint, got none"):
        our_inpaint(PROMPT, image=square(), steps=2)
    with pytest.raises(UsageError, match=r"image: expected a mask and an image for this inpainting checkpoint"):
        our_inpaint(PROMPT, steps=2)


@pytest.fixture(scope="module")
def editing(family_sources: Callable[[str], Sources]) -> Any:
    return diffusers_pipeline(family_sources("instruct_pix2pix").path, "StableDiffusionInstructPix2PixPipeline")


@pytest.fixture(scope="module")
def our_editing(family_bundle: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(family_bundle("instruct_pix2pix"))


@pytest.mark.parametrize(("guidance", "image_guidance"), [(7.5, 1.5), (7.5, 1.0), (3.0, 2.5), (1.0, 1.5), (7.5, 0.8)])
@pytest.mark.parametrize("name", ["the checkpoint's", "DPM++ 2M Karras"])
def test_editing(name: str, guidance: float, image_guidance: float, our_editing: Pipeline, editing: Any) -> None:
    """Unguided where either scale is too small."""
    settings, scheduler, options = SAMPLERS[name]
    wanted = record_diffusers(
        editing, scheduler, options, prompt=PROMPT, negative_prompt=OTHER, image=image_of(square(64, 96)),
        num_inference_steps=4, guidance_scale=guidance, image_guidance_scale=image_guidance, seed=3,
    )  # fmt: skip
    with watched(our_editing, "unet") as unet:
        found = record_ours(
            our_editing, PROMPT, negative_prompt=OTHER, image=square(64, 96), steps=4, guidance=guidance,
            image_guidance=image_guidance, seed=3, **settings,
        )  # fmt: skip
    assert set(unet.rows) == {3 if guidance > 1 and image_guidance >= 1 else 1}
    compare(found, wanted)


def test_a_batch_of_edits(our_editing: Pipeline, editing: Any) -> None:
    wanted = record_diffusers(
        editing, prompt=[PROMPT, "ice"], negative_prompt=[OTHER, OTHER], image=[image_of(square())] * 2,
        num_inference_steps=3, guidance_scale=5.0, image_guidance_scale=1.5, seed=[3, 4],
    )  # fmt: skip
    found = record_ours(
        our_editing, [PROMPT, "ice"], negative_prompt=OTHER, image=square(), steps=3, guidance=5.0, seed=3
    )
    compare(found, wanted)


def test_edits_of_several_parts(our_editing: Pipeline) -> None:
    """A prompt of two equal halves edits as the half alone, and each picture of a batch as it would alone."""
    settings: dict[str, Any] = {"image": square(), "steps": 3, "guidance": 5.0, "decode": False}
    one = our_editing(PROMPT, seed=3, **settings).latents
    halves = f"{PROMPT} :0.5 AND {PROMPT} :0.5"
    both = our_editing([halves, PROMPT], seed=[3, 3], **settings).latents
    assert max(relative_l2(latents, one[0]) for latents in both) <= 1e-5


def test_editing_needs_an_image(our_editing: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"image: expected an image for this editing checkpoint, got none"):
        our_editing(PROMPT, steps=2)
