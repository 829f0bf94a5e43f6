"""Rounding weights to half precision, as an export does and as whatever replaces an exported weight has to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def rounded_half(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Values in a 16-bit type. Those that would become zero become its smallest number: an epsilon stays one.

    Args:
        values: within the type's range.
        dtype: float16, or the bfloat16 of ml_dtypes.
    """
    return without_new_zeros(values, values.astype(dtype, order="C"))


def without_new_zeros(values: NDArray[Any], half: NDArray[Any]) -> NDArray[Any]:
    """Numbers that became zero when they were rounded to 16 bits as the type's smallest, in place.

    Args:
        values: before they were rounded.
        half: after; it is returned.
    """
    numbers, bits = values.reshape(-1), half.reshape(-1).view(np.uint16)
    zeros = np.flatnonzero((bits & 0x7FFF) == 0)
    flushed = zeros[numbers[zeros] != 0]
    bits[flushed] |= 1
    return half
