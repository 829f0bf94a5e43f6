"""Pictures: decoded samples to uint8, files with their parameters, digests, contact sheets."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BackendError, UsageError
from .manifest import write_atomic
from .picture_metadata import exif_block, text_chunks
from .specs import Array

Pictures = NDArray[np.uint8]

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Pixels along a side that the file format can count.
_LONGEST = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}


def to_uint8(sample: Array, *, name: str = "sample") -> Pictures:
    """Decoded samples (b, 3, h, w) in [-1, 1] to pictures (b, h, w, 3), rounded as diffusers rounds them.

    Args:
        name: of what decoded them, for the message.

    Raises:
        BackendError: a value is NaN or infinite. A cast would make it a black or white pixel and nobody the wiser.
    """
    floats = sample.astype(np.float32)
    check_finite(np.asarray(np.isfinite(floats).reshape(len(floats), -1).all(axis=1)), name=name)
    unit = np.clip(floats * np.float32(0.5) + np.float32(0.5), 0, 1)
    pictures: Pictures = np.rint(unit.transpose(0, 2, 3, 1) * np.float32(255)).astype(np.uint8)
    return pictures


def check_finite(finite: NDArray[np.bool_], *, name: str) -> None:
    """Refuse decoded pictures, of which `finite` says whether each has finite numbers only.

    Raises:
        BackendError: names the pictures that have not.
    """
    if not finite.all():
        raise BackendError(
            f"{name}: expected finite numbers, got NaN or infinity in picture {np.flatnonzero(~finite).tolist()} of "
            f"{len(finite)}. The usual cause is a VAE that overflows in fp16; decode with the VAE in fp32."
        )


def picture_digest(pixels: Pictures) -> str:
    """SHA-256 of a picture's shape and pixels, in hexadecimal: equal where two pictures are the same to the bit.

    Raises:
        UsageError: the pixels are not uint8.
    """
    if pixels.dtype != np.uint8:
        raise UsageError(f"picture: expected uint8, got {pixels.dtype}. Digest what to_uint8 returns.")
    shape = ",".join(map(str, pixels.shape))
    return hashlib.sha256(f"uint8[{shape}]".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def save_picture(
    path: Path,
    picture: Pictures,
    *,
    parameters: str | None = None,
    record: Mapping[str, Any] | None = None,
    quality: int = 95,
) -> None:
    """Write a picture (h, w, 3) atomically, as PNG, JPEG or WebP by its suffix; `encode_picture` has the rest.

    Raises:
        UsageError: another suffix, or as `encode_picture`.
        OSError: the folder is missing, not writable, or the disk is full.
    """
    form = picture_format(path)
    content = encode_picture(picture, form, parameters=parameters, record=record, quality=quality, name=str(path))
    write_atomic(path, content)


def encode_picture(
    picture: Pictures,
    form: str = "PNG",
    *,
    parameters: str | None = None,
    record: Mapping[str, Any] | None = None,
    quality: int = 95,
    name: str = "picture",
) -> bytes:
    """A picture (h, w, 3) as the bytes of a file. Equal input gives equal bytes.

    Args:
        form: PNG, JPEG or WEBP.
        parameters: the text that web UIs write and read; `infotext` makes it.
        record: a JSON object for machines. `read_metadata` gives both back.
        quality: of JPEG and of WebP, 1 to 100; PNG is lossless.
        name: of the file, for messages.

    Raises:
        UsageError: not a picture, larger than the format holds, a record that is no JSON, or more metadata than fits
            into a JPEG.
    """
    from PIL import Image

    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        raise UsageError(f"{name}: expected a uint8 picture (h, w, 3), got {picture.dtype} {picture.shape}.")
    if max(picture.shape) > _LONGEST[form]:
        raise UsageError(f"{name}: expected at most {_LONGEST[form]} pixels a side in {form}, got {picture.shape}.")
    if not 1 <= quality <= 100:
        raise UsageError(f"quality: expected 1 to 100, got {quality}.")
    options: dict[str, Any]
    if form == "PNG":
        options = {"pnginfo": text_chunks(parameters, record)}
    else:
        options = {"quality": quality, "exif": exif_block(parameters, record)}
        if form == "JPEG":
            _check_segment(name, options["exif"])
            # Full colour resolution where quality is asked for: halved, it smears the edges of saturated shapes.
            options["subsampling"] = 0 if quality >= 90 else 2
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format=form, **options)
    return buffer.getvalue()


def save_png(path: Path, picture: Pictures, *, parameters: str | None = None) -> None:
    """`save_picture` for a `.png` path, without a record."""
    save_picture(path, picture, parameters=parameters)


def picture_format(path: Path) -> str:
    """PNG, JPEG or WEBP, by the suffix.

    Raises:
        UsageError: another suffix, or none.
    """
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        raise UsageError(
            f"{path}: expected a file name ending in {', '.join(FORMATS)}, got {path.suffix or 'no ending'!r}."
        )
    return form


def _check_segment(name: str, exif: bytes) -> None:
    # A JPEG segment counts its own length in 16 bits, the two bytes of that number included.
    if len(exif) > 65533:
        raise UsageError(
            f"{name}: expected at most 65533 bytes of parameters and record in a JPEG, got {len(exif)}. "
            "Save as .png or .webp."
        )


def contact_sheet(pictures: Sequence[Pictures], *, columns: int, gap: int = 4) -> Pictures:
    """Pictures of one size in rows of `columns`, on white."""
    height, width, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet[row * (height + gap) :, column * (width + gap) :][:height, :width] = picture
    return sheet
