"""What prompts do through the whole pipeline: schedules, batches, seeds, clip skip, embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from task_oracle import compare, diffusers_pipeline, record_diffusers, record_ours, relative_l2, watched
from test_task_image import picture as picture

from latentrt.runtime import Pipeline, UsageError
from latentrt.runtime.noise import batch_noise, variation_noise
from latentrt.runtime.text_encoding import Embeddings
from latentrt.runtime.torch_rng import torch_randn

RED, BLUE = "a red circle on a white background", "a blue square on a black background"
SMALL: dict[str, Any] = {"height": 64, "width": 64, "sampler": "Euler"}
LONG = "a circle on a white background" + ", plain" * 80


@pytest.fixture(scope="module")
def reference(shapes_checkpoint: Path) -> Any:
    return diffusers_pipeline(shapes_checkpoint)


@pytest.fixture(scope="module")
def ours(shapes_bundle: Path) -> Pipeline:
    return Pipeline.load(shapes_bundle, precision="fp32")


def told(pipe: Pipeline, prompt: Any, **settings: Any) -> list[NDArray[np.float32]]:
    """The embeddings that the U-Net is given in each call, (rows, 77k, d)."""
    with watched(pipe, "unet") as unet:
        pipe(prompt, decode=False, **{**SMALL, **settings})
    return [feeds["encoder_hidden_states"].astype(np.float32) for feeds in unet.feeds]


@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DPM++ 2M"])
def test_a_schedule_switches_at_its_step(sampler: str, ours: Pipeline) -> None:
    """[a:b:0.5] of 4 steps: two of the one, two of the other, however often a step calls the U-Net."""
    calls = told(ours, f"[{RED}:{BLUE}:0.5]", steps=4, guidance=1.0, sampler=sampler)
    (red,), (blue,) = (told(ours, text, steps=1, guidance=1.0) for text in (RED, BLUE))
    first = 4 if sampler == "Heun" else 2
    assert len(calls) == (7 if sampler == "Heun" else 4)
    for index, call in enumerate(calls):
        np.testing.assert_array_equal(call, red if index < first else blue)


def test_steps_are_counted_from_where_image_to_image_starts(ours: Pipeline, picture: NDArray[np.uint8]) -> None:
    """Schedules and the interval of guidance: the halves of the two steps that are left of four."""
    settings = {"image": picture, "strength": 0.5, "steps": 4, "guidance": 5.0, "height": 64, "width": 96}
    first, second = told(ours, f"[{RED}:{BLUE}:0.5]", guidance_interval=(0.0, 0.5), **settings)
    (red,), (blue,) = (told(ours, text, steps=1, guidance=1.0) for text in (RED, BLUE))
    np.testing.assert_array_equal(first[1:], red)
    np.testing.assert_array_equal(second, blue)


def test_an_alternation_changes_every_step(ours: Pipeline) -> None:
    calls = told(ours, f"[{RED}|{BLUE}]", steps=4, guidance=1.0)
    (red,), (blue,) = (told(ours, text, steps=1, guidance=1.0) for text in (RED, BLUE))
    for call, wanted in zip(calls, [red, blue, red, blue], strict=True):
        np.testing.assert_array_equal(call, wanted)


def test_a_negative_prompt_can_be_scheduled(ours: Pipeline) -> None:
    calls = told(ours, RED, negative_prompt=f"[{BLUE}:0.5]", steps=2, guidance=3.0)
    (before,), (after,) = (told(ours, RED, negative_prompt=text, steps=1, guidance=3.0) for text in ("", BLUE))
    np.testing.assert_array_equal(calls[0], before)
    np.testing.assert_array_equal(calls[1], after)


def test_a_scheduled_run_is_diffusers_with_two_prompts(ours: Pipeline, reference: Any) -> None:
    """The second prompt's embeddings put in by a callback."""
    import torch

    with torch.no_grad():
        second, negative = reference.encode_prompt(BLUE, "cpu", 1, True)
    original = reference.scheduler.__class__

    def swap(pipe: Any, index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents.append(values["latents"].numpy().copy())
        return {"prompt_embeds": torch.cat([negative, second])} if index == 1 else {}

    import diffusers

    latents: list[NDArray[np.float32]] = []
    kept = reference.scheduler
    reference.scheduler = diffusers.EulerDiscreteScheduler.from_config(kept.config)
    try:
        images = reference(
            RED, num_inference_steps=4, guidance_scale=5.0, height=64, width=64, output_type="np",
            generator=torch.Generator("cpu").manual_seed(3), callback_on_step_end=swap,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        ).images  # fmt: skip
    finally:
        reference.scheduler = kept
    assert isinstance(kept, original)
    found = record_ours(ours, f"[{RED}:{BLUE}:2]", steps=4, guidance=5.0, seed=3, **SMALL)
    for ours_, theirs in zip(found.latents, latents, strict=True):
        assert relative_l2(ours_, theirs) <= 1e-4
    assert np.abs(found.pictures.astype(int) - (images * 255).round().astype(int)).max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_is_that_of_diffusers(
    clip_skip: int, guidance: float, ours: Pipeline, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What diffusers looks for is not where this transformers has it.
    monkeypatch.setitem(vars(reference.text_encoder), "text_model", reference.text_encoder)
    wanted = record_diffusers(
        reference, "EulerDiscreteScheduler", prompt=RED, negative_prompt="green", clip_skip=clip_skip,
        num_inference_steps=3, guidance_scale=guidance, height=64, width=64, seed=3,
    )  # fmt: skip
    found = record_ours(
        ours, RED, negative_prompt="green", clip_skip=clip_skip, steps=3, guidance=guidance, seed=3, **SMALL
    )
    compare(found, wanted)


def test_clip_skip_of_negative_prompts(ours: Pipeline) -> None:
    """diffusers skips none for them; the web UI as many as for prompts."""
    encoder = ours.model.prompt_encoder
    (call,) = told(ours, RED, negative_prompt="green", clip_skip=1, negative_clip_skip=2, steps=1)
    np.testing.assert_array_equal(call[0], encoder("green", clip_skip=2).hidden)
    np.testing.assert_array_equal(call[1], encoder(RED, clip_skip=1).hidden)


def test_embeddings_in_place_of_text(ours: Pipeline) -> None:
    encoder = ours.model.prompt_encoder
    settings = {"steps": 3, "guidance": 5.0, "seed": 3, **SMALL}
    text = ours([RED, BLUE], negative_prompt="green", **settings)
    given = ours([encoder(RED), encoder(BLUE)], negative_prompt=encoder("green"), **settings)
    np.testing.assert_array_equal(text.latents, given.latents)
    mixed = ours([encoder(RED), BLUE], negative_prompt=["green", encoder("green")], **settings)
    np.testing.assert_array_equal(text.latents, mixed.latents)


def test_embeddings_of_another_model_are_refused(ours: Pipeline) -> None:
    with pytest.raises(UsageError, match=r"embeddings.hidden: expected width 64, got 32"):
        ours(Embeddings(np.zeros((77, 32), np.float32)), steps=1, **SMALL)


def test_long_prompts_are_read_in_chunks(ours: Pipeline) -> None:
    """Negative prompts are padded alike; no prompt is padded because of another image's."""
    (guided,) = told(ours, LONG, steps=1, guidance=5.0)
    chunks = guided.shape[1] // 77
    assert chunks >= 2
    assert guided.shape == (2, 77 * chunks, 64)
    (empty,) = told(ours, "", steps=1, guidance=1.0)
    np.testing.assert_array_equal(guided[0], np.concatenate([empty[0]] * chunks))
    calls = told(ours, [LONG, RED], steps=1, guidance=5.0)
    assert sorted(call.shape[1] for call in calls) == [77, 77 * chunks]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_batch_of_prompts_is_each_alone(guidance: float, ours: Pipeline) -> None:
    """One, two and three chunks, and a composition, in one call."""
    prompts = [RED, LONG, BLUE, f"{RED} AND {BLUE} :0.5"]
    negatives = ["", "green", None, LONG]
    settings = {"steps": 2, "guidance": guidance, **SMALL, "sampler": "Euler a"}
    together = ours(prompts, negative_prompt=[n or "" for n in negatives], seed=20, **settings)
    assert together.seeds == (20, 21, 22, 23)
    assert len(together.images) == 4
    for index, prompt in enumerate(prompts):
        alone = ours(prompt, negative_prompt=negatives[index], seed=20 + index, **settings)
        np.testing.assert_array_equal(together.latents[index], alone.latents[0])
        np.testing.assert_allclose(together.images[index].astype(int), alone.images[0].astype(int), atol=1)


def test_pictures_of_a_prompt_come_together(ours: Pipeline) -> None:
    result = ours([RED, BLUE], batch=2, steps=2, seed=20, **SMALL)
    for index, prompt in enumerate([RED, RED, BLUE, BLUE]):
        alone = ours(prompt, steps=2, seed=20 + index, **SMALL)
        np.testing.assert_array_equal(result.latents[index], alone.latents[0])


@pytest.mark.parametrize("seeds", [[7, 3, 7], (2**40, 0, 5)])
def test_a_seed_for_each_picture(seeds: Sequence[int], ours: Pipeline) -> None:
    result = ours(RED, batch=3, steps=2, seed=seeds, **SMALL)
    assert result.seeds == tuple(seeds)
    for index, seed in enumerate(seeds):
        alone = ours(RED, steps=2, seed=seed, **SMALL)
        np.testing.assert_array_equal(result.latents[index], alone.latents[0])


def test_too_few_seeds_are_refused(ours: Pipeline) -> None:
    with pytest.raises(UsageError, match="expected one for each of 3 images"):
        ours(RED, batch=3, steps=1, seed=[1, 2], **SMALL)


def first_sample(pipe: Pipeline, **settings: Any) -> NDArray[np.float32]:
    """The first latents that the U-Net sees, in unit variance, without guidance."""
    with watched(pipe, "unet") as unet:
        pipe(RED, steps=2, guidance=1.0, decode=False, **{**SMALL, "sampler": "DDIM", **settings})
    return unet.feeds[0]["sample"].astype(np.float32)


def test_variations_turn_the_noise(ours: Pipeline) -> None:
    shape = (1, 4, 8, 8)
    base, other = torch_randn(shape, 5), torch_randn(shape, 9)
    np.testing.assert_allclose(
        first_sample(ours, seed=5, variation_seed=9, variation_strength=0.3), variation_noise(base, other, 0.3),
        rtol=1e-6, atol=1e-6,
    )  # fmt: skip
    np.testing.assert_array_equal(first_sample(ours, seed=5, variation_seed=9, variation_strength=0.0), base)
    batch = first_sample(ours, seed=5, variation_seed=9, variation_strength=0.3, batch=2)
    np.testing.assert_allclose(batch[1:], variation_noise(base, torch_randn(shape, 10), 0.3), rtol=1e-6, atol=1e-6)


def test_variations_of_an_image_turn_its_noise(ours: Pipeline, picture: NDArray[np.uint8]) -> None:
    """Not the numbers that sample the image's latents, which come from the seed first."""
    settings = {"image": picture, "strength": 0.99, "seed": 5, "height": 64, "width": 96}
    plain = first_sample(ours, **settings)
    varied = first_sample(ours, variation_seed=9, variation_strength=0.5, **settings)
    shape = (1, 4, 8, 12)
    stream = batch_noise(5)
    stream(shape)
    base = stream(shape)
    turned = variation_noise(base, torch_randn(shape, 9), 0.5)
    alpha = plain_share(ours)
    np.testing.assert_allclose(varied - plain, np.sqrt(1 - alpha**2) * (turned - base), rtol=1e-4, atol=1e-4)


def plain_share(pipe: Pipeline) -> float:
    """How much of the latent is in the first sample of two steps of DDIM at strength 0.99: of one step, the last."""
    levels: list[float] = []
    pipe(
        RED, steps=2, guidance=1.0, decode=False, on_step=lambda step: levels.append(step.sigma),
        **{**SMALL, "sampler": "DDIM"},
    )  # fmt: skip
    return float(1 / np.sqrt(1 + levels[1] ** 2))


def test_a_composition_kept_at_another_size(ours: Pipeline) -> None:
    """Height and width in pixels, in this order: its noise in the middle, new noise around."""
    found = first_sample(ours, seed=5, height=96, width=64, resize_seed_from=(64, 32))
    inner = torch_randn((1, 4, 8, 4), 5)
    np.testing.assert_array_equal(found[:, :, 2:10, 2:6], inner)
    outer = torch_randn((1, 4, 12, 8), 5)
    np.testing.assert_array_equal(found[:, :, :2], outer[:, :, :2])


@pytest.mark.parametrize("rng", ["cuda", "numpy"])
def test_other_random_numbers(rng: Any, ours: Pipeline) -> None:
    np.testing.assert_array_equal(first_sample(ours, seed=5, rng=rng), batch_noise(5, rng=rng)((1, 4, 8, 8)))
    result = ours(RED, steps=2, seed=5, rng=rng, **{**SMALL, "sampler": "Euler a"})
    cpu = ours(RED, steps=2, seed=5, **{**SMALL, "sampler": "Euler a"})
    assert relative_l2(result.latents, cpu.latents) > 0.1
    with pytest.raises(UsageError, match="rng"):
        ours(RED, steps=1, rng="dice", **SMALL)
