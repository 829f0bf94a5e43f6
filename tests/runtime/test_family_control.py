"""ControlNets, one and two at once, beside diffusers' pipelines on the same weights; and TAESD's previews."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from family_oracle import OTHER, PROMPT, image_of, rectangle, sibling, square, stripes
from task_oracle import compare, diffusers_pipeline, record_diffusers, record_ours, relative_l2, watched

from latentrt.runtime import Control, Pipeline, UsageError
from latentrt.runtime.image import to_uint8

if TYPE_CHECKING:
    from families import Sources

LINES, FINE = stripes(64, 96), stripes(64, 96, period=5)
SETTINGS: dict[str, Any] = {"negative_prompt": OTHER, "steps": 5, "seed": 3, "height": 64, "width": 96}
ARGUMENTS: dict[str, Any] = {
    "prompt": PROMPT,
    "negative_prompt": OTHER,
    "num_inference_steps": 5,
    "seed": 3,
    "height": 64,
    "width": 96,
}
# Scale, start and end of each ControlNet.
Acts = tuple[tuple[float, float, float], ...]


def theirs(acts: Acts) -> dict[str, Any]:
    """Arguments of diffusers: numbers for one ControlNet, lists for several."""
    scales, starts, ends = (list(column) for column in zip(*acts, strict=True))
    if len(acts) == 1:
        scales, starts, ends = scales[0], starts[0], ends[0]
    return {"controlnet_conditioning_scale": scales, "control_guidance_start": starts, "control_guidance_end": ends}


def controls(acts: Acts) -> tuple[Control, ...]:
    """The same for ours."""
    return tuple(
        Control(image=(LINES, FINE)[model], scale=scale, start=start, end=end, model=model)
        for model, (scale, start, end) in enumerate(acts)
    )


def controlnets(sources: Sources) -> list[Any]:
    """diffusers' ControlNets of a checkpoint."""
    import diffusers

    return [diffusers.ControlNetModel.from_pretrained(path).eval() for path in sources.controlnets]


@pytest.fixture(scope="module")
def one(family_sources: Callable[[str], Sources]) -> Any:
    sources = family_sources("sd15_control")
    return diffusers_pipeline(sources.path, "StableDiffusionControlNetPipeline", controlnet=controlnets(sources)[0])


@pytest.fixture(scope="module")
def both(family_sources: Callable[[str], Sources]) -> Any:
    sources = family_sources("sd15_control")
    return diffusers_pipeline(sources.path, "StableDiffusionControlNetPipeline", controlnet=controlnets(sources))


@pytest.fixture(scope="module")
def ours(family_bundle: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(family_bundle("sd15_control"))


SINGLE: dict[str, Acts] = {
    "all steps": ((1.0, 0.0, 1.0),),
    "weaker": ((0.4, 0.0, 1.0),),
    "stronger": ((1.7, 0.0, 1.0),),
    "from the second": ((1.0, 0.2, 1.0),),
    "up to the third": ((1.0, 0.0, 0.6),),
    "between": ((0.8, 0.3, 0.85),),
}


@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("name", SINGLE)
def test_one(name: str, guidance: float, ours: Pipeline, one: Any) -> None:
    wanted = record_diffusers(one, image=image_of(LINES), guidance_scale=guidance, **ARGUMENTS, **theirs(SINGLE[name]))
    found = record_ours(ours, PROMPT, guidance=guidance, controls=controls(SINGLE[name]), **SETTINGS)
    compare(found, wanted)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("Euler a", "EulerAncestralDiscreteScheduler"), ("DPM++ 2M", "DPMSolverMultistepScheduler")],
)
def test_one_with_other_samplers(name: str, scheduler: str, ours: Pipeline, one: Any) -> None:
    """The ControlNet is given the input as the U-Net is: scaled."""
    wanted = record_diffusers(one, scheduler, image=image_of(LINES), guidance_scale=6.0, **ARGUMENTS)
    found = record_ours(ours, PROMPT, guidance=6.0, sampler=name, controls=controls(SINGLE["all steps"]), **SETTINGS)
    compare(found, wanted)


DOUBLE: dict[str, Acts] = {
    "both": ((1.0, 0.0, 1.0), (1.0, 0.0, 1.0)),
    "one after the other": ((0.9, 0.0, 0.4), (0.6, 0.4, 1.0)),
    "one of them off": ((0.0, 0.0, 1.0), (1.2, 0.2, 0.8)),
}


@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("name", DOUBLE)
def test_two(name: str, guidance: float, ours: Pipeline, both: Any) -> None:
    wanted = record_diffusers(
        both, image=[image_of(LINES), image_of(FINE)], guidance_scale=guidance, **ARGUMENTS, **theirs(DOUBLE[name])
    )
    found = record_ours(ours, PROMPT, guidance=guidance, controls=controls(DOUBLE[name]), **SETTINGS)
    compare(found, wanted)


def test_the_second_alone(ours: Pipeline, both: Any) -> None:
    wanted = record_diffusers(
        both, image=[image_of(LINES), image_of(FINE)], guidance_scale=6.0, **ARGUMENTS,
        **theirs(((0.0, 0.0, 1.0), (1.0, 0.0, 1.0))),
    )  # fmt: skip
    found = record_ours(ours, PROMPT, guidance=6.0, controls=[Control(image=FINE, model=1)], **SETTINGS)
    compare(found, wanted)


def test_they_matter(ours: Pipeline) -> None:
    """Each of those cases draws something else."""
    cases = [*SINGLE.values(), *DOUBLE.values()]
    latents = [ours(PROMPT, controls=controls(case), decode=False, **SETTINGS).latents for case in cases]
    for index, one in enumerate(latents):
        assert all(relative_l2(other, one) > 1e-3 for other in latents[index + 1 :])


@pytest.mark.parametrize("acts", [((0.0, 0.0, 1.0),), ((1.0, 1.0, 1.0),), ((1.0, 0.05, 0.1),)])
def test_one_that_is_never_active_changes_nothing(acts: Acts, ours: Pipeline) -> None:
    plain = record_ours(ours, PROMPT, **SETTINGS)
    with watched(ours, "controlnet") as controlnet:
        found = record_ours(ours, PROMPT, controls=controls(acts), **SETTINGS)
    compare(found, plain, bound=0)
    assert controlnet.feeds == []


def test_steps_before_its_start_are_those_without_it(ours: Pipeline) -> None:
    plain = record_ours(ours, PROMPT, **SETTINGS)
    with watched(ours, "controlnet") as first, watched(ours, "controlnet_2") as second:
        late = record_ours(ours, PROMPT, controls=controls(((1.0, 0.6, 1.0), (1.0, 0.8, 1.0))), **SETTINGS)
    assert (len(first.feeds), len(second.feeds)) == (2, 1)
    # PLMS takes one step more than asked for.
    np.testing.assert_array_equal(late.latents[:4], plain.latents[:4])
    assert relative_l2(late.latents[4], plain.latents[4]) > 1e-2


def test_each_row_has_its_scale(ours: Pipeline) -> None:
    """What a server needs that runs requests of different scales in one call."""
    session = ours.model.components["controlnet"]
    with watched(ours, "controlnet") as controlnet:
        ours(PROMPT, controls=controls(SINGLE["weaker"]), **SETTINGS)
    feeds = controlnet.feeds[0]
    assert feeds["conditioning_scale"].tolist() == [np.float32(0.4)] * 2
    unit = session({**feeds, "conditioning_scale": np.ones(2, np.float32)})
    mixed = session({**feeds, "conditioning_scale": np.array([0.0, 2.5], np.float32)})
    for name, value in mixed.items():
        assert not value[0].any()
        np.testing.assert_allclose(value[1], 2.5 * unit[name][1], rtol=1e-5, atol=1e-6)


def test_a_batch_of_prompts(ours: Pipeline, one: Any) -> None:
    arguments = {**ARGUMENTS, "prompt": [PROMPT, "ice"], "negative_prompt": [OTHER] * 2, "seed": [3, 4]}
    wanted = record_diffusers(one, image=image_of(LINES), guidance_scale=6.0, control_guidance_end=0.6, **arguments)
    found = record_ours(ours, [PROMPT, "ice"], guidance=6.0, controls=[Control(image=LINES, end=0.6)], **SETTINGS)
    compare(found, wanted)


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_from_an_image(guidance: float, ours: Pipeline, one: Any) -> None:
    """Start and end are shares of the steps that strength leaves."""
    pipe = sibling(one, "StableDiffusionControlNetImg2ImgPipeline", controlnet=one.controlnet)
    wanted = record_diffusers(
        pipe, image=image_of(square(64, 96)), control_image=image_of(LINES), strength=0.7, guidance_scale=guidance,
        **{**ARGUMENTS, "num_inference_steps": 7}, **theirs(((0.9, 0.2, 0.8),)),
    )  # fmt: skip
    found = record_ours(
        ours, PROMPT, image=square(64, 96), strength=0.7, guidance=guidance, controls=controls(((0.9, 0.2, 0.8),)),
        **{**SETTINGS, "steps": 7},
    )  # fmt: skip
    compare(found, wanted)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting(strength: float, ours: Pipeline, one: Any) -> None:
    pipe = sibling(one, "StableDiffusionControlNetInpaintPipeline", controlnet=one.controlnet)
    wanted = record_diffusers(
        pipe, image=image_of(square(64, 96)), mask_image=image_of(rectangle(64, 96)), control_image=image_of(LINES),
        strength=strength, guidance_scale=6.0, **ARGUMENTS, **theirs(((0.9, 0.2, 0.8),)),
    )  # fmt: skip
    found = record_ours(
        ours, PROMPT, image=square(64, 96), mask=rectangle(64, 96), strength=strength, guidance=6.0,
        controls=controls(((0.9, 0.2, 0.8),)), **SETTINGS,
    )  # fmt: skip
    compare(found, wanted)


@pytest.fixture(scope="module")
def sdxl(family_sources: Callable[[str], Sources]) -> Any:
    sources = family_sources("sdxl_control")
    return diffusers_pipeline(sources.path, "StableDiffusionXLControlNetPipeline", controlnet=controlnets(sources)[0])


@pytest.fixture(scope="module")
def our_sdxl(family_bundle: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(family_bundle("sdxl_control"))


@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("name", ["all steps", "between"])
def test_sdxl(name: str, guidance: float, our_sdxl: Pipeline, sdxl: Any) -> None:
    wanted = record_diffusers(
        sdxl, image=image_of(LINES), guidance_scale=guidance, crops_coords_top_left=(4, 8), prompt_2="ice",
        **ARGUMENTS, **theirs(SINGLE[name]),
    )  # fmt: skip
    found = record_ours(
        our_sdxl, PROMPT, prompt_2="ice", guidance=guidance, crop=(4, 8), controls=controls(SINGLE[name]), **SETTINGS
    )
    compare(found, wanted)


def test_sdxl_from_an_image(our_sdxl: Pipeline, sdxl: Any) -> None:
    pipe = sibling(sdxl, "StableDiffusionXLControlNetImg2ImgPipeline", controlnet=sdxl.controlnet)
    wanted = record_diffusers(
        pipe, image=image_of(square(64, 96)), control_image=image_of(LINES), strength=0.7, guidance_scale=6.0,
        **ARGUMENTS, **theirs(SINGLE["weaker"]),
    )  # fmt: skip
    found = record_ours(
        our_sdxl, PROMPT, image=square(64, 96), strength=0.7, guidance=6.0, controls=controls(SINGLE["weaker"]),
        **SETTINGS,
    )  # fmt: skip
    compare(found, wanted)


@pytest.mark.parametrize("family", ["sd15_control", "sdxl_control"])
def test_previews_by_taesd(
    family: str, family_sources: Callable[[str], Sources], ours: Pipeline, our_sdxl: Pipeline
) -> None:
    """What the tiny decoder makes of the denoised estimate, at each step and for each picture."""
    import diffusers
    import torch

    path = family_sources(family).taesd
    tiny = diffusers.AutoencoderTiny.from_pretrained(path).eval()
    pipe = ours if family == "sd15_control" else our_sdxl
    outputs: list[Any] = []

    def keep(_index: int, answer: dict[str, Any]) -> dict[str, Any]:
        outputs.append(answer["out_sample"].copy())
        return answer

    with watched(pipe, "unet", keep) as unet:
        run = pipe.stream(PROMPT, steps=4, guidance=1.0, batch=2, seed=3, sampler="Euler", height=64, width=96)
        steps = [(step.sigma, step.preview()) for step in run]
    for (sigma, preview), feeds, output in zip(steps, unet.feeds, outputs, strict=True):
        sample = np.sqrt(sigma**2 + 1) * feeds["sample"].astype(np.float64)
        denoised = torch.from_numpy((sample - sigma * output).astype(np.float32))
        with torch.no_grad():
            wanted = to_uint8(tiny.decode(denoised).sample.numpy())
        assert preview.shape == (2, 64, 96, 3)
        assert np.abs(preview.astype(int) - wanted).max() <= 1
    assert len({preview.tobytes() for _, preview in steps}) == 4


def test_what_a_bundle_lacks(family_bundle: Callable[[str], Path], ours: Pipeline) -> None:
    plain = Pipeline.load(family_bundle("sd15"))
    with pytest.raises(UsageError, match=r"expected controlnet, found .*unet.*--controlnet PATH"):
        plain(PROMPT, steps=2, controls=[Control(image=LINES)])
    with pytest.raises(UsageError, match=r"expected controlnet_3, found .*controlnet_2.*--controlnet PATH"):
        ours(PROMPT, steps=2, controls=[Control(image=LINES, model=2)])
