from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch_vae import Floats, decoder, encoder, scene_pictures, shapes_vae

from latentrt.runtime.errors import UsageError
from latentrt.runtime.latents import decode_latents, encode_image
from latentrt.runtime.pixels import to_sample
from latentrt.runtime.vae_tiling import Tiling, auto_tile, decode_tiled, encode_tiled

# Latents of 64 px tiles: whole tiles, a thin last tile, one side that fits, one tile, a hair more than one.
SIZES = [(24, 40), (25, 33), (20, 6), (8, 8), (9, 8)]


@pytest.fixture
def tiled_vae() -> Any:
    """diffusers' VAE with its own tiling at 64 px; its sessions here are taken before that is switched on."""
    vae = shapes_vae()
    sizes = vae.tile_sample_min_size, vae.tile_latent_min_size
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    yield vae
    vae.disable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = sizes


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_diffusers_blend_decodes_to_what_diffusers_tiling_gives(tiled_vae: Any, height: int, width: int) -> None:
    latents = np.random.default_rng(height).standard_normal((2, 4, height, width)).astype(np.float32) * 3
    tiled = decode_tiled(decoder(), latents, Tiling(64, "diffusers"))
    tiled_vae.enable_tiling()
    with torch.no_grad():
        expected = tiled_vae.decode(torch.from_numpy(latents), return_dict=False)[0].numpy()
    # The same operations in the same order; another processor may fuse a multiplication and an addition.
    np.testing.assert_allclose(tiled, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_diffusers_blend_encodes_to_what_diffusers_tiling_gives(tiled_vae: Any, height: int, width: int) -> None:
    shape = (1, 3, height * 8, width * 8)
    sample = np.random.default_rng(height).uniform(-1, 1, shape).astype(np.float32)
    tiled = encode_tiled(encoder(), sample, Tiling(64, "diffusers"))
    tiled_vae.enable_tiling()
    with torch.no_grad():
        expected = tiled_vae.encode(torch.from_numpy(sample)).latent_dist.parameters.numpy()
    np.testing.assert_allclose(tiled, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("blend", ["smooth", "diffusers"])
@pytest.mark.parametrize(("height", "width"), [*SIZES, (15, 70)])
def test_blending_tiles_that_agree_changes_nothing(blend: Any, height: int, width: int) -> None:
    """Of a decoder without context every tile is the whole picture's part, so weights must sum to one everywhere."""

    class Enlarge:
        spec, backend = decoder().spec, "numpy"

        def __call__(self, feeds: Any) -> Any:
            return {"sample": feeds["latent_sample"].repeat(8, axis=2).repeat(8, axis=3)}

        def close(self) -> None:
            """Nothing to give back."""

    latents = np.random.default_rng(0).standard_normal((1, 3, height, width)).astype(np.float32)
    tiled = decode_tiled(Enlarge(), latents, Tiling(64, blend))
    np.testing.assert_allclose(tiled, latents.repeat(8, axis=2).repeat(8, axis=3), rtol=0, atol=1e-6)


def test_smooth_leaves_neither_a_step_nor_a_crease() -> None:
    """Between a black and a white tile the slope changes by at most 6 / n^2 a pixel, that of a smoothstep of n pixels.

    A straight ramp changes it by 1 / n in one place, which shows as a line.
    """

    class Shades:
        spec, backend = decoder().spec, "numpy"

        def __call__(self, feeds: Any) -> Any:
            tile = feeds["latent_sample"]
            return {"sample": np.full((1, 3, 64, 64), tile[0, 0, 0, 0] > 0, np.float32)}

        def close(self) -> None:
            """Nothing to give back."""

    latents = np.broadcast_to(np.arange(14, dtype=np.float32), (1, 4, 8, 14))
    row = decode_tiled(Shades(), latents, Tiling(64))[0, 0, 0]
    assert row[0] == 0
    assert row[-1] == 1
    assert np.abs(np.diff(row, n=2)).max() <= 6 / 16**2 * 1.01


def test_smooth_runs_one_tile_at_a_time_all_of_one_size() -> None:
    session = decoder()
    latents = np.random.default_rng(0).standard_normal((1, 4, 33, 25)).astype(np.float32)
    decode_tiled(session, latents, Tiling(64))
    assert set(session.shapes) == {(1, 4, 8, 8)}
    # (33 - 2) / 6 and (25 - 2) / 6 rounded up; diffusers takes 6 x 5 here, with edge tiles 3 and 1 latents thin.
    assert len(session.shapes) == 6 * 4
    session.shapes.clear()
    decode_tiled(session, latents, Tiling(64, "diffusers"))
    assert len(session.shapes) == 6 * 5
    assert {shape[3] for shape in session.shapes} == {8, 7, 1}


def line_gradient(values: Floats, axis: int) -> Floats:
    """Mean absolute difference across each line between neighbouring rows or columns."""
    return np.asarray(np.abs(np.diff(values, axis=axis)).mean(axis=tuple(k for k in range(4) if k != axis)))


def seam_factor(error: Floats, lines: list[int]) -> float:
    """How much steeper the error is across the seam lines than across the others, borders left out."""
    factors = []
    for axis in (2, 3):
        gradient = line_gradient(error, axis)
        others = np.ones(len(gradient), bool)
        others[[*lines, *range(8), *range(-8, 0)]] = False
        factors.append(float(gradient[lines].max() / gradient[others].mean()))
    return max(factors)


@pytest.mark.parametrize("blend", ["smooth", "diffusers"])
def test_seams_do_not_show(blend: Any) -> None:
    """The error against the untiled picture is no steeper at the seams than elsewhere by more than a small factor.

    A picture four times the training size: tiles of the trained size, and group norms and attention that differ in
    each. Measured factors: 0.6 smooth, 2.1 diffusers, 23 for tiles set side by side; tiled against untiled 44 and 43
    dB.
    """
    scene = Image.fromarray(scene_pictures(1, seed=3)[0]).resize((256, 256), Image.Resampling.BICUBIC)
    latents = np.split(encoder()({"sample": to_sample(np.asarray(scene)[None])})["latent_parameters"], 2, axis=1)[0]
    whole = decoder()({"latent_sample": latents})["sample"].clip(-1, 1)
    tiled = decode_tiled(decoder(), latents, Tiling(128, blend)).clip(-1, 1)
    # Where overlaps begin and end: tiles of 16 latents at 0, 8, 16 (smooth) or 0, 12, 24 (diffusers).
    seams = [63, 127, 191] if blend == "smooth" else [95, 127, 191, 223]
    blended = seam_factor(tiled - whole, seams)
    quarters = [
        decoder()({"latent_sample": np.ascontiguousarray(part)})["sample"].clip(-1, 1) for part in _quarters(latents)
    ]
    set_side_by_side = np.block([[quarters[0], quarters[1]], [quarters[2], quarters[3]]])
    cut = seam_factor(set_side_by_side - whole, [127])
    assert blended < 3.5
    assert cut > 3 * blended
    assert 10 * np.log10(4 / np.mean((tiled - whole) ** 2)) > 35


def _quarters(latents: Floats) -> list[Floats]:
    return [latents[:, :, i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16)]


def test_auto_tile_is_on_above_one_megapixel() -> None:
    assert auto_tile(1024, 1024) is None
    assert auto_tile(1024, 1032) == Tiling(512)
    assert auto_tile(2048, 1024, factor=4) == Tiling(512, factor=4)
    assert auto_tile(2048, 2048, tile=0) is None
    assert auto_tile(64, 64, tile=64) == Tiling(64)


@pytest.mark.parametrize("tile", [0, -32, 40, 16])
def test_tile_must_be_a_multiple_of_four_latents(tile: int) -> None:
    with pytest.raises(UsageError, match="tile: expected a positive multiple of 32"):
        Tiling(tile)


def test_blend_must_be_known() -> None:
    with pytest.raises(UsageError, match="smooth or diffusers"):
        Tiling(64, "linear")  # type: ignore[arg-type]


def test_odd_sample_is_refused() -> None:
    with pytest.raises(UsageError, match="multiples of 8"):
        encode_tiled(encoder(), np.zeros((1, 3, 100, 64), np.float32), Tiling(64))


def test_decode_latents_and_encode_image_tile() -> None:
    pictures = scene_pictures(2)
    tiling = Tiling(64)
    distribution = encode_image(encoder(), pictures, tiling=tiling)
    expected = encode_tiled(encoder(), to_sample(pictures), tiling)
    # One picture or two in a call may change the last bit of a sum.
    np.testing.assert_allclose(distribution.mean, expected[:, :4], rtol=0, atol=1e-5)
    decoded = decode_latents(decoder(), distribution.mean * np.float32(0.25), scaling_factor=0.25, tiling=tiling)
    assert decoded.shape == pictures.shape
    error = decoded.astype(float) - pictures
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 20
