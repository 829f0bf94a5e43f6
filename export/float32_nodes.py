"""Which nodes of a half-precision graph stay in float32, with as few Casts between the two types as can be.

Some must: what the sines of the timestep are made from, what makes or reads a tensor that float16 cannot hold, what
ONNX wants in float32. The heavy operators among the others must not. Moves and elementwise operators can be computed
either way, and are put where the fewest Casts are needed, in half precision where that makes no difference: this is
the smallest cut of a graph between the two (a Cast is an edge of weight one), found with Ford and Fulkerson's method.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Hashable, Iterator

import onnx_ir as ir

# Operators that only move elements: in any precision their results are their inputs' values.
MOVES = frozenset(
    {
        *("Concat", "Expand", "Flatten", "Gather", "GatherND", "Identity", "Reshape", "Slice", "Split", "Squeeze"),
        *("Tile", "Transpose", "Unsqueeze"),
    }
)
_ELEMENTWISE = frozenset(
    {
        *("Abs", "Add", "Clip", "Div", "Erf", "Exp", "Gelu", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Relu"),
        *("Sigmoid", "Sqrt", "Sub", "Tanh", "Where"),
    }
)
# Operators that read no elements: no Cast is needed before them.
TYPELESS = frozenset({"Shape", "Size"})
_FULL, _HALF = "float32", "half"


def float32_nodes(model: ir.Model, keep: Collection[str] = ()) -> set[ir.Node]:
    """The nodes of an fp32 graph that compute in float32 when the graph is converted to half precision.

    Args:
        keep: names of tensors that have to be float32: what makes and what reads them is in the result.
    """
    forced = _timestep_nodes(model) | _around(model, keep)
    network = _Network()
    for value in _tensors(model):
        _connect(network, value, forced)
    for node in model.graph:
        if node in forced:
            network.join(_FULL, node)
        elif node.op_type not in MOVES | _ELEMENTWISE:
            network.join(node, _HALF)
    side = network.smallest_side(_FULL, _HALF)
    return {node for node in model.graph if node in side}


def float_inputs(node: ir.Node) -> tuple[int, ...]:
    """The inputs that ONNX wants in float32 whatever the data is: roi and scales of a Resize."""
    return (1, 2) if node.op_type == "Resize" else ()


def _makes_floats(node: ir.Node) -> bool:
    return any(value.dtype == ir.DataType.FLOAT for value in node.outputs)


def _timestep_nodes(model: ir.Model) -> set[ir.Node]:
    """Sines, cosines and a Resize's sizes, and everything they are made from.

    At t = 981 a float16 is 0.5 apart from its neighbour, and the angle would be noise.
    """
    pending = [node for node in model.graph if node.op_type in ("Sin", "Cos")]
    for node in model.graph:
        pending += [p for i in float_inputs(node) if i < len(node.inputs) and (p := _producer(node.inputs[i]))]
    found: set[ir.Node] = set()
    while pending:
        node = pending.pop()
        if node not in found and _makes_floats(node):
            found.add(node)
            pending += [producer for value in node.inputs if (producer := _producer(value)) is not None]
    return found


def _around(model: ir.Model, keep: Collection[str]) -> set[ir.Node]:
    """The nodes that make or read one of these tensors."""
    found: set[ir.Node] = set()
    for node in model.graph:
        for value in node.outputs:
            if value.name in keep:
                found.add(node)
                found.update(reader for reader, _ in value.uses() if reader.op_type not in TYPELESS)
    return found


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _tensors(model: ir.Model) -> Iterator[ir.Value]:
    """The float32 tensors of a run: weights are none, they are stored in the type that they are wanted in."""
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        if value.dtype == ir.DataType.FLOAT:
            yield value


def _connect(network: _Network, value: ir.Value, forced: Collection[ir.Node]) -> None:
    """One Cast serves all readers of a value that are not of its type, so a value counts once in either direction."""
    maker: Hashable = value.producer() or _FULL
    readers: set[Hashable] = {
        _FULL if index in float_inputs(node) else node for node, index in value.uses() if node.op_type not in TYPELESS
    }
    if value.is_graph_output():
        readers.add(_FULL)
    network.join(maker, (value, "to half"), capacity=1)
    network.join((value, "to float32"), maker, capacity=1)
    for reader in readers:
        network.join((value, "to half"), reader)
        network.join(reader, (value, "to float32"))


class _Network:
    """A directed graph with capacities, and its cut of least capacity."""

    def __init__(self) -> None:
        self._free: dict[Hashable, dict[Hashable, float]] = defaultdict(lambda: defaultdict(float))

    def join(self, start: Hashable, end: Hashable, capacity: float = float("inf")) -> None:
        if start != end:
            self._free[start][end] += capacity
            self._free[end][start] += 0.0

    def smallest_side(self, source: Hashable, sink: Hashable) -> set[Hashable]:
        """What stands on the source's side of the least cut; of several such cuts, the one with the smallest side."""
        while True:
            before = self._reached(source, sink)
            if sink not in before:
                return set(before)
            path = [sink]
            while path[-1] != source:
                path.append(before[path[-1]])
            steps = list(zip(path[1:], path, strict=False))
            amount = min(self._free[start][end] for start, end in steps)
            for start, end in steps:
                self._free[start][end] -= amount
                self._free[end][start] += amount

    def _reached(self, source: Hashable, sink: Hashable) -> dict[Hashable, Hashable]:
        """Everything that has a way from the source with capacity left, each with what comes before it."""
        before = {source: source}
        pending = deque([source])
        while pending and sink not in before:
            start = pending.popleft()
            for end, capacity in self._free[start].items():
                if capacity > 0 and end not in before:
                    before[end] = start
                    pending.append(end)
        return before
