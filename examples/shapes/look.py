"""Look at a picture of one coloured shape and say what it shows.

No learning is involved: colours are compared in OKLab and shapes by their overlap with drawn templates, so what is
said of a model's pictures does not depend on anything that was trained. The order is: background from the frame,
object as what stands out from it, colour from the object's inside, shape, size and place from the best template.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from PIL import Image
from scenes import COLOURS, OFFSETS, PLACES, SHAPES, SIZE, SIZES, Scene, draw

Levels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]

BORDER = 5  # pixels of the frame whose commonest colour is the background
MIN_AREA = 60  # pixels; the smallest shape of the data set has about 300
# What small drawings keep that were blurred, noisy and compressed all at once: the same error of the outline costs
# a slender shape more of its area. Half of a shape reaches at most 0.69, a circle without a slice of 1/8 0.87.
MIN_SHAPE_IOU = {"circle": 0.87, "square": 0.87, "triangle": 0.82, "star": 0.75, "cross": 0.8, "ring": 0.8}
MIN_COLOUR_SHARE = 0.7  # of the object's, or the ground's, pixels that have its colour
MAX_STRAY = 0.05  # area of further objects, relative to the object's
MIN_CONTRAST = 40.0  # RGB levels; the two nearest colours, orange and yellow, lie 85 apart
CELLS = 48  # a template's side
REACH = 24 / 19  # half of a template's side in radii: more than any shape extends


@dataclass(frozen=True)
class Sighting:
    """What a picture shows; None where nothing, or nothing clear enough to name, was found.

    Attributes:
        shape_iou: Overlap (intersection over union) of what stands out from the background with the best template.
        shape_margin: `shape_iou` less that of the second best shape.
        colour_share: Share of the object's inside that has `colour`.
        background_share: Share of what lies outside the object that has the background's colour.
        stray: Area of things apart from the object, relative to the object's.
        radius: Fitted radius in pixels of a picture of 128.
        centre: Fitted middle (x, y) in pixels of a picture of 128.
    """

    shape: str | None
    colour: str | None
    background: str | None
    size: str | None
    place: str | None
    shape_iou: float = 0.0
    shape_margin: float = 0.0
    colour_share: float = 0.0
    background_share: float = 0.0
    stray: float = 0.0
    radius: float | None = None
    centre: tuple[float, float] | None = None

    def __str__(self) -> str:
        """One line of words."""
        ground = f"{self.background or 'unclear'} background"
        if self.radius is None:
            return f"nothing on a {ground}"
        thing = f"{self.size} {self.colour or 'unclear-coloured'} {self.shape or 'unclear shape'}"
        return f"{thing}, {ground}, {self.place} (shape IoU {self.shape_iou:.2f})"


def oklab(rgb: Levels) -> Floats:
    """SRGB levels (..., 3) as OKLab (Ottosson 2020), where distance is about what the eye sees."""
    levels = np.arange(256) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4).astype(np.float32)
    to_lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    to_lms.append([0.0883024619, 0.2817188376, 0.6299787005])
    to_lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
    to_lab.append([0.0259040371, 0.7827717662, -0.8086757660])
    lms = linear[rgb] @ np.array(to_lms, np.float32).T
    lab: Floats = np.cbrt(lms) @ np.array(to_lab, np.float32).T
    return lab


@lru_cache
def _palette() -> Floats:
    return oklab(np.array(list(COLOURS.values()), np.uint8))


def nearest_colour(rgb: Levels) -> Indices:
    """Index into `COLOURS` of the entry nearest to each of (..., 3) levels in OKLab, (...)."""
    palette = _palette()
    nearest: Indices = (np.square(palette).sum(1) - 2 * oklab(rgb) @ palette.T).argmin(-1)
    return nearest


def _grow(mask: Mask, steps: int = 1) -> Mask:
    for _ in range(steps):
        wide = mask.copy()
        wide[:, 1:] |= mask[:, :-1]
        wide[:, :-1] |= mask[:, 1:]
        mask = wide.copy()
        mask[1:] |= wide[:-1]
        mask[:-1] |= wide[1:]
    return mask


def _shrink(mask: Mask, steps: int = 1) -> Mask:
    return ~_grow(~mask, steps)


def _spread(labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Give every run of nonzero labels in a row the run's largest label."""
    flat = np.pad(labels, ((0, 0), (1, 0))).ravel()  # the zero column parts the rows
    inside = flat > 0
    starts = np.flatnonzero(inside[1:] & ~inside[:-1]) + 1
    if starts.size:
        run = np.cumsum(np.diff(inside.astype(np.int8), prepend=0) == 1)[inside] - 1
        flat[inside] = np.maximum.reduceat(flat, starts)[run]
    return flat.reshape(labels.shape[0], -1)[:, 1:]


def largest_component(mask: Mask) -> Mask:
    """The 4-connected part of the mask with the most pixels."""
    labels = np.where(mask, np.arange(1, mask.size + 1, dtype=np.int32).reshape(mask.shape), np.int32(0))
    while True:
        spread = _spread(_spread(labels).T).T
        if np.array_equal(spread, labels):
            break
        labels = spread
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    largest: Mask = mask & (labels == counts.argmax())
    return largest


@lru_cache
def _templates() -> tuple[Floats, Floats, Floats]:
    """Coverage (6, CELLS, CELLS) of each shape, its area in squared radii (6,), its middle of mass (6, 2) in radii."""
    cell = 8
    side = CELLS * cell
    scale = round(side / 2 / REACH / SIZES["large"])
    covers = []
    for shape in SHAPES:
        picture = draw(Scene(shape, "white", "black", "large", "center"), size=SIZE * scale).convert("L")
        edge = (picture.width - side) // 2
        grey = np.asarray(picture.crop((edge, edge, edge + side, edge + side)).reduce(cell), np.float32)
        covers.append((grey - grey.min()) / (grey.max() - grey.min()))
    cover = np.stack(covers).astype(np.float32)
    place = ((np.arange(CELLS) + 0.5) / CELLS * 2 - 1) * REACH
    mass = cover.sum((1, 2))
    middle = np.stack([cover.sum(1) @ place, cover.sum(2) @ place], 1) / mass[:, None]
    return cover, (mass * (2 * REACH / CELLS) ** 2).astype(np.float32), middle.astype(np.float32)


@dataclass(frozen=True)
class _Object:
    """The largest thing before the background: its pixels, and the part of the picture that has its soft coverage."""

    mask: Mask
    cover: Floats
    left: int
    top: int


def _cells(middles: Floats, width: float, first: int, pixels: int) -> tuple[Floats, Floats]:
    """How a template's cells lie over a row of pixels that starts at `first`, at each middle.

    Returns:
        Weights (n, CELLS, pixels) that average the row over each cell, and how much of each cell (n, CELLS) lies in
        the picture.
    """
    low = middles[:, None] + (np.arange(CELLS, dtype=np.float32) - CELLS / 2) * width
    pixel = np.arange(first, first + pixels, dtype=np.float32)
    weights = np.minimum(low[..., None] + width, pixel + 1) - np.maximum(low[..., None], pixel)
    inside = np.minimum(low + width, SIZE) - np.maximum(low, 0)
    return np.maximum(weights, 0) / width, np.maximum(inside, 0) / width


def _overlaps(thing: _Object, index: int, area: float, x: Floats, y: Floats, radius: float) -> Floats:
    """IoU (y, x) of a template with what stands out, `area` pixels of it, the object's included.

    Parts of the template that lie outside the picture do not count.
    """
    template = _templates()[0][index]
    width = 2 * REACH * radius / CELLS
    across, inside_across = _cells(x, width, thing.left, thing.cover.shape[1])
    down, inside_down = _cells(y, width, thing.top, thing.cover.shape[0])
    seen = down.reshape(-1, down.shape[2]) @ thing.cover @ across.reshape(-1, across.shape[2]).T
    both = np.minimum(seen.reshape(len(y), CELLS, len(x), CELLS), template[:, None, :]).sum((1, 3))
    inside = inside_down @ template @ inside_across.T
    both = np.minimum(both, inside)  # a cell on the picture's edge may have seen more than its share
    overlaps: Floats = both / (area / width**2 + inside - both)
    return overlaps


def _fit(thing: _Object, index: int, area: float, *, rounds: int) -> tuple[float, float, float, float]:
    """The best (IoU, x, y, radius) of a shape: from the object's moments, then nearer in ever smaller steps."""
    _, areas, middles = _templates()
    mass = float(thing.cover.sum())
    radius = math.sqrt(mass / float(areas[index]))
    corner = np.array([thing.left, thing.top]) + 0.5
    middle = [float(thing.cover.sum(axis) @ np.arange(thing.cover.shape[1 - axis])) / mass for axis in (0, 1)]
    x, y = (corner + middle - radius * middles[index]).astype(np.float32)
    best = (float(_overlaps(thing, index, area, x[None], y[None], radius)[0, 0]), float(x), float(y), radius)
    step = 0.06
    for _ in range(rounds):
        _, x, y, radius = best
        shift = np.array([-step, 0, step], np.float32) * np.float32(radius)
        for size in (radius * (1 - step), radius, radius * (1 + step)):
            overlaps = _overlaps(thing, index, area, x + shift, y + shift, size)
            row, column = np.unravel_index(overlaps.argmax(), overlaps.shape)
            best = max(best, (float(overlaps[row, column]), float(x + shift[column]), float(y + shift[row]), size))
        step /= 2
    return best


def _pixels(image: Image.Image | Levels) -> Levels:
    if not isinstance(image, Image.Image):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image: expected uint8 (height, width, 3), got {image.dtype} {image.shape}.")
        image = Image.fromarray(image)
    if image.width != image.height:
        raise ValueError(f"image: expected a square picture, got {image.width}x{image.height}. Crop it first.")
    image = image.convert("RGB")
    if image.width != SIZE:
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _background(rgb: Levels, colours: Indices) -> tuple[int, Floats]:
    """The commonest colour along the edge of the picture: its index and its levels as found."""
    edge = np.ones(colours.shape, bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    index = int(np.bincount(colours[edge]).argmax())
    return index, np.median(rgb[edge & (colours == index)], axis=0).astype(np.float32)


def _object(levels: Floats, colours: Indices, ground: int, behind: Floats) -> _Object | None:
    framed = np.pad(colours, 1, mode="edge")
    beside = (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:])
    inner = colours != ground
    for neighbour in beside:
        inner &= neighbour == colours
    if not inner.any():
        return None
    # Blurred edges pass through colours of neither side, but always nearer to the background than the object is.
    contrast = np.square(levels - behind).sum(-1)
    ink = np.bincount(colours[inner], weights=contrast[inner]).argmax()
    before = np.median(levels[inner & (colours == ink)], axis=0)
    change = before - behind
    if not np.linalg.norm(change) >= MIN_CONTRAST:
        return None
    reach = (levels - behind) @ change / np.square(change).sum()
    mask = largest_component(reach > 0.5)
    if mask.sum() < MIN_AREA:
        return None
    near = _grow(mask, 2)
    lines = (np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0)))
    rows, columns = (slice(int(line[0]), int(line[-1]) + 1) for line in lines)
    cover = (np.clip(2 * reach - 0.5, 0, 1) * near)[rows, columns].astype(np.float32)
    return _Object(mask, cover, left=columns.start, top=rows.start)


def _place(x: float, y: float, size: str) -> str:
    near = OFFSETS[size] / 2
    cell = tuple(0 if abs(offset) < near else int(math.copysign(1, offset)) for offset in (x - SIZE / 2, y - SIZE / 2))
    return next(place for place, offsets in PLACES.items() if offsets == cell)


def _size(radius: float) -> str:
    names = list(SIZES)
    limits = [(SIZES[small] + SIZES[large]) / 2 for small, large in pairwise(names)]
    return names[sum(radius > limit for limit in limits)]


def look(image: Image.Image | Levels) -> Sighting:
    """Say what a picture shows.

    Args:
        image: A square picture, or its uint8 levels (n, n, 3); other sizes are scaled to 128.

    Raises:
        ValueError: The picture is not square, or the array not uint8 (n, n, 3).
    """
    rgb = _pixels(image)
    colours = nearest_colour(rgb)
    ground, behind = _background(rgb, colours)
    levels = rgb.astype(np.float32)
    thing = _object(levels, colours, ground, behind)
    names = list(COLOURS)
    if thing is None:
        share = float((colours == ground).mean())
        background = names[ground] if share >= MIN_COLOUR_SHARE else None
        return Sighting(None, None, background, None, None, background_share=share)

    apart = ~_grow(thing.mask, 4)  # beyond the reach of the object's blurred edge
    unlike = (colours != ground) & (np.square(levels - behind).sum(-1) > MIN_CONTRAST**2)
    stray = int((_shrink(unlike) & apart).sum())
    area = float(thing.cover.sum())
    coarse = [_fit(thing, index, area + stray, rounds=0)[0] for index in range(len(SHAPES))]
    likely = np.argsort(coarse)[:-4:-1]
    fits = sorted(((_fit(thing, index, area + stray, rounds=3), index) for index in likely), reverse=True)
    (iou, x, y, radius), shape = fits[0]

    inside = _shrink(thing.mask, 2)
    inside = inside if inside.sum() >= MIN_AREA // 2 else thing.mask
    colour = int(nearest_colour(np.median(rgb[inside], axis=0).astype(np.uint8)))
    colour_share = float((colours[inside] == colour).mean())
    background_share = float((colours[apart] == ground).mean()) if apart.any() else 0.0
    clear = iou >= MIN_SHAPE_IOU[SHAPES[shape]] and stray <= MAX_STRAY * area
    size = _size(radius)
    return Sighting(
        shape=SHAPES[shape] if clear else None,
        colour=names[colour] if colour_share >= MIN_COLOUR_SHARE else None,
        background=names[ground] if background_share >= MIN_COLOUR_SHARE else None,
        size=size,
        place=_place(x, y, size),
        shape_iou=iou,
        shape_margin=iou - fits[1][0][0],
        colour_share=colour_share,
        background_share=background_share,
        stray=stray / area,
        radius=radius,
        centre=(x, y),
    )
