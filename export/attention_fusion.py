"""Attention as one operator, for ONNX Runtime, whose kernels never hold the scores of all queries at once."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .attention_pattern import data_input, scalar_factor
from .graph_matching import MICROSOFT, consumer, finished, integers, permutation, producer, replace_with

_TO_HEADS, _TO_KEYS = (0, 2, 1, 3), (0, 2, 3, 1)


class AttentionFusionPass(InPlacePass):
    """Replace the products, the softmax and the transpositions of attention by MultiHeadAttention.

        before   Reshape, Transpose (b, n, s, d) of Q, K, V; [Mul Q by s], [Mul K by s'], MatMul -> [Add mask]
                 -> Softmax -> MatMul -> Transpose -> Reshape to (b, s, n d)
        after    com.microsoft.MultiHeadAttention(Q, K, V [, mask]; num_heads = n, scale = s s')

    With scores of (b n, 4096, 4096), as at 512 pixels, that is the difference between gigabytes and megabytes. This is
    a pass of our own because onnxscript's `ort_fusions` find half of the U-Net's attentions in the form that our graphs
    have and none of the VAE's, and take a quarter of a minute.

    Requires a static number and width of heads and constant scales. Equal up to rounding.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        modified = False
        for node in list(model.graph):
            match = _match(node) if node.op_type == "Softmax" else None
            if match is not None:
                _fuse(model.graph, match)
                modified = True
        return finished(model, modified=modified)


@dataclass(frozen=True)
class _Attention:
    """What the operator is made from: values of shape (b, n, s, d), and the Reshape whose output it gives."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    heads: int
    width: int
    scale: float
    end: ir.Node


def _match(softmax: ir.Node) -> _Attention | None:
    scores, mask = softmax.inputs[0], None
    axis = softmax.attributes.get("axis")
    if axis is not None and axis.as_int() not in (-1, 3):
        return None
    added = producer(scores, "Add")
    if added is not None:
        scores, mask = added.inputs
        if producer(scores, "MatMul") is None:
            scores, mask = mask, scores
        if scores is None or consumer(scores, "Add") is None:
            return None
    first, second = producer(scores, "MatMul"), consumer(softmax.outputs[0], "MatMul")
    if first is None or second is None or second.inputs[0] is not softmax.outputs[0]:
        return None
    query, query_scale = _scaled(first.inputs[0])
    key, key_scale = _scaled(first.inputs[1])
    transposed = consumer(second.outputs[0], "Transpose")
    end = consumer(transposed.outputs[0], "Reshape") if transposed is not None else None
    heads, width = _head_sizes(second.inputs[1])
    if end is None or permutation(transposed) != _TO_HEADS or not heads or not width:
        return None
    shape, value = end.outputs[0].shape, second.inputs[1]
    if shape is None or len(shape) != 3 or shape[2] != heads * width or query is None or key is None or value is None:
        return None
    return _Attention(query, key, value, mask, heads, width, query_scale * key_scale, end)


def _scaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """What a constant factor is multiplied with, and the factor; 1 if there is none."""
    node = producer(value, "Mul")
    factor = scalar_factor(node) if node is not None else None
    return (value, 1.0) if node is None or factor is None else (data_input(node), factor)


def _head_sizes(value: ir.Value | None) -> tuple[int, int]:
    """Heads and their width of values (b, n, s, d); zeros if they are not known."""
    shape = value.shape if value is not None else None
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
        return 0, 0
    return shape[1], shape[3]


def _fuse(graph: ir.Graph, match: _Attention) -> None:
    end, hidden = match.end, match.heads * match.width
    inputs: list[ir.Value | None] = [
        _sequence(graph, match.query, _TO_HEADS, hidden, end),
        _sequence(graph, match.key, _TO_KEYS, hidden, end),
        _sequence(graph, match.value, _TO_HEADS, hidden, end),
    ]
    if match.mask is not None:
        inputs += [None, None, match.mask]
    attributes = {"num_heads": match.heads, "scale": match.scale}
    replace_with(graph, end, ir.node("MultiHeadAttention", inputs, attributes=attributes, domain=MICROSOFT))


def _sequence(graph: ir.Graph, value: ir.Value, order: tuple[int, ...], hidden: int, before: ir.Node) -> ir.Value:
    """The tensor (b, s, n d) that `value` is a view of, heads first and transposed by `order`.

    Where the view cannot be followed back, it is undone.
    """
    transpose = producer(value, "Transpose")
    if transpose is not None and permutation(transpose) == order:
        split = transpose.inputs[0]
        reshape = producer(split, "Reshape")
        source = reshape.inputs[0] if reshape is not None else None
        if source is not None and source.shape is not None and len(source.shape) == 3 and source.shape[2] == hidden:
            return source
    else:
        inverse = [order.index(axis) for axis in range(4)]
        undone = ir.node("Transpose", [value], attributes={"perm": inverse}, name=f"{value.name}_sequence")
        split = undone.outputs[0]
        split.name, split.type = f"{value.name}_by_position", value.type
        graph.insert_before(before, undone)
    flat = ir.node("Reshape", [split, integers(graph, (0, 0, hidden))], name=f"{value.name}_merge_heads")
    flat.outputs[0].name, flat.outputs[0].type = f"{value.name}_merged_heads", value.type
    graph.insert_before(before, flat)
    return flat.outputs[0]
