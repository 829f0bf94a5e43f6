"""Judge pictures of shapes by the prompt alone: `latentrt calibrate … --judge examples/shapes/judge.py:shows`.

`request_of` reads a prompt back that `scenes.random_prompt` worded; `score.py` has the requests themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from look import look
from scenes import COLOURS, PLACES, SHAPE_WORDS, SHAPES, SIZE_WORDS, Request

ATTRIBUTES = ("shape", "colour", "background", "size", "place")
_SHAPE_OF = {word: shape for shape in SHAPES for word in SHAPE_WORDS[shape]}
_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_PLACE_OF = {place: place for place in PLACES} | {"middle": "center", "centre": "center"}


def _one_of(words: Iterable[str]) -> str:
    # The longest first: "top left" is not "top".
    return rf"\b({'|'.join(sorted(words, key=len, reverse=True))})\b"


_BACKGROUND = re.compile(rf"{_one_of(COLOURS)} background|\bon {_one_of(COLOURS)}")
_COLOUR, _SHAPE, _SIZE, _PLACE = (re.compile(_one_of(words)) for words in (COLOURS, _SHAPE_OF, _SIZE_OF, _PLACE_OF))


def request_of(prompt: str) -> Request:
    """What a prompt in the wordings of `scenes.random_prompt` asks for.

    Raises:
        ValueError: it states nothing that a picture can be held to.
    """
    text = prompt.lower()
    ground = _BACKGROUND.search(text)
    rest = _BACKGROUND.sub("", text)
    shape, colour, size, place = (pattern.search(rest) for pattern in (_SHAPE, _COLOUR, _SIZE, _PLACE))
    request = Request(
        prompt=prompt,
        shape=_SHAPE_OF[shape[1]] if shape else None,
        colour=colour[1] if colour else None,
        background=ground[1] or ground[2] if ground else None,
        size=_SIZE_OF[size[1]] if size else None,
        place=_PLACE_OF[place[1]] if place else None,
    )
    if all(getattr(request, name) is None for name in ATTRIBUTES):
        raise ValueError(f"prompt: expected a shape, colour, background, size or place, got {prompt!r}.")
    return request


def shows(prompt: str, picture: npt.NDArray[np.uint8]) -> bool:
    """Whether a picture (h, w, 3) shows all that its prompt states.

    Raises:
        ValueError: as `request_of`, or `look` cannot take the picture.
    """
    request, sighting = request_of(prompt), look(picture)
    stated = [name for name in ATTRIBUTES if getattr(request, name) is not None]
    return all(getattr(request, name) == getattr(sighting, name) for name in stated)
