"""Weights that are read when they are wanted, one at a time.

A network's weights are a mapping from names to `Weight`: shape, dtype and a way to read the values. What changes a
checkpoint on its way (another layout's names, a fused LoRA, a folded scale) wraps these and reads nothing yet, so an
export holds one tensor at a time, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]


@dataclass(frozen=True)
class Weight:
    """One tensor of a network.

    Attributes:
        shape: of the values.
        dtype: of the values: float32, float16, bfloat16 (of ml_dtypes), int64…
        read: reads the values; every call reads them again. Raises ArtifactError if the file fails or holds a NaN.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Values]

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


Weights = Mapping[str, Weight]


def of_array(values: Values) -> Weight:
    """A weight whose values are in memory already."""
    return Weight(values.shape, values.dtype, lambda: values)


def changed(weight: Weight, change: Callable[[Values], Values], shape: tuple[int, ...] | None = None) -> Weight:
    """A weight computed from another when it is read; the dtype stays.

    Args:
        shape: of the result, if it is another.
    """
    dtype = weight.dtype
    return Weight(shape or weight.shape, dtype, lambda: change(weight.read()).astype(dtype, copy=False))


def as_float32(weight: Weight) -> Weight:
    """A weight as a float32 graph has it; whole numbers stay what they are."""
    if weight.dtype.kind in "iub" or weight.dtype == np.float32:
        return weight
    return Weight(weight.shape, np.dtype(np.float32), lambda: weight.read().astype(np.float32))
