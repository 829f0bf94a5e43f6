"""The activation memory of an engine, estimated from its graph before anything is built.

The graph is given its sizes, its nodes are gathered into kernels, and the kernels are gone through in order: a tensor
takes memory from the kernel that writes it to the last that reads it. How TensorRT-RTX shares that memory was found
from the builder's own lists of kernels, which give its figure to the kilobyte where sizes are fixed:

- Where all sizes are fixed, tensors are placed in the order in which they are written, each in the first gap that is
  large enough.
- Where sizes are left open, gaps cannot be counted on: tensors share memory one for one, the largest choosing first.
- Kernels of a quantized graph may run side by side, in up to eight streams with a workspace each; how many the builder
  takes was 2 for int8, 8 for fp8 and for int8 weights alone, and cannot be told before. All are counted.

`benchmarks/results/plan-activation.json` has how far the estimate is off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from .activation_kernels import Kernel, elements, kernels_of, origin, readers
from .static_shapes import static_graph

# Every tensor starts at a multiple of it.
_ALIGNMENT = 512
# What a convolution or matrix product may use beside its tensors while it runs: the same for every shape.
_WORKSPACE = {"convolution": 8_192_000, "product": 8_192_000}
# Streams beside the first in which kernels of a quantized graph were seen to run.
_SIDE_STREAMS = 7


@dataclass(frozen=True)
class Step:
    """One kernel: the tensors it reads, those it writes with their bytes, and the bytes it needs only while it runs."""

    name: str
    reads: tuple[str, ...]
    writes: Mapping[str, int]
    workspace: int = 0


@dataclass(frozen=True)
class Activation:
    """The activation block.

    Attributes:
        total: its size in bytes, at most where there are side streams.
        at: the kernel at which the most is held.
        held: bytes of the tensors that are held there, the largest first.
        outside: bytes of the engine's inputs and outputs, which are no part of the block.
        side: bytes of the total for streams that the builder may do without.
    """

    total: int
    at: str
    held: Mapping[str, int]
    outside: int
    side: int = 0


def estimate_activation(model: ir.Model, sizes: Mapping[str, int], *, fixed: bool = True) -> Activation:
    """The memory that an engine of a graph works in at given sizes.

    Args:
        sizes: of every dimension that the graph's inputs name.
        fixed: the engine is for these sizes alone, not for a range up to them.

    Raises:
        UsageError: a size is missing or is of no dimension of the inputs.
        ExportError: a shape depends on more than the sizes of the inputs.
    """
    graph = static_graph(model, sizes).graph
    steps = steps_of(graph, kernels_of(graph))
    at, held = fullest(steps)
    total = packed_bytes(steps) if fixed else slotted_bytes(steps)
    quantized = any(node.op_type == "DequantizeLinear" for node in graph)
    side = _SIDE_STREAMS * max((step.workspace for step in steps), default=0) if quantized else 0
    outside = sum(_bytes(value) for value in (*graph.inputs, *graph.outputs))
    return Activation(total + side, at, held, outside, side)


def steps_of(graph: ir.Graph, kernels: Sequence[Kernel]) -> list[Step]:
    """The kernels with what they read and write. What products of one kernel write is one tensor."""
    outside = {origin(value) for value in graph.outputs}
    names: dict[ir.Value, str] = {}
    steps = []
    for kernel in kernels:
        reads = dict.fromkeys(names[value] for value in kernel.reads if value in names)
        inside = set(kernel.nodes)
        writes: dict[str, int] = {}
        for value in kernel.makes:
            if value not in outside and any(node not in inside for node in readers(value)):
                names[value] = next(iter(writes), str(value.name)) if kernel.kind == "product" else str(value.name)
                writes[names[value]] = writes.get(names[value], 0) + _padded_bytes(value)
        steps.append(Step(kernel.name, tuple(reads), writes, _WORKSPACE.get(kernel.kind, 0)))
    return steps


def fullest(steps: Sequence[Step]) -> tuple[str, dict[str, int]]:
    """The first step at which the most is held, and the bytes of what is held there by tensor, the largest first."""
    spans = _spans(steps)
    totals = [0] * len(steps)
    for first, last, size in spans.values():
        for index in range(first, last + 1):
            totals[index] += size
    if not totals:
        return "", {}
    most = totals.index(max(totals))
    held = {name: size for name, (first, last, size) in spans.items() if first <= most <= last}
    return steps[most].name, dict(sorted(held.items(), key=lambda item: (-item[1], item[0])))


def packed_bytes(steps: Sequence[Step]) -> int:
    """The block if tensors are placed as they are written, each in the first gap, and workspaces after them."""
    spans = _spans(steps)
    held: dict[str, tuple[int, int]] = {}
    total = 0
    for index, step in enumerate(steps):
        for name, size in step.writes.items():
            held[name] = (_first_gap(held.values(), size), size)
        ends = [start + size for start, size in held.values()]
        ends.append(_first_gap(held.values(), step.workspace) + step.workspace if step.workspace else 0)
        total = max(total, *ends)
        held = {name: place for name, place in held.items() if spans[name][1] > index}
    return total


def slotted_bytes(steps: Sequence[Step]) -> int:
    """The block if it consists of slots that hold one tensor at a time, and the largest workspace beside them.

    The largest tensors choose their slot first.
    """
    slots: list[tuple[int, list[tuple[int, int]]]] = []
    for first, last, size in sorted(_spans(steps).values(), key=lambda span: (-span[2], span[0])):
        taken = next((taken for _, taken in slots if all(last < a or b < first for a, b in taken)), None)
        if taken is None:
            slots.append((size, [(first, last)]))
        else:
            taken.append((first, last))
    return sum(size for size, _ in slots) + max((step.workspace for step in steps), default=0)


def _spans(steps: Sequence[Step]) -> dict[str, tuple[int, int, int]]:
    """By tensor the step that writes it, the last that reads it, and its bytes. What is only read lies elsewhere."""
    spans: dict[str, tuple[int, int, int]] = {}
    for index, step in enumerate(steps):
        spans.update({name: (index, index, size) for name, size in step.writes.items()})
        spans.update({name: (spans[name][0], index, spans[name][2]) for name in step.reads if name in spans})
    return spans


def _first_gap(taken: Iterable[tuple[int, int]], size: int) -> int:
    """The first offset at which so many bytes are free."""
    offset = 0
    for start, length in sorted(taken):
        if start - offset >= size:
            return offset
        offset = max(offset, start + length)
    return offset


def _padded_bytes(value: ir.Value) -> int:
    return -(-_bytes(value) // _ALIGNMENT) * _ALIGNMENT


def _bytes(value: ir.Value) -> int:
    return 0 if value.dtype is None else math.ceil(elements(value) * value.dtype.itemsize)
