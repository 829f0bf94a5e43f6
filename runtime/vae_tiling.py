"""Decoding and encoding large pictures tile by tile, so that memory depends on the tile and not on the picture.

A VAE sees a whole picture at once: its middle attention and its group norms mix all of it. Tiles therefore come out
slightly different where they overlap, and are blended there. Two ways:

`smooth` places as few tiles of one size as cover the picture with a quarter overlap or more, and blends them with
weights of zero slope at the ends of the overlap, so that neither a step nor a crease shows. One size also means that
an engine needs one shape.

`diffusers` is AutoencoderKL's own tiling (`enable_vae_tiling`), to the rounding of float32: tiles at a fixed stride,
those at the right and lower edge as thin as what is left, blended along straight lines from the left and from above.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .specs import Session

Floats = NDArray[np.float32]
Blend = Literal["smooth", "diffusers"]

TILE = 512
OVERLAP = 0.25
_ONE_MEGAPIXEL = 1024 * 1024


@dataclass(frozen=True)
class Tiling:
    """How to cut a picture into tiles.

    Attributes:
        tile: side of a tile in pixels, a multiple of four latents.
        blend: `smooth`, or `diffusers` for the picture that diffusers' tiling gives.
        factor: pixels per latent along a side.
    """

    tile: int = TILE
    blend: Blend = "smooth"
    factor: int = 8

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UsageError: the tile is not a positive multiple of four latents, or no such blend.
        """
        step = 4 * self.factor
        if self.tile < step or self.tile % step:
            lower = max(step, self.tile // step * step)
            raise UsageError(
                f"tile: expected a positive multiple of {step} pixels, got {self.tile}. Use {lower} or {lower + step}."
            )
        if self.blend not in ("smooth", "diffusers"):
            raise UsageError(f"blend: expected smooth or diffusers, got {self.blend!r}.")


def auto_tile(height: int, width: int, *, tile: int | None = None, factor: int = 8) -> Tiling | None:
    """How to tile a picture of that many pixels: not at all up to 1024 x 1024, above it with tiles of 512.

    Args:
        tile: side of the tiles in pixels whatever the picture's size; 0 for none.

    Raises:
        UsageError: the tile is not a multiple of four latents.
    """
    if tile is None:
        tile = TILE if height * width > _ONE_MEGAPIXEL else 0
    return Tiling(tile, factor=factor) if tile else None


def decode_tiled(session: Session, latents: Floats, tiling: Tiling) -> Floats:
    """Samples (b, 3, h, w) of unscaled latents (b, c, h/f, w/f), one tile in memory at a time.

    Raises:
        BackendError: the backend failed.
    """
    return _run(
        lambda tile: session({"latent_sample": tile})["sample"].astype(np.float32), latents, tiling, decode=True
    )


def encode_tiled(session: Session, sample: Floats, tiling: Tiling) -> Floats:
    """Latent parameters (b, 2c, h/f, w/f) of samples (b, 3, h, w) in [-1, 1], one tile in memory at a time.

    Raises:
        BackendError: the backend failed.
        UsageError: height or width is not a multiple of the factor.
    """
    if sample.shape[2] % tiling.factor or sample.shape[3] % tiling.factor:
        raise UsageError(f"sample: expected multiples of {tiling.factor} pixels, got {sample.shape}.")
    return _run(
        lambda tile: session({"sample": tile})["latent_parameters"].astype(np.float32), sample, tiling, decode=False
    )


def _run(run: Callable[[Floats], Floats], source: Floats, tiling: Tiling, *, decode: bool) -> Floats:
    """Tiles through `run`; positions and sizes count in latents, `scale` is what one latent is on either side."""
    scale_in, scale_out = (1, tiling.factor) if decode else (tiling.factor, 1)
    height, width = source.shape[2] // scale_in, source.shape[3] // scale_in
    tile = tiling.tile // tiling.factor
    if height <= tile and width <= tile:
        return run(np.ascontiguousarray(source))

    def piece(top: int, left: int) -> Floats:
        rows = slice(top * scale_in, (top + tile) * scale_in)
        columns = slice(left * scale_in, (left + tile) * scale_in)
        return run(np.ascontiguousarray(source[:, :, rows, columns]))

    blend = _blend_smooth if tiling.blend == "smooth" else _blend_diffusers
    return blend(piece, height, width, tile, scale_out)


def _blend_smooth(piece: Callable[[int, int], Floats], height: int, width: int, tile: int, scale: int) -> Floats:
    """The sum of the tiles, each times its weight."""
    tops, row_weights = _placed(height, tile, scale)
    lefts, column_weights = _placed(width, tile, scale)
    total = np.zeros(0, np.float32)
    for top, down in zip(tops, row_weights, strict=True):
        for left, across in zip(lefts, column_weights, strict=True):
            part = piece(top, left)
            if not total.size:
                total = np.zeros((*part.shape[:2], height * scale, width * scale), np.float32)
            part *= down[:, None] * across
            total[:, :, top * scale :, left * scale :][:, :, : part.shape[2], : part.shape[3]] += part
    return total


def _placed(length: int, tile: int, scale: int) -> tuple[list[int], list[Floats]]:
    """Where tiles start along a side, and the weights of each, which sum to one everywhere."""
    tile = min(tile, length)
    overlap = int(tile * OVERLAP)
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(index * (length - tile) / max(1, count - 1)) for index in range(count)]
    weights = []
    for index, start in enumerate(starts):
        weight = np.ones(tile * scale)
        if index > 0:
            shared = (starts[index - 1] + tile - start) * scale
            weight[:shared] *= _ramp(shared)
        if index + 1 < count:
            shared = (start + tile - starts[index + 1]) * scale
            weight[-shared:] *= 1 - _ramp(shared)
        weights.append(weight)
    # Where the last tile is moved back far, three tiles lie over one another and their ramps do not add up to one.
    total = np.zeros(length * scale)
    for start, weight in zip(starts, weights, strict=True):
        total[start * scale :][: tile * scale] += weight
    spans = [total[start * scale :][: tile * scale] for start in starts]
    return starts, [(weight / span).astype(np.float32) for weight, span in zip(weights, spans, strict=True)]


def _ramp(length: int) -> NDArray[np.float64]:
    """Smoothstep from 0 to 1, at the middles of `length` pixels."""
    x = (np.arange(length) + 0.5) / length
    return np.asarray(x * x * (3 - 2 * x))


def _blend_diffusers(piece: Callable[[int, int], Floats], height: int, width: int, tile: int, scale: int) -> Floats:
    """AutoencoderKL.tiled_decode and tiled_encode of diffusers, keeping only the strips that later tiles blend with.

    A tile is blended with the lower strip of the tile above and then with the right strip of the tile before, each as
    it was left by its own blending: in the corners the tile above counts twice, and that is part of the picture.
    """
    stride, extent = tile * 3 // 4, tile * scale // 4
    keep = tile * scale - extent
    rows: list[Floats] = []
    above: list[Floats] = []
    for top in range(0, height, stride):
        row: list[Floats] = []
        strips: list[Floats] = []
        before: Floats | None = None
        for index, left in enumerate(range(0, width, stride)):
            part = piece(top, left)
            if above:
                _fade(above[index], part, extent, axis=2)
            if before is not None:
                _fade(before, part, extent, axis=3)
            strips.append(part[:, :, -extent:].copy())
            before = part[:, :, :, -extent:].copy()
            row.append(part[:, :, :keep, :keep].copy())
        above = strips
        rows.append(np.concatenate(row, axis=3))
    return np.concatenate(rows, axis=2)


def _fade(earlier: Floats, later: Floats, extent: int, *, axis: int) -> None:
    """Blend the end of `earlier` into the start of `later`, in place, along a straight line that begins at 0."""
    extent = min(earlier.shape[axis], later.shape[axis], extent)
    share = (np.arange(extent) / extent).astype(np.float32)
    shape = [1] * later.ndim
    shape[axis] = extent
    share = share.reshape(shape)
    before = (slice(None),) * axis
    start = (*before, slice(0, extent))
    end = (*before, slice(earlier.shape[axis] - extent, None))
    later[start] = earlier[end] * (1 - share) + later[start] * share
