"""Casts that change nothing, or that could be done once, taken out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .graph_matching import producer
from .weight_moves import WeightChange, fold_into_weights
from .weights import Values

_T = ir.DataType
# What each type can hold of others without rounding.
_HOLDS: dict[ir.DataType, frozenset[ir.DataType]] = {
    _T.FLOAT: frozenset({_T.FLOAT16, _T.BFLOAT16, _T.INT8, _T.UINT8, _T.INT16, _T.UINT16, _T.BOOL}),
    _T.DOUBLE: frozenset({_T.FLOAT, _T.FLOAT16, _T.BFLOAT16, _T.INT8, _T.UINT8, _T.INT16, _T.INT32, _T.BOOL}),
    _T.FLOAT16: frozenset({_T.INT8, _T.UINT8, _T.BOOL}),
    _T.INT64: frozenset({_T.INT8, _T.UINT8, _T.INT16, _T.UINT16, _T.INT32, _T.UINT32, _T.BOOL}),
    _T.INT32: frozenset({_T.INT8, _T.UINT8, _T.INT16, _T.UINT16, _T.BOOL}),
}
_FLOATS = frozenset({_T.FLOAT, _T.FLOAT16, _T.BFLOAT16, _T.DOUBLE})
# Operators whose result holds elements of their first input (of all, for Concat) and nothing else.
_MOVES = frozenset({"Reshape", "Transpose", "Slice", "Concat", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand"})


class CastCleanupPass(InPlacePass):
    """Remove casts that undo each other, also across operators that only move elements.

        before   Cast(x (f16) to f32) -> Reshape -> Transpose -> Cast(to f16)
        after    x -> Reshape -> Transpose
        before   Cast(Cast(x (f16) to f32) to bf16);  Cast(x (f16) to f16);  Cast(weight)
        after    Cast(x to bf16);                     x;                     weight, converted when it is read

    A cast that rounds is never dropped: f32 -> f16 -> f32 stays. Values are equal bit for bit.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite until nothing is left to do; `modified` says whether there was anything."""
        graph = model.graph
        modified = fold_into_weights(graph, {"Cast": _cast_of_weight})
        for node in list(graph):
            if node.op_type == "Cast":
                modified |= _joined(node) or _drawn_through_moves(node)
                modified |= _dropped(graph, node)
        RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=modified)


def _target(cast: ir.Node) -> ir.DataType:
    return ir.DataType(cast.attributes.get_int("to", ir.DataType.UNDEFINED))


def _is_exact(source: ir.DataType | None, target: ir.DataType) -> bool:
    """Whether every value of a type is one of another, too."""
    return source is not None and (source == target or source in _HOLDS.get(target, ()))


def _skips(source: ir.DataType | None, target: ir.DataType) -> bool:
    """Whether a cast by way of a type that holds the source is the cast itself.

    Floats round once either way. Floats to integers out of range, and negative numbers to unsigned ones, are whatever
    a backend makes of them, which may depend on the way.
    """
    return (source in _FLOATS and target in _FLOATS) or _is_exact(source, target)


def _exact_cast(value: ir.Value | None) -> ir.Value | None:
    """What a value is an exact Cast of."""
    cast = producer(value, "Cast")
    source = cast.inputs[0] if cast is not None else None
    return source if cast is not None and source is not None and _is_exact(source.dtype, _target(cast)) else None


def _joined(cast: ir.Node) -> bool:
    """Cast from where an exact Cast started."""
    source = _exact_cast(cast.inputs[0])
    if source is None or not _skips(source.dtype, _target(cast)):
        return False
    cast.replace_input_with(0, source)
    return True


def _dropped(graph: ir.Graph, cast: ir.Node) -> bool:
    """Remove a Cast to the type that its input has."""
    source, result = cast.inputs[0], cast.outputs[0]
    if source is None or source.dtype != _target(cast) or result.is_graph_output():
        return False
    result.replace_all_uses_with(source)
    graph.remove(cast, safe=True)
    return True


def _drawn_through_moves(cast: ir.Node) -> bool:
    """Move elements in the type that they had before an exact Cast, if all that comes of it is cast again."""
    moved = cast.inputs[0]
    if moved is None or moved.is_graph_output() or any(user.op_type != "Cast" for user, _ in moved.uses()):
        return False
    chain: list[ir.Node] = []
    sources: set[ir.DataType | None] = set()
    pending = [moved]
    while pending:
        value = pending.pop()
        if (source := _exact_cast(value)) is not None:
            sources.add(source.dtype)
            continue
        node = value.producer()
        alone = value is moved or (len(value.uses()) == 1 and not value.is_graph_output())
        if node is None or node.domain or node.op_type not in _MOVES or not alone:
            return False
        chain.append(node)
        pending += [data for data in _data_inputs(node) if data is not None]
    if len(sources) != 1 or not chain:
        return False
    (dtype,) = sources
    if dtype is None or not all(_skips(dtype, _target(user)) for user, _ in moved.uses()):
        return False
    for node in chain:
        for index, data in enumerate(_data_inputs(node)):
            if (source := _exact_cast(data)) is not None:
                node.replace_input_with(index, source)
        node.outputs[0].dtype = dtype
    return True


def _data_inputs(node: ir.Node) -> list[ir.Value | None]:
    """The inputs whose elements a move passes on."""
    return list(node.inputs) if node.op_type == "Concat" else list(node.inputs[:1])


def _cast_of_weight(node: ir.Node, shape: tuple[int, ...]) -> WeightChange | None:
    """The conversion of a weight to a float type; floats beyond it become infinite, as in a run."""
    weight, target = node.inputs[0], _target(node)
    if weight is None or weight.dtype not in _FLOATS or target not in _FLOATS:
        return None

    def convert(values: Values) -> Values:
        with np.errstate(over="ignore"):
            return values.astype(target.numpy())

    return WeightChange(target.short_name(), (int(target),), shape, convert, target)
