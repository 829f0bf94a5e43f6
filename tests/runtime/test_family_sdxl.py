"""SDXL's base model beside diffusers' pipelines on the same weights: the latents of every step, and the pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from family_oracle import OTHER, PROMPT, SIZE, image_of, rectangle, sibling, square
from task_oracle import compare, diffusers_pipeline, record_diffusers, record_ours, relative_l2, watched

from latentrt.runtime import Pipeline, open_bundle
from latentrt.runtime.model_facts import read_facts
from latentrt.runtime.text_encoding import Embeddings

if TYPE_CHECKING:
    from families import Sources


@pytest.fixture(scope="module")
def base(family_sources: Callable[[str], Sources]) -> Any:
    return diffusers_pipeline(family_sources("sdxl_base").path, "StableDiffusionXLPipeline")


@pytest.fixture(scope="module")
def ours(family_bundle: Callable[[str], Path]) -> Pipeline:
    return Pipeline.load(family_bundle("sdxl_base"))


# Our settings, the diffusers class, and its options beside the checkpoint's config.
SAMPLERS: dict[str, tuple[dict[str, Any], str | None, dict[str, Any]]] = {
    "the checkpoint's": ({}, None, {}),
    "DPM++ 2M Karras": ({"sampler": "DPM++ 2M Karras"}, "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "Euler a": ({"sampler": "Euler a"}, "EulerAncestralDiscreteScheduler", {}),
    "DDIM": ({"sampler": "DDIM"}, "DDIMScheduler", {"clip_sample": False}),
    "UniPC": ({"sampler": "UniPC"}, "UniPCMultistepScheduler", {}),
    "Heun": ({"sampler": "Heun"}, "HeunDiscreteScheduler", {}),
}


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_text_to_image(name: str, guidance: float, ours: Pipeline, base: Any) -> None:
    settings, scheduler, options = SAMPLERS[name]
    wanted = record_diffusers(
        base, scheduler, options, prompt=PROMPT, negative_prompt=OTHER, num_inference_steps=5,
        guidance_scale=guidance, height=64, width=96, seed=3,
    )  # fmt: skip
    found = record_ours(
        ours, PROMPT, negative_prompt=OTHER, steps=5, guidance=guidance, height=64, width=96, seed=3, **settings
    )
    compare(found, wanted)


TEXTS: dict[str, dict[str, Any]] = {
    "no negative": {},
    "empty negative": {"negative_prompt": ""},
    "second prompt": {"prompt_2": OTHER},
    "second negative": {"negative_prompt": OTHER, "negative_prompt_2": "ice"},
    "all four": {"prompt_2": "ice", "negative_prompt": OTHER, "negative_prompt_2": PROMPT},
    "clip skip": {"negative_prompt": OTHER, "clip_skip": 1},
    "guidance rescale": {"guidance_rescale": 0.7},
}


@pytest.mark.parametrize("name", TEXTS)
def test_prompts(name: str, ours: Pipeline, base: Any) -> None:
    """A negative prompt that was not given is zeros, an empty one is not; clip skip counts from the usual layer."""
    wanted = record_diffusers(
        base, prompt=PROMPT, num_inference_steps=3, guidance_scale=6.0, seed=4, **SIZE, **TEXTS[name]
    )
    found = record_ours(ours, PROMPT, steps=3, guidance=6.0, seed=4, **TEXTS[name])
    compare(found, wanted)


def test_the_texts_matter(ours: Pipeline) -> None:
    """Each of those cases draws something else."""
    latents = [ours(PROMPT, steps=3, guidance=6.0, seed=4, decode=False, **case).latents for case in TEXTS.values()]
    for index, one in enumerate(latents):
        assert all(relative_l2(other, one) > 1e-3 for other in latents[index + 1 :])


# diffusers looks at the negative sizes only if both are given.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "crop": ({"crop": (8, 24)}, {"crops_coords_top_left": (8, 24)}),
    "sizes": (
        {"original_size": (96, 80), "crop": (4, 12), "target_size": (72, 56)},
        {"original_size": (96, 80), "crops_coords_top_left": (4, 12), "target_size": (72, 56)},
    ),
    "negative sizes": (
        {"crop": (4, 12), "negative_original_size": (16, 24), "negative_target_size": (40, 48)},
        {"crops_coords_top_left": (4, 12), "negative_original_size": (16, 24), "negative_target_size": (40, 48)},
    ),
    "all": (
        {
            "original_size": (96, 80),
            "crop": (4, 12),
            "target_size": (72, 56),
            "negative_original_size": (16, 24),
            "negative_crop": (30, 2),
            "negative_target_size": (40, 48),
        },
        {
            "original_size": (96, 80),
            "crops_coords_top_left": (4, 12),
            "target_size": (72, 56),
            "negative_original_size": (16, 24),
            "negative_crops_coords_top_left": (30, 2),
            "negative_target_size": (40, 48),
        },
    ),
}


@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("name", SIZES)
def test_micro_conditioning(name: str, guidance: float, ours: Pipeline, base: Any) -> None:
    settings, arguments = SIZES[name]
    wanted = record_diffusers(
        base, prompt=PROMPT, num_inference_steps=3, guidance_scale=guidance, height=64, width=72, seed=4, **arguments
    )
    found = record_ours(ours, PROMPT, steps=3, guidance=guidance, height=64, width=72, seed=4, **settings)
    compare(found, wanted)


def test_micro_conditioning_matters(ours: Pipeline) -> None:
    settings = [{}, *({name: value} for name, value in SIZES["all"][0].items())]
    latents = [ours(PROMPT, steps=2, guidance=6.0, seed=4, decode=False, **case).latents for case in settings]
    for index, one in enumerate(latents):
        assert all(relative_l2(other, one) > 1e-4 for other in latents[index + 1 :]), settings[index]


def test_a_batch_of_prompts(ours: Pipeline, base: Any) -> None:
    wanted = record_diffusers(
        base, "EulerAncestralDiscreteScheduler", prompt=[PROMPT, OTHER], negative_prompt=["ice", "cube"],
        num_images_per_prompt=2, num_inference_steps=3, guidance_scale=5.0, seed=[7, 8, 9, 10], **SIZE,
    )  # fmt: skip
    found = record_ours(
        ours,
        [PROMPT, OTHER],
        negative_prompt=["ice", "cube"],
        batch=2,
        sampler="Euler a",
        steps=3,
        guidance=5.0,
        seed=7,
    )
    compare(found, wanted)


def arrays(pipe: Any, text: str, *, second: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' embeddings of a text, (1, 77, d) and (1, p)."""
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt(text, prompt_2=second, do_classifier_free_guidance=False)
    return hidden, pooled


def test_embeddings_in_place_of_texts(ours: Pipeline, base: Any) -> None:
    hidden, pooled = arrays(base, PROMPT, second=OTHER)
    negative, negative_pooled = arrays(base, "ice")
    wanted = record_diffusers(
        base, prompt_embeds=hidden, pooled_prompt_embeds=pooled, negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled, num_inference_steps=3, guidance_scale=5.0, seed=4, **SIZE,
    )  # fmt: skip
    positive = Embeddings(hidden[0].numpy(), pooled[0].numpy())
    away = Embeddings(negative[0].numpy(), negative_pooled[0].numpy())
    compare(record_ours(ours, positive, negative_prompt=away, steps=3, guidance=5.0, seed=4), wanted)
    texts = record_ours(ours, PROMPT, prompt_2=OTHER, negative_prompt="ice", steps=3, guidance=5.0, seed=4)
    compare(texts, wanted)
    alone = record_diffusers(
        base, prompt_embeds=hidden, pooled_prompt_embeds=pooled, num_inference_steps=3, guidance_scale=1.0, seed=4,
        **SIZE,
    )  # fmt: skip
    compare(record_ours(ours, positive, steps=3, guidance=1.0, seed=4), alone)


def chunked(pipe: Any, text: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A text's embeddings in so many rows of 75 tokens, the last ones empty; pooled of the first."""
    parts, pooled = [], torch.empty(0)
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        ids = tokenizer(text).input_ids[1:-1]
        assert len(ids) <= 75 * count
        rows = [ids[start : start + 75] for start in range(0, 75 * count, 75)]
        framed = [
            [tokenizer.bos_token_id, *row, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * (75 - len(row))
            for row in rows
        ]
        with torch.no_grad():
            outputs = [encoder(torch.tensor([row]), output_hidden_states=True) for row in framed]
        parts.append(torch.cat([output.hidden_states[-2] for output in outputs], 1))
        pooled = outputs[0][0]
    return torch.cat(parts, 2), pooled


def test_long_prompts(ours: Pipeline, base: Any) -> None:
    """diffusers cuts these; its encoders are given the rows that the web UIs make."""
    long = " ".join(f"{word} {index}" for index, word in enumerate(["red", "blue", "ice"] * 10))
    hidden, pooled = chunked(base, long, 2)
    negative, negative_pooled = chunked(base, OTHER, 2)
    wanted = record_diffusers(
        base, prompt_embeds=hidden, pooled_prompt_embeds=pooled, negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled, num_inference_steps=3, guidance_scale=5.0, seed=4, **SIZE,
    )  # fmt: skip
    found = record_ours(ours, long, negative_prompt=OTHER, steps=3, guidance=5.0, seed=4)
    compare(found, wanted)
    given = Embeddings(hidden[0].numpy(), pooled[0].numpy())
    compare(record_ours(ours, given, negative_prompt=OTHER, steps=3, guidance=5.0, seed=4), wanted)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("steps", "strength"), [(3, 1.0), (6, 0.55)])
def test_image_to_image(name: str, steps: int, strength: float, ours: Pipeline, base: Any) -> None:
    settings, scheduler, options = SAMPLERS[name]
    wanted = record_diffusers(
        sibling(base, "StableDiffusionXLImg2ImgPipeline"), scheduler, options, prompt=PROMPT, negative_prompt=OTHER,
        image=image_of(square(64, 96)), strength=strength, num_inference_steps=steps, guidance_scale=5.0, seed=3,
        crops_coords_top_left=(3, 5),
    )  # fmt: skip
    found = record_ours(
        ours, PROMPT, negative_prompt=OTHER, image=square(64, 96), strength=strength, steps=steps, guidance=5.0,
        seed=3, crop=(3, 5), **settings,
    )  # fmt: skip
    compare(found, wanted)


def test_image_to_image_stops_early(ours: Pipeline, base: Any) -> None:
    """Both strength and denoising_end cut the steps, from either side."""
    wanted = record_diffusers(
        sibling(base, "StableDiffusionXLImg2ImgPipeline"), prompt=PROMPT, image=image_of(square()), strength=0.75,
        denoising_end=0.6, num_inference_steps=8, guidance_scale=5.0, seed=3,
    )  # fmt: skip
    assert 0 < len(wanted.latents) < 6
    found = record_ours(ours, PROMPT, image=square(), strength=0.75, denoising_end=0.6, steps=8, guidance=5.0, seed=3)
    compare(found, wanted)


@pytest.mark.parametrize(("steps", "strength"), [(3, 1.0), (6, 0.55)])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", ["the checkpoint's", "Euler a", "DPM++ 2M Karras"])
@pytest.mark.parametrize("family", ["sdxl_base", "sdxl_inpaint"])
def test_inpainting(
    family: str,
    name: str,
    guidance: float,
    steps: int,
    strength: float,
    family_sources: Callable[[str], Sources],
    family_bundle: Callable[[str], Path],
    pipelines: dict[str, tuple[Pipeline, Any]],
) -> None:
    """With the base model's 4 channels, and with the 9 of the inpainting model."""
    if family not in pipelines:
        theirs = diffusers_pipeline(family_sources(family).path, "StableDiffusionXLInpaintPipeline")
        pipelines[family] = Pipeline.load(family_bundle(family)), theirs
    ours, theirs = pipelines[family]
    settings, scheduler, options = SAMPLERS[name]
    wanted = record_diffusers(
        theirs, scheduler, options, prompt=PROMPT, negative_prompt=OTHER, image=image_of(square(64, 96)),
        mask_image=image_of(rectangle(64, 96)), strength=strength, num_inference_steps=steps, guidance_scale=guidance,
        height=64, width=96, seed=3,
    )  # fmt: skip
    found = record_ours(
        ours, PROMPT, negative_prompt=OTHER, image=square(64, 96), mask=rectangle(64, 96), strength=strength,
        steps=steps, guidance=guidance, seed=3, **settings,
    )  # fmt: skip
    compare(found, wanted)


@pytest.fixture(scope="module")
def pipelines() -> dict[str, tuple[Pipeline, Any]]:
    """Ours and diffusers', by family."""
    return {}


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_turbo(
    steps: int,
    guidance: float,
    family_sources: Callable[[str], Sources],
    family_bundle: Callable[[str], Path],
    pipelines: dict[str, tuple[Pipeline, Any]],
) -> None:
    """One to four steps of Euler ancestral with trailing spacing, unguided: one row a picture."""
    if "sdxl_turbo" not in pipelines:
        theirs = diffusers_pipeline(family_sources("sdxl_turbo").path, "StableDiffusionXLPipeline")
        pipelines["sdxl_turbo"] = Pipeline.load(family_bundle("sdxl_turbo")), theirs
    ours, theirs = pipelines["sdxl_turbo"]
    wanted = record_diffusers(
        theirs, prompt=PROMPT, num_inference_steps=steps, guidance_scale=guidance, seed=[5, 6],
        num_images_per_prompt=2, **SIZE,
    )  # fmt: skip
    with watched(ours, "unet") as unet:
        found = record_ours(ours, PROMPT, batch=2, steps=steps, guidance=guidance, seed=5)
    assert unet.rows == [4 if guidance > 1 else 2] * steps
    compare(found, wanted)


def test_prompts_of_other_lengths_do_not_change_a_picture(ours: Pipeline) -> None:
    """Texts of one, two and three rows, of two parts, and not given: calls of their own, and the rows of each right."""
    long = " ".join(f"{word} {index}" for index, word in enumerate(["red", "blue", "ice"] * 10))
    prompts = [PROMPT, long, "ice AND blue coin :0.5", long + " " + long, OTHER]
    negatives = [long, None, "", "red", None]
    settings: dict[str, Any] = {"steps": 3, "guidance": 5.0, "sampler": "Euler a", "crop": (4, 8), "decode": False}
    together = ours(prompts, negative_prompt=negatives, seed=3, **settings)
    for index, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = ours(prompt, negative_prompt=negative, seed=3 + index, **settings)
        assert relative_l2(together.latents[index], alone.latents[0]) <= 1e-5


@pytest.mark.parametrize("held", [True, False, None])
def test_zeros_for_a_negative_prompt_not_given(
    held: bool | None, family_bundle: Callable[[str], Path], tmp_path: Path
) -> None:
    """As model_index.json says; diffusers' SDXL pipelines make them zeros if it does not."""
    folder = tmp_path / "bundle"
    shutil.copytree(family_bundle("sdxl_base"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    added = {} if held is None else {"force_zeros_for_empty_prompt": held}
    (folder / "model_index.json").write_text(json.dumps({**index, **added}))
    assert read_facts(open_bundle(folder)).zero_negative is (held is not False)
    assert not read_facts(open_bundle(family_bundle("sd15"))).zero_negative
