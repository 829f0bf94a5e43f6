"""Whether arrays fit a component's inputs, and the arrays as its graph takes them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .errors import UsageError
from .specs import Array, ModelSpec, TensorSpec


def check_names(spec: ModelSpec, feeds: Mapping[str, object]) -> None:
    """Have the inputs' names be the component's.

    Raises:
        UsageError: one is missing or unknown.
    """
    known = {tensor.name for tensor in spec.inputs}
    if known != feeds.keys():
        raise UsageError(f"{spec.name}: expected inputs {sorted(known)}, got {sorted(feeds)}.")


def checked_input(component: str, tensor: TensorSpec, value: Array) -> Array:
    """One input in the graph's own dtype, its values in C order: the array itself where it is so already.

    Raises:
        UsageError: it has another rank or fixed size than the graph's.
    """
    array = np.asarray(value)
    fits = array.ndim == len(tensor.shape) and all(
        not isinstance(want, int) or want == size for want, size in zip(tensor.shape, array.shape, strict=True)
    )
    if not fits:
        raise UsageError(f"{component}.{tensor.name}: expected shape {tensor.shape}, got {array.shape}.")
    return np.asarray(array, dtype=tensor.dtype, order="C")


def checked_feeds(spec: ModelSpec, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The feeds in the graph's own dtypes and in its order.

    Raises:
        UsageError: an input is missing, is unknown, or has another rank or fixed size than the graph's.
    """
    check_names(spec, feeds)
    return {tensor.name: checked_input(spec.name, tensor, feeds[tensor.name]) for tensor in spec.inputs}


def zero_feeds(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Zeros of given shapes for every input, to warm up with.

    Raises:
        UsageError: an input is missing or unknown, or its shape does not fit.
    """
    check_names(spec, shapes)
    zeros = {tensor.name: np.zeros(shapes[tensor.name], tensor.dtype) for tensor in spec.inputs}
    return checked_feeds(spec, zeros)
