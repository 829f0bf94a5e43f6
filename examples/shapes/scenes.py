"""Scenes of one coloured shape on a coloured background, their pictures and their prompts.

This is the data set of the shapes checkpoint: `random_scene` draws what to show, `draw` paints it,
`random_prompt` describes it in one of many wordings. `score.py` looks at pictures with the same palette.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 38),
    "orange": (250, 140, 26),
    "yellow": (252, 222, 48),
    "green": (36, 156, 70),
    "blue": (36, 84, 216),
    "purple": (136, 48, 176),
    "white": (246, 246, 246),
    "black": (22, 22, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES: dict[str, float] = {"small": 15.0, "medium": 25.0, "large": 38.0}  # radius in pixels of 128
# How far a placed shape's middle lies from the picture's middle: larger shapes have less room.
OFFSETS: dict[str, float] = {"small": 38.0, "medium": 30.0, "large": 21.0}
PLACES: dict[str, tuple[int, int]] = {
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
    "left": (-1, 0),
    "center": (0, 0),
    "right": (1, 0),
    "bottom left": (-1, 1),
    "bottom": (0, 1),
    "bottom right": (1, 1),
}

SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "small", "little", "tiny"),
    "medium": ("medium", "medium", "medium-sized"),
    "large": ("large", "large", "big", "big", "huge"),
}
SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "circle", "circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "cross", "cross", "plus sign"),
    "ring": ("ring", "ring", "ring", "donut"),
}


@dataclass(frozen=True)
class Scene:
    """What a picture shows. Names are keys of `SHAPES`, `COLOURS`, `SIZES` and `PLACES`."""

    shape: str
    colour: str
    background: str
    size: str
    place: str


@dataclass(frozen=True)
class Request:
    """A prompt and what it asks for; None where it leaves the choice open."""

    prompt: str
    shape: str | None
    colour: str | None
    background: str | None
    size: str | None
    place: str | None


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene drawn uniformly, the shape's colour never that of the background."""
    colours = list(COLOURS)
    colour, background = rng.choice(len(colours), size=2, replace=False)
    return Scene(
        shape=SHAPES[rng.integers(len(SHAPES))],
        colour=colours[colour],
        background=colours[background],
        size=list(SIZES)[rng.integers(len(SIZES))],
        place=list(PLACES)[rng.integers(len(PLACES))],
    )


def outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """The corners of a polygonal shape around (0, 0), y downwards, its extent about `radius`."""
    if shape == "square":
        half = radius * 0.88
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if shape == "triangle":
        half, height = radius * 1.08, radius * 0.94
        return [(0.0, -height), (half, height), (-half, height)]
    if shape == "star":
        inner = 0.42
        return [
            (
                radius * 1.12 * (inner if corner % 2 else 1.0) * math.sin(math.pi * corner / 5),
                -radius * 1.12 * (inner if corner % 2 else 1.0) * math.cos(math.pi * corner / 5),
            )
            for corner in range(10)
        ]
    if shape == "cross":
        arm = radius * 0.34
        quarter = [(arm, -radius), (arm, -arm), (radius, -arm), (radius, arm), (arm, arm), (arm, radius)]
        return quarter + [(-x, -y) for x, y in quarter]
    raise ValueError(f"shape: expected one of square, triangle, star, cross, got {shape!r}")


def draw(scene: Scene, rng: np.random.Generator | None = None, *, size: int = SIZE) -> Image.Image:
    """Paint a scene, antialiased. With `rng`, size, place and colours vary a little, as in training.

    Returns:
        An RGB picture of (size, size).
    """
    oversample = 4
    scale = size / SIZE * oversample
    jitter = rng.uniform(-1, 1, size=3) if rng is not None else np.zeros(3)
    tint = rng.integers(-6, 7, size=(2, 3)) if rng is not None else np.zeros((2, 3), dtype=int)
    radius = SIZES[scene.size] * (1 + 0.06 * jitter[0])
    column, row = PLACES[scene.place]
    x = SIZE / 2 + column * OFFSETS[scene.size] + 2 * jitter[1]
    y = SIZE / 2 + row * OFFSETS[scene.size] + 2 * jitter[2]

    def shade(name: str, change: np.ndarray) -> tuple[int, int, int]:
        red, green, blue = np.clip(np.array(COLOURS[name]) + change, 0, 255)
        return int(red), int(green), int(blue)

    def disc(reach: float) -> list[float]:
        return [(x - reach) * scale, (y - reach) * scale, (x + reach) * scale, (y + reach) * scale]

    canvas = Image.new("RGB", (size * oversample, size * oversample), shade(scene.background, tint[0]))
    pen = ImageDraw.Draw(canvas)
    ink = shade(scene.colour, tint[1])
    if scene.shape == "circle":
        pen.ellipse(disc(radius), fill=ink)
    elif scene.shape == "ring":
        pen.ellipse(disc(radius * 1.05), fill=ink)
        pen.ellipse(disc(radius * 0.55), fill=shade(scene.background, tint[0]))
    else:
        corners = [((x + dx) * scale, (y + dy) * scale) for dx, dy in outline(scene.shape, radius)]
        pen.polygon(corners, fill=ink)
    return canvas.reduce(oversample)


def _place_phrase(place: str, rng: np.random.Generator) -> str:
    if place == "center":
        return ("in the center", "in the middle", "at the center", "in the centre")[rng.integers(4)]
    if " " in place:
        return (f"at the {place}", f"in the {place} corner", f"in the {place}")[rng.integers(3)]
    if place in ("left", "right"):
        return (f"on the {place}", f"at the {place}", f"on the {place} side")[rng.integers(3)]
    return (f"at the {place}", f"at the {place} edge")[rng.integers(2)]


def random_prompt(scene: Scene, rng: np.random.Generator, *, omit: float = 0.25) -> Request:
    """Describe a scene in a random wording, each attribute left out with some probability.

    Args:
        omit: How often size and place go unsaid; colour, background and shape do a third as often.
    """
    say_size, say_place = rng.random(2) >= omit
    say_colour, say_background, say_shape = rng.random(3) >= omit / 3
    size = SIZE_WORDS[scene.size][rng.integers(len(SIZE_WORDS[scene.size]))] if say_size else ""
    colour = scene.colour if say_colour else ""
    shape = SHAPE_WORDS[scene.shape][rng.integers(len(SHAPE_WORDS[scene.shape]))] if say_shape else "shape"
    thing = " ".join(word for word in (size, colour, shape) if word)
    place = _place_phrase(scene.place, rng) if say_place else ""
    ground = f"{scene.background} background" if say_background else ""
    style = rng.random()
    if style < 0.12:  # tags
        parts = [part for part in (thing, ground, scene.place if say_place else "") if part]
        prompt = ", ".join(parts)
    else:
        article = "an" if thing[0] in "aeiou" else "a"
        article = article if rng.random() < 0.9 else "the"
        opening = ("", "", "", "a picture of ", "a drawing of ", "an image of ", "a photo of ")[rng.integers(7)]
        subject = f"{opening}{article} {thing}"
        joint = ("on", "on", "on", "of", "against", "over", "in front of")[rng.integers(7)]
        article = "an" if ground[:1] in ("o",) else "a"
        backdrop = f"{joint} {article} {ground}" if ground else ""
        if ground and joint == "on" and rng.random() < 0.15:
            backdrop = f"on {scene.background}"
        if ground and rng.random() < 0.1:
            parts = [f"{ground} with {'an' if thing[0] in 'aeiou' else 'a'} {thing}", place]
        elif ground and rng.random() < 0.4:
            parts = [subject, backdrop, place]
        else:
            parts = [subject, place, backdrop]
        prompt = " ".join(part for part in parts if part)
    return Request(
        prompt=prompt,
        shape=scene.shape if say_shape else None,
        colour=scene.colour if say_colour else None,
        background=scene.background if say_background else None,
        size=scene.size if say_size else None,
        place=scene.place if say_place else None,
    )
