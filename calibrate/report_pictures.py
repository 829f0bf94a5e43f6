"""The pictures of a report: which prompts are shown, and how far their pictures have moved."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from latentrt.runtime.image import Pictures

from .pictures import REFERENCE, read_picture
from .verification import FLOOR, Verification

# Of the prompts in the order of their pictures' PSNR, from the worst to the best.
_PLACES = (0.0, 0.05, 0.25, 0.5, 0.75, 1.0)
_LARGEST_SIDE = 512
_MOST = 64


def shown_prompts(verification: Verification) -> list[tuple[int, str]]:
    """Prompts to show, and where each stands: the worst of all, quartiles, the best; fewer if there are fewer."""
    values = np.array(verification.measured[verification.tested].metrics["psnr"].values)
    order = np.argsort(values, kind="stable")
    names = ("worst", "worst 5 %", "lower quarter", "middle", "upper quarter", "best")
    chosen: dict[int, str] = {}
    for place, name in zip(_PLACES, names, strict=True):
        chosen.setdefault(int(order[round(place * (len(order) - 1))]), name)
    return list(chosen.items())


def amplification(moved: np.ndarray[tuple[int, ...], np.dtype[np.int16]]) -> int:
    """By how much absolute differences are multiplied: the largest power of two that clips no more than 0.5 %."""
    largest = max(1.0, float(np.quantile(moved, 0.995)))
    return int(min(2 ** np.floor(np.log2(255 / largest)), _MOST))


def difference(reference: Pictures, picture: Pictures) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    """Signed difference of two pictures (h, w, 3)."""
    return picture.astype(np.int16) - reference.astype(np.int16)


def picture_row(folder: Path, verification: Verification, index: int) -> Mapping[str, str]:
    """Data URIs of a prompt's pictures and of their differences from the reference, by their captions in order.

    All differences of a row are multiplied alike, by what suits those of the tested precision.
    """
    reference = read_picture(folder / REFERENCE, index)
    row = {REFERENCE: data_uri(reference)}
    tested = dict.fromkeys((FLOOR, verification.tested))
    pictures = {name: read_picture(folder / name, index) for name in tested}
    row |= {name: data_uri(picture) for name, picture in pictures.items()}
    factor = amplification(np.abs(difference(reference, pictures[verification.tested])))
    for name, picture in pictures.items():
        moved = np.abs(difference(reference, picture)) * factor
        row[f"{name} less {REFERENCE}, {factor} times"] = data_uri(np.minimum(moved, 255).astype(np.uint8))
    return row


def data_uri(picture: Pictures) -> str:
    """A picture (h, w, 3) as a PNG in a URI; large ones are averaged down to 512 pixels a side or less."""
    from PIL import Image

    image = Image.fromarray(picture)
    image = image.reduce(-(-max(image.size) // _LARGEST_SIDE))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
