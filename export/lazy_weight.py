"""Weights inside a graph that are not in memory: initializers that read, or compute, their values when asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from .weights import Values, Weight


def lazy_tensor(weight: Weight, name: str) -> ir.LazyTensor:
    """A weight as an initializer's value. Nothing is kept: every look at the values reads them again."""
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(weight.read()), name=name),
        dtype=ir.DataType.from_numpy(weight.dtype),
        shape=ir.Shape(weight.shape),
        name=name,
    )


def derived(
    tensors: Sequence[ir.TensorProtocol],
    compute: Callable[..., Values],
    *,
    shape: Sequence[int],
    dtype: ir.DataType,
    name: str,
) -> ir.LazyTensor:
    """A tensor computed from others when it is wanted, as passes make them from weights.

    Args:
        tensors: what it is computed from, such as an initializer's `const_value`.
        compute: their arrays to the result's.
        shape: of the result.
    """
    weight = Weight(tuple(shape), dtype.numpy(), lambda: compute(*(tensor.numpy() for tensor in tensors)))
    return lazy_tensor(weight, name)
