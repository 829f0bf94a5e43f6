"""Image to image and inpainting with an ordinary model, beside diffusers' pipelines: every step, same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from task_oracle import compare, diffusers_pipeline, record_diffusers, record_ours, relative_l2, sibling_pipeline

from latentrt.runtime import ConfigError, Pipeline, UsageError
from latentrt.runtime.pixels import to_sample
from latentrt.runtime.sampler_names import SAMPLERS
from latentrt.runtime.torch_rng import torch_randn

PROMPT = "a small red circle on a blue background"

# By a short name: our settings, the diffusers class, and its options beside the checkpoint's config.
Case = tuple[dict[str, Any], str, dict[str, Any]]
CASES: dict[str, Case] = {
    "DDIM": ({"sampler": "DDIM"}, "DDIMScheduler", {"clip_sample": False}),
    "DDIM eta": ({"sampler": "DDIM", "eta": 1.0}, "DDIMScheduler", {"clip_sample": False}),
    "PLMS": ({"sampler": "PLMS"}, "PNDMScheduler", {}),
    "Euler": ({"sampler": "Euler"}, "EulerDiscreteScheduler", {}),
    "Euler a": ({"sampler": "Euler a"}, "EulerAncestralDiscreteScheduler", {}),
    "Heun": ({"sampler": "Heun"}, "HeunDiscreteScheduler", {}),
    "DPM++ 2M Karras": ({"sampler": "DPM++ 2M Karras"}, "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": (
        {"sampler": "DPM++ 2M", "sampler_options": {"algorithm_type": "sde-dpmsolver++"}},
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "UniPC": ({"sampler": "UniPC"}, "UniPCMultistepScheduler", {}),
    "LCM": ({"sampler": "LCM"}, "LCMScheduler", {}),
}


@pytest.fixture(scope="module")
def img2img(shapes_checkpoint: Path) -> Any:
    return diffusers_pipeline(shapes_checkpoint, "StableDiffusionImg2ImgPipeline")


@pytest.fixture(scope="module")
def inpaint(img2img: Any) -> Any:
    return sibling_pipeline(img2img, "StableDiffusionInpaintPipeline")


@pytest.fixture(scope="module")
def ours(shapes_bundle: Path) -> Pipeline:
    return Pipeline.load(shapes_bundle, precision="fp32")


@pytest.fixture(scope="module")
def picture() -> NDArray[np.uint8]:
    """64 x 96: a green square on yellow with a gradient, so that no part is like another."""
    array = np.zeros((64, 96, 3), np.uint8)
    array[...] = (230, 210, 40)
    array[..., 2] += np.arange(64, dtype=np.uint8)[:, None]
    array[15:45, 10:50] = (30, 160, 60)
    return array


@pytest.fixture(scope="module")
def mask() -> NDArray[np.uint8]:
    """A rectangle whose edges lie inside latents, with grey borders above and below one half."""
    array = np.zeros((64, 96), np.uint8)
    array[19:50, 27:82] = 255
    array[14:19, 27:82] = 120
    array[50:54, 27:82] = 130
    return array


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("steps", "strength"), [(7, 0.3), (5, 0.5), (6, 0.8), (3, 1.0)])
def test_image_to_image(
    name: str, steps: int, strength: float, ours: Pipeline, img2img: Any, picture: NDArray[np.uint8]
) -> None:
    settings, scheduler, options = CASES[name]
    extra = {"eta": settings["eta"]} if "eta" in settings else {}
    wanted = record_diffusers(
        img2img, scheduler, options, prompt=PROMPT, image=Image.fromarray(picture), strength=strength,
        num_inference_steps=steps, guidance_scale=4.0, seed=7, **extra,
    )  # fmt: skip
    found = record_ours(ours, PROMPT, image=picture, strength=strength, steps=steps, guidance=4.0, seed=7, **settings)
    compare(found, wanted)


def test_a_batch_from_one_image(ours: Pipeline, img2img: Any, picture: NDArray[np.uint8]) -> None:
    """Each image's generator draws the VAE's sample, then the noise, then that of the steps."""
    wanted = record_diffusers(
        img2img, "EulerAncestralDiscreteScheduler", prompt=PROMPT, image=Image.fromarray(picture), strength=0.6,
        num_inference_steps=5, guidance_scale=4.0, num_images_per_prompt=2, seed=[7, 8],
    )  # fmt: skip
    found = record_ours(
        ours, PROMPT, image=picture, strength=0.6, steps=5, guidance=4.0, seed=7, batch=2, sampler="Euler a"
    )
    compare(found, wanted)


def test_latents_instead_of_an_image(ours: Pipeline, img2img: Any) -> None:
    """diffusers takes an image of four channels for latents."""
    import torch

    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 12)).astype(np.float32)
    wanted = record_diffusers(
        img2img, "EulerDiscreteScheduler", prompt=PROMPT, image=torch.from_numpy(latents), strength=0.6,
        num_inference_steps=5, guidance_scale=4.0, seed=7,
    )  # fmt: skip
    found = record_ours(ours, PROMPT, latents=latents, strength=0.6, steps=5, guidance=4.0, seed=7, sampler="Euler")
    compare(found, wanted)


def test_another_size_than_the_image(ours: Pipeline, picture: NDArray[np.uint8]) -> None:
    """The image is scaled to the size asked for; without one, its own counts."""
    own = ours(PROMPT, image=picture, strength=0.5, steps=2, sampler="Euler")
    assert own.images.shape == (1, 64, 96, 3)
    larger = Image.fromarray(picture).resize((128, 72), Image.Resampling.LANCZOS)
    asked = ours(PROMPT, image=picture, height=72, width=128, strength=0.5, steps=2, sampler="Euler")
    given = ours(PROMPT, image=larger, strength=0.5, steps=2, sampler="Euler")
    assert asked.images.shape == (1, 72, 128, 3)
    np.testing.assert_array_equal(asked.images, given.images)


def test_strength_without_a_step_left(ours: Pipeline, picture: NDArray[np.uint8]) -> None:
    with pytest.raises(UsageError, match=r"strength: expected at least 0\.25 with 4 steps, got 0\.2"):
        ours(PROMPT, image=picture, strength=0.2, steps=4)


PAINTERS: dict[str, Case] = {
    **CASES,
    "DPM2 a": ({"sampler": "DPM2 a"}, "KDPM2AncestralDiscreteScheduler", {}),
    "DPM++ 2S": ({"sampler": "DPM++ 2S"}, "DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "DDPM": ({"sampler": "DDPM"}, "DDPMScheduler", {"clip_sample": False}),
    "TCD": ({"sampler": "TCD", "eta": 0.3}, "TCDScheduler", {}),
}


# Not DPM2: within its steps diffusers puts the picture back at the noise of the step's end, not of its middle.
@pytest.mark.parametrize("name", PAINTERS)
@pytest.mark.parametrize(("steps", "strength"), [(4, 1.0), (7, 0.6)])
def test_inpainting(
    name: str,
    steps: int,
    strength: float,
    ours: Pipeline,
    inpaint: Any,
    picture: NDArray[np.uint8],
    mask: NDArray[np.uint8],
) -> None:
    """Stochastic samplers too: diffusers draws noise for the masked image's latents before theirs, and discards it."""
    settings, scheduler, options = PAINTERS[name]
    extra = {"eta": settings["eta"]} if "eta" in settings else {}
    wanted = record_diffusers(
        inpaint, scheduler, options, prompt=PROMPT, image=Image.fromarray(picture), mask_image=Image.fromarray(mask),
        strength=strength, num_inference_steps=steps, guidance_scale=4.0, seed=7, height=64, width=96, **extra,
    )  # fmt: skip
    found = record_ours(
        ours, PROMPT, image=picture, mask=mask, strength=strength, steps=steps, guidance=4.0, seed=7, **settings
    )
    compare(found, wanted)


@pytest.mark.parametrize("name", [spec.label for spec in SAMPLERS if spec.space in ("vp", "ve") and spec.spacings])
def test_what_is_not_painted_stays(
    name: str, ours: Pipeline, picture: NDArray[np.uint8], mask: NDArray[np.uint8]
) -> None:
    """With every sampler: outside the mask the latents are the picture's, and inside they are new."""
    known = image_latents(ours, picture, seed=3)
    result = ours(PROMPT, image=picture, mask=mask, steps=3, guidance=1.0, seed=3, sampler=name, decode=False)
    kept = latent_mask(mask) == 0
    assert 0 < kept.sum() < kept.size
    np.testing.assert_array_equal(result.latents[0][:, kept], known[0][:, kept])
    assert relative_l2(result.latents[0][:, ~kept], known[0][:, ~kept]) > 0.1


def image_latents(pipe: Pipeline, picture: NDArray[np.uint8], seed: int) -> NDArray[np.float32]:
    """What the VAE makes of a picture with a seed's first random numbers."""
    parameters = pipe.model.components["vae_encoder"]({"sample": to_sample(picture[None])})["latent_parameters"]
    mean, logvar = np.split(parameters.astype(np.float32), 2, axis=1)
    drawn = mean + np.exp(np.float32(0.5) * logvar) * torch_randn(mean.shape, seed)
    return np.asarray(drawn * np.float32(pipe.model.facts.scaling_factor), np.float32)


def latent_mask(mask: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A mask at the size of latents, as PyTorch's nearest neighbour scales it."""
    import torch

    binary = torch.from_numpy((mask >= 128).astype(np.float32))[None, None]
    small: NDArray[np.float32] = torch.nn.functional.interpolate(binary, size=(8, 12))[0, 0].numpy()
    return small


@pytest.mark.parametrize(("sampler", "options"), [("Euler", {"s_churn": 2.0}), ("Heun", {"s_churn": 2.0})])
def test_inpainting_with_churn_is_refused(
    sampler: str,
    options: dict[str, Any],
    ours: Pipeline,
    picture: NDArray[np.uint8],
    mask: NDArray[np.uint8],
) -> None:
    """Noise is added before the first evaluation of a step: there is no latent to put the picture back into."""
    with pytest.raises(ConfigError, match=r"churn.*s_churn to 0"):
        ours(PROMPT, image=picture, mask=mask, steps=3, sampler=sampler, sampler_options=options)


def test_a_mask_that_paints_nothing_gives_the_picture(ours: Pipeline, picture: NDArray[np.uint8]) -> None:
    black, white = np.zeros((64, 96), np.uint8), np.full((64, 96), 255, np.uint8)
    kept = ours(PROMPT, image=picture, mask=black, steps=2, guidance=1.0, seed=3, sampler="Euler")
    np.testing.assert_array_equal(kept.latents, image_latents(ours, picture, seed=3))
    everything = ours(PROMPT, image=picture, mask=white, steps=2, guidance=1.0, seed=3, sampler="Euler")
    assert relative_l2(everything.latents, kept.latents) > 0.5


def test_a_batch_of_inpaintings_is_its_pictures(
    ours: Pipeline, picture: NDArray[np.uint8], mask: NDArray[np.uint8]
) -> None:
    """diffusers repeats the first image's sample of the VAE here; an image must not depend on its batch."""
    settings: dict[str, Any] = {"image": picture, "mask": mask, "steps": 3, "strength": 0.7, "sampler": "Euler a"}
    together = ours(PROMPT, seed=5, batch=2, **settings)
    for index in range(2):
        alone = ours(PROMPT, seed=5 + index, **settings)
        np.testing.assert_array_equal(together.latents[index], alone.latents[0])
