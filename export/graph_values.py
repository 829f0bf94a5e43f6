"""What graph passes read of a graph's constants, and how they put a node into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from .weights import Values

# What a pass may read to decide: sizes, axes, factors; never a weight.
SMALL_BYTES = 1024


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is an initializer that nobody can replace from outside."""
    return value is not None and value.is_initializer() and not value.is_graph_input() and value.const_value is not None


def small_constant(value: ir.Value | None) -> Values | None:
    """The values of a constant of at most SMALL_BYTES."""
    if value is None or value.const_value is None or value.const_value.nbytes > SMALL_BYTES:
        return None
    return value.const_value.numpy()


def ints_of(value: ir.Value | None) -> list[int] | None:
    """A small constant such as axes or a target shape."""
    values = small_constant(value)
    return None if values is None else [int(number) for number in values.reshape(-1)]


def number_of(value: ir.Value | None) -> float | None:
    """A constant that is one number."""
    values = small_constant(value)
    return None if values is None or values.size != 1 else float(values.reshape(()))


def insert(
    graph: ir.Graph,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    before: ir.Node,
    name: str,
    shape: ir.Shape | None,
    dtype: ir.DataType | None,
    attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
) -> ir.Value:
    """Put a node with one output before another; `name` is the node's and its output's."""
    node = ir.node(op_type, inputs, attributes=attributes, name=name)
    made = node.outputs[0]
    made.name, made.shape = name, shape
    if dtype is not None:
        made.dtype = dtype
    graph.insert_before(before, node)
    return made
