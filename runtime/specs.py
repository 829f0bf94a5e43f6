"""What goes into a component and what comes out: names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .errors import BackendError

Array = NDArray[np.generic]


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor. `shape` holds sizes, and names where a dimension is dynamic; `dtype` is NumPy's name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ModelSpec:
    """A component's inputs and outputs, in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def input(self, name: str) -> TensorSpec | None:
        """The input of that name, or None."""
        return next((spec for spec in self.inputs if spec.name == name), None)


class Session(Protocol):
    """Something that runs one component: the narrow seam between the loop and the backends."""

    @property
    def spec(self) -> ModelSpec:
        """Inputs and outputs."""
        ...

    @property
    def backend(self) -> str:
        """Which backend and device runs it, for people: `onnxruntime CPU`, `tensorrt_rtx sm89`."""
        ...

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once on whole arrays; outputs by name. Safe to call from several threads."""
        ...

    def close(self) -> None:
        """Give back all that it holds on its device, when the calls under way are done. Closing again does nothing."""
        ...


@runtime_checkable
class Noting(Protocol):
    """A session that may have to run otherwise than it was to."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What it does otherwise, and why, for people."""
        ...


@runtime_checkable
class Refittable(Protocol):
    """A session whose weights can be replaced while it is open."""

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Replace weights, by the names of the graph's initializers and as the graph has them."""
        ...


def closed_error(component: str) -> BackendError:
    """What a session raises when it is used after `close`."""
    return BackendError(f"{component}: expected an open session, got one that was closed. Open it again.")
