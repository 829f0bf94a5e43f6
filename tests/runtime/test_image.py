from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import load_image as diffusers_load_image
from PIL import Image

from latentrt.runtime.errors import ArtifactError, BackendError, UsageError
from latentrt.runtime.image import (
    Pictures,
    contact_sheet,
    encode_picture,
    picture_digest,
    save_picture,
    save_png,
    to_uint8,
)
from latentrt.runtime.pixels import load_image, load_mask, to_sample

# Taller, wider, odd, smaller and larger than what is asked for.
SHAPES = [(48, 64), (37, 101), (130, 67), (8, 8)]
SIZES = [None, (64, 40), (16, 120), (70, 45)]


def random_picture(shape: tuple[int, ...], *, seed: int = 0) -> Pictures:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_those_of_diffusers_image_processor(
    tmp_path: Path, shape: tuple[int, int], size: tuple[int, int] | None
) -> None:
    picture = Image.fromarray(random_picture((*shape, 3)))
    picture.save(tmp_path / "p.png")
    height, width = size or (None, None)
    expected = VaeImageProcessor().preprocess(diffusers_load_image(str(tmp_path / "p.png")), height, width).numpy()
    for source in (tmp_path / "p.png", str(tmp_path / "p.png"), picture, np.asarray(picture)):
        np.testing.assert_array_equal(to_sample(load_image(source, size=size)[None]), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
@pytest.mark.parametrize("binarize", [True, False])
def test_masks_are_those_of_diffusers_image_processor(
    shape: tuple[int, int], size: tuple[int, int] | None, mode: str, binarize: bool
) -> None:
    mask = Image.fromarray(random_picture((*shape, 3))).convert(mode)
    processor = VaeImageProcessor(do_normalize=False, do_binarize=binarize, do_convert_grayscale=True)
    # diffusers.utils.load_image makes masks RGB, and so do the pipelines' examples.
    expected = processor.preprocess(diffusers_load_image(mask), *(size or (None, None)))
    np.testing.assert_array_equal(load_mask(mask, size=size, binarize=binarize)[None, None], expected.numpy())


def test_other_multiples_cut_sizes_down() -> None:
    assert load_image(random_picture((70, 45, 3)), multiple=4).shape == (68, 44, 3)
    with pytest.raises(UsageError, match="size: expected at least 8 x 8 pixels, got 7 x 64"):
        load_image(random_picture((7, 64, 3)))
    with pytest.raises(UsageError, match="size: expected at least 8 x 8"):
        load_image(random_picture((64, 64, 3)), size=(64, -8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = random_picture((16, 24, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(upright).save(tmp_path / "p.png", exif=exif)
    loaded = load_image(tmp_path / "p.png")
    np.testing.assert_array_equal(loaded, np.asarray(diffusers_load_image(str(tmp_path / "p.png"))))
    assert (loaded.shape[0] > loaded.shape[1]) == (orientation >= 5)


def test_transparency_is_laid_on_a_background() -> None:
    colours = random_picture((8, 8, 3))
    alpha = np.zeros((8, 8, 1), np.uint8)
    alpha[:4] = 255
    picture = np.concatenate([colours, alpha], axis=2)
    expected = colours.copy()
    expected[4:] = 255
    np.testing.assert_array_equal(load_image(picture), expected)
    expected[4:] = (1, 2, 3)
    np.testing.assert_array_equal(load_image(picture, background=(1, 2, 3)), expected)
    expected[4:] = 0
    np.testing.assert_array_equal(load_mask(picture), load_mask(expected))
    picture[..., 3] = 255
    np.testing.assert_array_equal(load_image(picture), colours)


def test_palettes(tmp_path: Path) -> None:
    colours = np.repeat(np.repeat(random_picture((2, 2, 3)), 4, 0), 4, 1)
    palette = Image.fromarray(colours).quantize(4)
    palette.save(tmp_path / "p.gif")
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    np.testing.assert_array_equal(load_image(tmp_path / "p.gif"), colours)
    colours[:4, :4] = 255
    np.testing.assert_array_equal(load_image(tmp_path / "p.png"), colours)


def test_16_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    Image.fromarray(levels).save(tmp_path / "p.png")
    expected = np.rint(levels / 257).astype(np.uint8)
    np.testing.assert_array_equal(load_image(tmp_path / "p.png"), np.repeat(expected[..., None], 3, 2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_scale_are_refused(mode: str) -> None:
    with pytest.raises(UsageError, match=f"8 or 16 bits a channel, got Pillow's mode {mode}"):
        load_image(Image.new(mode, (8, 8)))


def test_cmyk_is_converted(tmp_path: Path) -> None:
    Image.fromarray(random_picture((16, 16, 3))).convert("CMYK").save(tmp_path / "p.jpg")
    expected = np.asarray(diffusers_load_image(str(tmp_path / "p.jpg")))
    np.testing.assert_array_equal(load_image(tmp_path / "p.jpg"), expected)


def test_arrays_of_every_kind() -> None:
    picture = random_picture((16, 16, 3))
    np.testing.assert_array_equal(load_image(picture.astype(np.float64) / 255), picture)
    np.testing.assert_array_equal(load_image(np.asfortranarray(picture)), picture)
    grey = np.repeat(picture[..., :1], 3, 2)
    np.testing.assert_array_equal(load_image(picture[..., 0]), grey)
    np.testing.assert_array_equal(load_image(picture[..., :1]), grey)
    mask = picture[..., 0] > 128
    np.testing.assert_array_equal(load_mask(mask), mask)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.full((8, 8, 3), -0.5), r"floats in \[0, 1\], got -0.5 to -0.5"),
        (np.full((8, 8, 3), np.nan), r"floats in \[0, 1\], got nan"),
        (np.full((8, 8, 3), 255.0), r"floats in \[0, 1\], got 255"),
        (np.zeros((8, 8, 3), np.int64), "uint8 or floats"),
        (np.zeros((3, 8, 8), np.uint8), r"an array \(h, w\)"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"an array \(h, w\)"),
        (np.zeros((0, 8, 3), np.uint8), r"an array \(h, w\)"),
        (b"bytes", "a path, an array or a Pillow image, got bytes"),
        (None, "a path, an array or a Pillow image, got NoneType"),
    ],
)
def test_what_is_no_picture_is_refused(source: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_image(source)


def test_a_file_that_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_text("text")
    with pytest.raises(ArtifactError, match=r"p\.png: expected a picture \(PNG, JPEG, .*\), got something else"):
        load_image(tmp_path / "p.png")


@pytest.mark.parametrize("pictures", [np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3), np.float32)])
def test_to_sample_takes_uint8_batches(pictures: Any) -> None:
    with pytest.raises(UsageError, match=r"pictures: expected uint8 \(b, h, w, 3\)"):
        to_sample(pictures)


def test_to_uint8_is_diffusers_postprocess_and_undoes_to_sample() -> None:
    sample = np.random.default_rng(0).uniform(-1.2, 1.2, (2, 3, 40, 24)).astype(np.float32)
    expected = VaeImageProcessor().postprocess(torch.from_numpy(sample), output_type="pil")
    np.testing.assert_array_equal(to_uint8(sample), np.stack([np.asarray(image) for image in expected]))
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    np.testing.assert_array_equal(to_uint8(to_sample(levels)), levels)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_to_uint8_refuses_what_is_not_finite(value: float) -> None:
    sample = np.zeros((3, 3, 8, 8), np.float32)
    sample[1, 2, 3, 4] = value
    with pytest.raises(BackendError, match=r"got NaN or infinity in picture \[1\] of 3"):
        to_uint8(sample)


def test_digest_is_of_shape_and_pixels() -> None:
    picture = random_picture((8, 6, 3))
    changed = picture.copy()
    changed[7, 5, 2] ^= 1
    others = [changed, picture.reshape(6, 8, 3), picture[::-1]]
    digests = {picture_digest(image) for image in [picture, *others]}
    assert len(digests) == 4
    assert picture_digest(np.asfortranarray(picture)) in digests
    # The digest is in files that people keep: it may not change.
    black = picture_digest(np.zeros((2, 3, 3), np.uint8))
    assert black == "d1a0c65599c7c0f78c658d22008f243d645615ab56c1a6c075b95d5d44f84963"
    with pytest.raises(UsageError, match="expected uint8, got float64"):
        picture_digest(np.zeros((2, 3, 3)))  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_pixels_survive_saving(tmp_path: Path, suffix: str) -> None:
    # Smooth, as pictures are: noise is what JPEG and WebP leave out.
    ramp = np.linspace(0, 255, 48).astype(np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], ramp[::-1, None]), axis=2)
    save_picture(tmp_path / f"p{suffix}", picture, quality=95)
    loaded = load_image(tmp_path / f"p{suffix}").astype(int)
    assert np.abs(loaded - picture).max() <= (0 if suffix.lower() == ".png" else 12)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_encoded_pictures_are_what_files_hold(tmp_path: Path, form: str) -> None:
    picture = random_picture((16, 24, 3))
    told: dict[str, Any] = {"parameters": "a castle", "record": {"seed": 1}, "quality": 80}
    save_picture(tmp_path / f"p.{form.lower()}", picture, **told)
    content = encode_picture(picture, form, **told)
    assert content == (tmp_path / f"p.{form.lower()}").read_bytes()
    assert Image.open(io.BytesIO(content)).size == (24, 16)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_quality_is_size(tmp_path: Path, suffix: str) -> None:
    sizes = []
    for quality in (10, 80, 95):
        save_picture(tmp_path / f"p{suffix}", random_picture((64, 64, 3)), quality=quality)
        sizes.append((tmp_path / f"p{suffix}").stat().st_size)
    assert sizes == sorted(set(sizes))


def test_save_png_writes_parameters(tmp_path: Path) -> None:
    picture = random_picture((8, 8, 3))
    save_png(tmp_path / "p.png", picture, parameters="a castle")
    with Image.open(tmp_path / "p.png") as png:
        assert png.info == {"parameters": "a castle"}
        np.testing.assert_array_equal(np.asarray(png), picture)


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("p.gif", (8, 8, 3), {}, r"ending in \.png, \.jpg, \.jpeg, \.webp, got '\.gif'"),
        ("p", (8, 8, 3), {}, "got 'no ending'"),
        ("p.png", (8, 8, 4), {}, r"expected a uint8 picture \(h, w, 3\)"),
        ("p.png", (1, 8, 8, 3), {}, r"expected a uint8 picture \(h, w, 3\)"),
        ("p.png", (0, 8, 3), {}, r"expected a uint8 picture \(h, w, 3\)"),
        ("p.webp", (1, 16384, 3), {}, "at most 16383 pixels a side in WEBP"),
        ("p.jpg", (65501, 1, 3), {}, "at most 65500 pixels a side in JPEG"),
        ("p.jpg", (8, 8, 3), {"quality": 0}, "quality: expected 1 to 100"),
        ("p.jpg", (8, 8, 3), {"quality": float("nan")}, "quality: expected 1 to 100"),
    ],
)
def test_what_cannot_be_saved(
    tmp_path: Path, name: str, shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        save_picture(tmp_path / name, np.zeros(shape, np.uint8), **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        save_picture(tmp_path / "none" / "p.png", random_picture((8, 8, 3)))


def test_contact_sheet() -> None:
    pictures = [np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = contact_sheet(pictures, columns=2, gap=1)
    expected = np.array([[10] * 3 + [255] + [20] * 3] * 2 + [[255] * 7] + [[30] * 3 + [255] * 4] * 2)
    np.testing.assert_array_equal(sheet, np.repeat(expected[..., None], 3, 2))


def test_pillow_is_imported_when_a_file_is_handled_and_not_before() -> None:
    modules = "image, infotext, latent_preview, latents, picture_metadata, pixels, vae_tiling"
    code = f"import sys; from latentrt.runtime import {modules}; sys.exit('PIL' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
