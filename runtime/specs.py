"""What goes into a component and what comes out: names, dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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
        """Run once on whole arrays; outputs by name."""
        ...
