"""Latent consistency models: the guidance scale is an input of the U-Net, which runs one row a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from family_oracle import OTHER, PROMPT, SIZE, image_of, rectangle, sibling, square
from numpy.typing import NDArray
from task_oracle import compare, diffusers_pipeline, record_diffusers, record_ours, relative_l2, watched

from latentrt.runtime import Pipeline, UsageError

if TYPE_CHECKING:
    from families import Sources


@pytest.fixture(scope="module")
def lcm(family_sources: Callable[[str], Sources]) -> Any:
    return diffusers_pipeline(family_sources("lcm").path, "LatentConsistencyModelPipeline")


@pytest.fixture(scope="module")
def ours(family_bundle: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(family_bundle("lcm"))


@pytest.mark.parametrize("guidance", [1.0, 8.5])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_text_to_image(steps: int, guidance: float, ours: Pipeline, lcm: Any) -> None:
    wanted = record_diffusers(
        lcm, prompt=PROMPT, num_inference_steps=steps, guidance_scale=guidance, height=64, width=96, seed=3
    )
    with watched(ours, "unet") as unet:
        found = record_ours(
            ours, PROMPT, negative_prompt=OTHER, steps=steps, guidance=guidance, height=64, width=96, seed=3
        )
    assert unet.rows == [1] * steps
    compare(found, wanted)


def test_a_batch(ours: Pipeline, lcm: Any) -> None:
    wanted = record_diffusers(
        lcm, prompt=[PROMPT, OTHER], num_images_per_prompt=2, num_inference_steps=4, guidance_scale=4.0,
        seed=[3, 4, 5, 6], **SIZE,
    )  # fmt: skip
    found = record_ours(ours, [PROMPT, OTHER], batch=2, steps=4, guidance=4.0, seed=3)
    compare(found, wanted)


def test_other_distillation_steps(ours: Pipeline, lcm: Any) -> None:
    wanted = record_diffusers(
        lcm, prompt=PROMPT, num_inference_steps=3, original_inference_steps=20, guidance_scale=4.0, seed=3, **SIZE
    )
    options = {"original_inference_steps": 20}
    compare(record_ours(ours, PROMPT, steps=3, guidance=4.0, seed=3, sampler_options=options), wanted)


def test_the_scale_matters(ours: Pipeline) -> None:
    latents = [ours(PROMPT, steps=2, guidance=scale, seed=3, decode=False).latents for scale in (0.0, 1.0, 2.0, 8.5)]
    for index, one in enumerate(latents):
        assert all(relative_l2(other, one) > 1e-3 for other in latents[index + 1 :])


@pytest.mark.parametrize("sampler", ["DDIM", "Euler a"])
def test_other_samplers(sampler: str, ours: Pipeline, lcm: Any) -> None:
    """Any sampler runs on it; in diffusers through the ordinary pipeline."""
    scheduler = {"DDIM": "DDIMScheduler", "Euler a": "EulerAncestralDiscreteScheduler"}[sampler]
    pipe = sibling(lcm, "StableDiffusionPipeline")
    wanted = record_diffusers(pipe, scheduler, prompt=PROMPT, num_inference_steps=4, guidance_scale=8.5, seed=3, **SIZE)
    compare(record_ours(ours, PROMPT, sampler=sampler, steps=4, guidance=8.5, seed=3), wanted)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_trajectory_consistency(eta: float, ours: Pipeline, lcm: Any) -> None:
    pipe = sibling(lcm, "StableDiffusionPipeline")
    wanted = record_diffusers(
        pipe, "TCDScheduler", prompt=PROMPT, num_inference_steps=4, guidance_scale=8.5, eta=eta, seed=3, **SIZE
    )
    compare(record_ours(ours, PROMPT, sampler="TCD", eta=eta, steps=4, guidance=8.5, seed=3), wanted)


@pytest.mark.parametrize(("steps", "strength"), [(1, 0.5), (2, 0.8), (4, 0.5), (4, 1.0), (5, 0.33)])
def test_image_to_image(steps: int, strength: float, ours: Pipeline, lcm: Any) -> None:
    """All the steps are taken, over a share of the distillation's: not the last ones, as with other models."""
    wanted = record_diffusers(
        sibling(lcm, "LatentConsistencyModelImg2ImgPipeline"), prompt=PROMPT, image=image_of(square(64, 96)),
        strength=strength, num_inference_steps=steps, guidance_scale=8.5, seed=3,
    )  # fmt: skip
    found = record_ours(ours, PROMPT, image=square(64, 96), strength=strength, steps=steps, guidance=8.5, seed=3)
    assert len(found.latents) == steps
    compare(found, wanted)


def test_too_many_steps_for_a_strength(ours: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"expected at most 10, original_inference_steps \(50\) times strength"):
        ours(PROMPT, image=square(), strength=0.2, steps=12)


def test_inpainting(ours: Pipeline, lcm: Any) -> None:
    """There is no pipeline of its own: the ordinary one takes the last steps."""
    wanted = record_diffusers(
        sibling(lcm, "StableDiffusionInpaintPipeline"), prompt=PROMPT, image=image_of(square()),
        mask_image=image_of(rectangle()), strength=0.6, num_inference_steps=5, guidance_scale=8.5, seed=3, **SIZE,
    )  # fmt: skip
    found = record_ours(ours, PROMPT, image=square(), mask=rectangle(), strength=0.6, steps=5, guidance=8.5, seed=3)
    compare(found, wanted)


def test_the_scale_is_told_as_sinusoids(ours: Pipeline, lcm: Any) -> None:
    import torch

    with watched(ours, "unet") as unet:
        ours(PROMPT, steps=1, guidance=5.5, seed=3, batch=2, decode=False)
    wanted = lcm.get_guidance_scale_embedding(torch.tensor([4.5, 4.5]), embedding_dim=256)
    told: NDArray[Any] = unet.feeds[0]["timestep_cond"]
    np.testing.assert_allclose(told, wanted.numpy(), atol=1e-3)
