"""Device memory that engines will take, planned from what the builder stated."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from latentrt.runtime.engine_sidecar import EngineSidecar, ShapeProfile
from latentrt.runtime.specs import TensorSpec

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}


def tensor_bytes(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    profiles: Iterable[Mapping[str, ShapeProfile]],
) -> int | None:
    """Memory of all inputs and outputs in the profile that takes the most, or None if an output's size is not known.

    Args:
        inputs: the graph's.
        outputs: the graph's; a dynamic size is a name that an input carries, an expression of one such as
            `latent_height * 8` or `height / 8`, or one part of it, rounded up, such as `latent_height_2`.
        profiles: shapes by input.
    """
    totals = [
        _bytes_of(inputs, outputs, {name: shapes.max for name, shapes in profile.items()}) for profile in profiles
    ]
    known = [total for total in totals if total is not None]
    return max(known) if len(known) == len(totals) else None


def _bytes_of(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]
) -> int | None:
    sizes = {
        name: size
        for tensor in inputs
        for name, size in zip(tensor.shape, shapes[tensor.name], strict=True)
        if isinstance(name, str)
    }
    total = sum(_ITEM_BYTES[tensor.dtype] * math.prod(shapes[tensor.name]) for tensor in inputs)
    for tensor in outputs:
        resolved = [_size_of(size, sizes) for size in tensor.shape]
        if None in resolved:
            return None
        total += _ITEM_BYTES[tensor.dtype] * math.prod(size for size in resolved if size is not None)
    return total


def _size_of(size: int | str, sizes: Mapping[str, int]) -> int | None:
    """Numbers and names, multiplied and divided from left to right; None if a name is not known."""
    words = re.split(r" *([*/]) *", str(size))
    values = [int(word) if word.isdigit() else _named(word, sizes) for word in words[::2]]
    total = values[0]
    for operator, value in zip(words[1::2], values[1:], strict=True):
        if total is None or value is None:
            return None
        total = total * value if operator == "*" else total // value
    return total


def _named(name: str, sizes: Mapping[str, int]) -> int | None:
    whole, _, divisor = name.rpartition("_")
    if name not in sizes and whole in sizes and divisor.isdigit():
        return -(-sizes[whole] // int(divisor))
    return sizes.get(name)


def planned_vram(sidecars: Iterable[EngineSidecar]) -> dict[str, int | None]:
    """Device memory by target if all its engines are loaded at once, in bytes; None where a figure is missing.

    All weights, all inputs and outputs at their largest shapes, and one activation block shared by the engines, as
    large as the largest asks for. The CUDA context and kernels compiled on the device come on top. Of several engines
    of one component for one target, the largest counts.
    """
    by_target: dict[str, dict[str, EngineSidecar]] = defaultdict(dict)
    for sidecar in sidecars:
        for sm in sidecar.targets:
            held = by_target[sm].get(sidecar.component)
            if held is None or held.engine_bytes < sidecar.engine_bytes:
                by_target[sm][sidecar.component] = sidecar
    return {sm: _vram(engines.values()) for sm, engines in by_target.items()}


def _vram(sidecars: Iterable[EngineSidecar]) -> int | None:
    total, block = 0, 0
    for sidecar in sidecars:
        if sidecar.weight_bytes is None or sidecar.activation_bytes is None or sidecar.tensor_bytes is None:
            return None
        total += sidecar.weight_bytes + sidecar.tensor_bytes
        block = max(block, sidecar.activation_bytes)
    return total + block
