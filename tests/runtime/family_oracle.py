"""What the tests of families share: pictures to start from, and diffusers' pipelines on the components of another."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PROMPT, OTHER = "a red cube on ice", "blue coin"
SIZE: dict[str, Any] = {"height": 64, "width": 64}


def square(height: int = 64, width: int = 64) -> NDArray[np.uint8]:
    """A square on a gradient, so that no part is like another."""
    array = np.zeros((height, width, 3), np.uint8)
    array[...] = (230, 160, 40)
    array[..., 2] += np.arange(height, dtype=np.uint8)[:, None]
    array[..., 1] += np.arange(width, dtype=np.uint8)
    array[12:41, 9:38] = (30, 160, 90)
    return array


def rectangle(height: int = 64, width: int = 64) -> NDArray[np.uint8]:
    """A mask whose edges lie inside latents."""
    array = np.zeros((height, width), np.uint8)
    array[19:50, 27:58] = 255
    return array


def stripes(height: int = 64, width: int = 64, *, period: int = 12) -> NDArray[np.uint8]:
    """White lines on black, for ControlNets to follow."""
    array = np.zeros((height, width, 3), np.uint8)
    array[:, ::period] = 255
    array[::period, : width // 2] = (255, 128, 0)
    return array


def image_of(array: NDArray[np.uint8]) -> Image.Image:
    """As diffusers takes it."""
    return Image.fromarray(array)


def sibling(pipe: Any, name: str, **more: Any) -> Any:
    """Another pipeline with the components and the config of one.

    Some pipelines correct a scheduler that they are made with; this one has its own back afterwards.
    """
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        other = getattr(diffusers, name).from_pipe(pipe, scheduler=copy.deepcopy(pipe.scheduler), **more)
    other.scheduler = pipe.scheduler
    other.set_progress_bar_config(disable=True)
    return other
