"""Pictures: decoded samples to uint8, PNG files with their parameters, contact sheets."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .manifest import write_atomic
from .specs import Array

Pictures = NDArray[np.uint8]


def to_uint8(sample: Array) -> Pictures:
    """Decoded samples (b, 3, h, w) in [-1, 1] to pictures (b, h, w, 3), rounded as diffusers rounds them."""
    unit = np.clip(sample.astype(np.float32) * np.float32(0.5) + np.float32(0.5), 0, 1)
    pictures: Pictures = np.rint(unit.transpose(0, 2, 3, 1) * np.float32(255)).astype(np.uint8)
    return pictures


def save_png(path: Path, picture: Pictures, *, parameters: str | None = None) -> None:
    """Write a picture (h, w, 3) atomically; `parameters` goes into the text chunk that web UIs read.

    Raises:
        OSError: the folder is missing, not writable, or the disk is full.
    """
    info = PngInfo()
    if parameters:
        info.add_itxt("parameters", parameters)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", pnginfo=info)
    write_atomic(path, buffer.getvalue())


def contact_sheet(pictures: Sequence[Pictures], *, columns: int, gap: int = 4) -> Pictures:
    """Pictures of one size in rows of `columns`, on white."""
    height, width, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet[row * (height + gap) :, column * (width + gap) :][:height, :width] = picture
    return sheet
