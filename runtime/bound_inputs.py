"""Which inputs a device holds already: arrays that cannot change are recognised by their identity.

A request's text embeddings go into every step's call. The pipeline makes them read-only once and passes the same arrays
each time, so that a session can leave them where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .specs import Array

A = TypeVar("A", bound=NDArray[Any])


def freeze(array: A) -> A:
    """Make an array read-only, in place, and return it: its owner's promise that it never changes again."""
    array.flags.writeable = False
    return array


def is_frozen(array: object) -> bool:
    """Whether nothing can change an array through NumPy: it is read-only, and so is all that it is a view of."""
    while isinstance(array, np.ndarray):
        if array.flags.writeable:
            return False
        array = array.base
    return True


class HeldInputs:
    """What the input buffers of one shape bucket hold. Not safe to use from several threads."""

    def __init__(self) -> None:
        self._held: dict[str, Array] = {}

    def stale(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The feeds that have to be copied to their buffers: all but the frozen arrays copied there last."""
        return {
            name: array for name, array in feeds.items() if self._held.get(name) is not array or not is_frozen(array)
        }

    def copied(self, name: str, array: Array) -> None:
        """Note that a buffer now holds an array. The array is kept alive, so that no other one can pass for it."""
        if is_frozen(array):
            self._held[name] = array
        else:
            self._held.pop(name, None)

    def forget(self) -> None:
        """Have everything copied again, as after a copy that failed half way."""
        self._held.clear()
