"""Pictures that go into a pipeline: files, arrays and Pillow images to pixels, masks and VAE samples.

Sizes, filters and rounding are those of diffusers' `VaeImageProcessor`: Lanczos through Pillow, sizes cut down to
multiples of the VAE's factor. Two things differ, because there pixels that nobody sees decide the outcome: a picture
with transparency is laid on a background (diffusers drops the alpha channel and keeps what is hidden under it), and 16
bits per channel are scaled to 8 (Pillow's own conversion clips them).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .image import Pictures
from .picture_metadata import read_picture
from .specs import Array

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

    Source = str | Path | Array | PilImage

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def load_image(
    source: Source,
    *,
    size: tuple[int, int] | None = None,
    multiple: int = 8,
    background: tuple[int, int, int] = WHITE,
) -> Pictures:
    """A picture (h, w, 3) uint8, upright.

    Args:
        source: a file, an array (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) of uint8 or of floats in [0, 1], or a Pillow
            image.
        size: height and width to scale to, whatever the aspect; default the picture's own. Both are cut down to a
            multiple of `multiple`.
        background: colour under transparent pixels.

    Raises:
        ArtifactError: the file is missing, is no picture, or is damaged.
        UsageError: an array of another shape, dtype or range, a mode without a scale (float, 32 bits), or no size.
    """
    picture = _upright(source)
    # A copy, since what Pillow lends is read-only.
    return np.array(_scaled(_to_rgb(picture, background), size, multiple))


def load_mask(
    source: Source, *, size: tuple[int, int] | None = None, multiple: int = 8, binarize: bool = True
) -> NDArray[np.float32]:
    """A mask (h, w) float32, 1 where the picture is to be drawn anew: its brightness, with transparency as black.

    Args:
        source, size: as in `load_image`; booleans are an array's third dtype.
        binarize: 0 below one half and 1 from there on, as the diffusers pipelines do; otherwise shades stay.

    Raises:
        ArtifactError, UsageError: as in `load_image`.
    """
    grey = _scaled(_to_rgb(_upright(source), BLACK), size, multiple).convert("L")
    mask = np.asarray(grey).astype(np.float32) / np.float32(255)
    return (mask >= 0.5).astype(np.float32) if binarize else mask


def to_sample(pictures: Pictures) -> NDArray[np.float32]:
    """Pictures (b, h, w, 3) uint8 to what the VAE encoder takes: (b, 3, h, w) in [-1, 1].

    Raises:
        UsageError: another shape or dtype.
    """
    if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8:
        raise UsageError(f"pictures: expected uint8 (b, h, w, 3), got {pictures.dtype} {pictures.shape}.")
    unit = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)
    return np.float32(2) * unit - np.float32(1)


def _upright(source: Source) -> PilImage:
    """The source as a Pillow image, turned as its EXIF orientation says."""
    from PIL import Image, ImageOps

    if isinstance(source, str | Path):
        picture = read_picture(Path(source), formats=FORMATS)
    elif isinstance(source, Image.Image):
        picture = source
    elif isinstance(source, np.ndarray):
        return _from_array(source)
    else:
        raise UsageError(f"picture: expected a path, an array or a Pillow image, got {type(source).__name__}.")
    return _to_eight_bits(ImageOps.exif_transpose(picture), picture.format)


def _from_array(array: Array) -> PilImage:
    from PIL import Image

    if not array.size or array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise UsageError(f"picture: expected an array (h, w), (h, w, 1), (h, w, 3) or (h, w, 4), got {array.shape}.")
    values: NDArray[np.generic] = array
    if array.dtype.kind in "fb":
        floats = array.astype(np.float32)
        if not (floats.min() >= 0 and floats.max() <= 1):
            raise UsageError(
                f"picture: expected floats in [0, 1], got {floats.min():g} to {floats.max():g}. "
                "From [-1, 1], take x / 2 + 0.5."
            )
        values = np.rint(floats * np.float32(255)).astype(np.uint8)
    if values.dtype != np.uint8:
        raise UsageError(f"picture: expected uint8 or floats in [0, 1], got {array.dtype}.")
    shape = values.shape[:2] if values.size == values.shape[0] * values.shape[1] else values.shape
    return Image.fromarray(np.ascontiguousarray(values).reshape(shape))


def _to_eight_bits(picture: PilImage, form: str | None) -> PilImage:
    from PIL import Image

    # Older versions of Pillow open a grey PNG of 16 bits in the mode of 32.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and form == "PNG"):
        # Pillow's convert() would clip at 255 what has 65535 levels.
        return Image.fromarray(np.rint(np.asarray(picture).astype(np.float64) / 257).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise UsageError(f"picture: expected 8 or 16 bits a channel, got Pillow's mode {picture.mode}. Save it with 8.")
    return picture


def _to_rgb(picture: PilImage, background: tuple[int, int, int]) -> PilImage:
    from PIL import Image

    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    if layer.getchannel("A").getextrema() == (255, 255):
        return layer.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (*background, 255)), layer).convert("RGB")


def _scaled(picture: PilImage, size: tuple[int, int] | None, multiple: int) -> PilImage:
    from PIL import Image

    height, width = size or (picture.height, picture.width)
    wanted = (width - width % multiple, height - height % multiple)
    if min(wanted) < 1:
        raise UsageError(f"size: expected at least {multiple} x {multiple} pixels, got {height} x {width}.")
    return picture if picture.size == wanted else picture.resize(wanted, Image.Resampling.LANCZOS)
