"""The second, larger pass; tiles; and a picture divided between two models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_oracle import check_pictures_near, record_ours, relative_l2, watched

from latentrt.runtime import BackendError, Pipeline, UsageError
from latentrt.runtime.hires import check_hires, larger_size
from latentrt.runtime.latents import encode_image
from latentrt.runtime.pipeline import base_and_refiner
from latentrt.runtime.pixels import load_image
from latentrt.runtime.request import Hires, Request
from latentrt.runtime.specs import Array
from latentrt.runtime.start_latents import resize_latents, scale_latents

PROMPT = "a small red circle on a blue background"
SMALL: dict[str, Any] = {"height": 64, "width": 48, "guidance": 4.0, "seed": 6}


@pytest.fixture(scope="module")
def ours(shapes_bundle: Path) -> Pipeline:
    return Pipeline.load(shapes_bundle, precision="fp32")


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(16, 12), (13, 9), (12, 25), (5, 4), (8, 6), (1, 1), (24, 18)])
def test_latents_are_resized_as_pytorch_does_it(mode: str, size: tuple[int, int]) -> None:
    import torch

    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 6)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(torch.from_numpy(latents), size=size, mode=mode).numpy()
    found = resize_latents(latents, *size, nearest=mode == "nearest")
    assert found.dtype == np.float32
    # PyTorch places the new pixels in float32.
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M", "PLMS", "DPM++ SDE"])
@pytest.mark.parametrize("upscaler", ["latent", "latent-nearest", "lanczos"])
def test_the_second_pass_is_image_to_image_on_enlarged_latents(sampler: str, upscaler: str, ours: Pipeline) -> None:
    import torch

    hires = Hires(scale=1.5, strength=0.4, steps=5, upscaler=upscaler)
    both = record_ours(ours, PROMPT, steps=3, hires=hires, sampler=sampler, **SMALL)
    first = ours(PROMPT, steps=3, sampler=sampler, **SMALL)
    if upscaler == "lanczos":
        larger = np.stack([load_image(picture, size=(96, 72)) for picture in first.images])
        latents = scale_latents(ours.model.facts, encode_image(ours.model.components["vae_encoder"], larger).mean)
    else:
        mode = "bilinear" if upscaler == "latent" else "nearest"
        latents = torch.nn.functional.interpolate(torch.from_numpy(first.latents), size=(12, 9), mode=mode).numpy()
    second = record_ours(ours, PROMPT, steps=5, latents=latents, strength=0.4, sampler=sampler, guidance=4.0, seed=6)
    ours_again = both.latents[-len(second.latents) :]
    errors = [relative_l2(a, b) for a, b in zip(ours_again, second.latents, strict=True)]
    assert max(errors) <= 1e-5, errors
    check_pictures_near(both.pictures, second.pictures)


def test_a_batch_of_variations_has_the_noise_of_each_in_both_passes(ours: Pipeline) -> None:
    settings = {"variation_seed": 40, "variation_strength": 0.3, "steps": 2, "sampler": "Euler a", **SMALL}
    hires = Hires(scale=1.5, strength=0.8, steps=2)
    together = ours(PROMPT, batch=2, hires=hires, **settings)
    alone = ours(PROMPT, hires=hires, **{**settings, "variation_seed": 41})
    np.testing.assert_array_equal(together.latents[1], alone.latents[0])


@pytest.mark.parametrize(
    ("size", "scale", "wanted"),
    [((512, 512), 2.0, (1024, 1024)), ((64, 48), 1.3, (80, 64)), ((64, 64), 0.1, (8, 8)), ((64, 96), 1.0, (64, 96))],
)
def test_the_larger_size_is_a_multiple_of_8(size: tuple[int, int], scale: float, wanted: tuple[int, int]) -> None:
    assert larger_size(size, Hires(scale=scale), 8) == wanted


@pytest.mark.parametrize(
    ("hires", "others", "message"),
    [
        ({"scale": 0.0}, {}, r"hires.scale: expected a number above 0"),
        ({"scale": float("nan")}, {}, r"hires.scale"),
        ({"upscaler": "esrgan"}, {}, r"hires.upscaler: expected one of latent, latent-nearest, lanczos, got 'esrgan'"),
        ({"strength": 1.5}, {}, r"hires.strength"),
        ({"strength": float("nan")}, {}, r"hires.strength"),
        ({"strength": 0.1, "steps": 5}, {}, r"hires.strength: expected 0.2 to 1 with 5 steps, got 0.1"),
        ({"steps": 0}, {}, r"hires.steps: expected a whole number"),
        ({}, {"denoising_end": 0.8}, r"hires: expected none with denoising_end"),
        ({}, {"mask": np.zeros((8, 8)), "image": np.zeros((8, 8))}, r"hires: expected none with mask"),
    ],
)
def test_what_a_second_pass_cannot_do_is_found_before_the_first(
    hires: dict[str, Any], others: dict[str, Any], message: str, ours: Pipeline
) -> None:
    with watched(ours, "unet") as unet:
        with pytest.raises(UsageError, match=message):
            ours(PROMPT, steps=2, hires=Hires(**hires), **others)
        assert not unet.feeds


def test_no_second_pass_for_models_that_are_shown_a_picture(ours: Pipeline) -> None:
    facts = dataclasses.replace(ours.model.facts, unet_channels=9)
    with pytest.raises(UsageError, match="checkpoint for inpainting"):
        check_hires(Request(prompt=PROMPT), Hires(), facts)


def test_tiles_are_near_the_whole(ours: Pipeline) -> None:
    settings: dict[str, Any] = {"steps": 4, "sampler": "DPM++ 2M", "guidance": 4.0, "seed": 6}
    with watched(ours, "vae_decoder") as decoder:
        whole = ours(PROMPT, **settings)
        assert [feeds["latent_sample"].shape for feeds in decoder.feeds] == [(1, 4, 16, 16)]
    with watched(ours, "vae_decoder") as decoder:
        tiled = ours(PROMPT, tile=64, **settings)
        assert len(decoder.feeds) == 9
        assert {feeds["latent_sample"].shape for feeds in decoder.feeds} == {(1, 4, 8, 8)}
    np.testing.assert_array_equal(whole.latents, tiled.latents)
    mse = np.mean((whole.images.astype(float) - tiled.images) ** 2)
    assert mse > 0
    assert 10 * np.log10(255**2 / mse) > 25
    with watched(ours, "vae_decoder") as decoder:
        ours(PROMPT, tile=0, **settings)
        assert len(decoder.feeds) == 1


def test_an_image_is_encoded_in_tiles_too(ours: Pipeline) -> None:
    image = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    with watched(ours, "vae_encoder") as encoder:
        ours(PROMPT, image=image, tile=64, steps=2, decode=False)
        assert {feeds["sample"].shape for feeds in encoder.feeds} == {(1, 3, 64, 64)}


@pytest.mark.parametrize(("size", "tile"), [((1024, 1024), None), ((1024, 1032), 512), ((64, 64), None)])
def test_tiles_by_themselves_above_one_megapixel(size: tuple[int, int], tile: int | None, ours: Pipeline) -> None:
    tiling = ours.model.tiling(Request(prompt=PROMPT), size)
    assert (None if tiling is None else tiling.tile) == tile
    assert ours.model.tiling(Request(prompt=PROMPT, tile=0), size) is None


@pytest.mark.parametrize("tile", [65, -64, 8])
def test_a_tile_that_does_not_fit_is_refused(tile: int, ours: Pipeline) -> None:
    with pytest.raises(UsageError, match="tile: expected a positive multiple of 32"):
        ours(PROMPT, steps=1, tile=tile, **SMALL)


@pytest.mark.parametrize("sampler", ["DDIM", "Euler"])
@pytest.mark.parametrize("switch", [0.3, 0.5, 0.8])
def test_two_experts_that_are_one_draw_its_picture(sampler: str, switch: float, ours: Pipeline) -> None:
    """Samplers without memory: the second goes on from the first's latents as if nothing had been."""
    settings = {"steps": 6, "sampler": sampler, **SMALL}
    whole = record_ours(ours, PROMPT, **settings)
    steps: list[Array] = []
    both = base_and_refiner(ours, ours, PROMPT, switch=switch, on_step=lambda s: steps.append(s.latents), **settings)
    assert len(steps) == 6
    for found, wanted in zip(steps, whole.latents, strict=True):
        assert relative_l2(found, wanted) <= 1e-5
    check_pictures_near(both.images, whole.pictures)


def test_where_the_first_expert_ends_is_where_diffusers_ends(ours: Pipeline) -> None:
    """Steps at training timesteps of at least round(1000 - 1000 * denoising_end) are the first's: 201 for 0.799."""
    timesteps: list[float] = []
    ours(PROMPT, steps=10, sampler="DDIM", on_step=lambda s: timesteps.append(s.timestep), decode=False, **SMALL)
    for end in (0.25, 0.5, 0.799, 0.8, 0.95):
        cutoff = round(1000 - end * 1000)
        seen: list[float] = []
        noisy = ours(
            PROMPT, steps=10, sampler="DDIM", denoising_end=end, on_step=lambda s: seen.append(s.timestep),  # noqa: B023
            decode=False, **SMALL,
        )  # fmt: skip
        assert seen == [t for t in timesteps if t >= cutoff]
        rest: list[float] = []
        ours(
            PROMPT, steps=10, sampler="DDIM", denoising_start=end, latents=noisy.latents,
            on_step=lambda s: rest.append(s.timestep), decode=False, **SMALL,  # noqa: B023
        )  # fmt: skip
        assert rest == [t for t in timesteps if t < cutoff]


def test_an_end_with_an_image(ours: Pipeline) -> None:
    """Image to image that leaves its last steps to another model."""
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    settings = {"steps": 8, "image": image, "strength": 0.75, "sampler": "DDIM"}
    whole = record_ours(ours, PROMPT, **settings)
    part = record_ours(ours, PROMPT, denoising_end=0.75, decode=False, **settings)
    assert len(whole.latents) == 6
    assert len(part.latents) == 4
    for found, wanted in zip(part.latents, whole.latents[:4], strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"denoising_end": 0.0}, "denoising_end: expected a share"),
        ({"denoising_start": 0.5}, "latents: expected another run's beside denoising_start"),
        ({"denoising_end": 0.5, "mask": np.zeros((8, 8)), "image": np.zeros((8, 8, 3), np.uint8)}, "with a mask"),
        (
            {"latents": np.zeros((1, 4, 8, 8)), "image": np.zeros((64, 64, 3), np.uint8)},
            "expected none beside an image",
        ),
        ({"latents": np.zeros((2, 4, 8, 8))}, r"latents: expected finite numbers of shape \(1, 4, 8, 8\)"),
        ({"latents": np.full((1, 4, 8, 8), np.nan)}, "latents: expected finite"),
    ],
)
def test_shares_and_latents_that_do_not_fit(settings: dict[str, Any], message: str, ours: Pipeline) -> None:
    with pytest.raises((UsageError, BackendError), match=message):
        ours(PROMPT, steps=4, **settings)
