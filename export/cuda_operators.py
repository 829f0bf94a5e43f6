"""What ONNX Runtime's CUDA operators compute, written in ONNX's own: so that their graphs can be checked on any CPU.

The CPU provider has no kernels for them. MultiHeadAttention, SkipLayerNormalization and QuickGelu it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .graph_matching import redirect

_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


class PlainOperatorsPass(InPlacePass):
    """Replace NhwcConv, GroupNorm, SkipGroupNorm and BiasSplitGelu by what they stand for.

        before   com.microsoft.NhwcConv(x, w, b)
        after    Transpose(Conv(Transpose(x), Transpose(w), b))

    Norms are computed in float32 whatever x is, as the CUDA kernels do. Weights stay as they are, in place.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every such node; `modified` says whether there was one."""
        writers = {
            "NhwcConv": _convolution,
            "GroupNorm": _group_norm,
            "SkipGroupNorm": _skip_group_norm,
            "BiasSplitGelu": _split_gelu,
        }
        nodes = [node for node in model.graph if node.op_type in writers]
        for node in nodes:
            results = writers[node.op_type](_Writer(model.graph, node), node)
            for old, new in zip(node.outputs, results, strict=False):
                redirect(old, new)
            model.graph.remove(node, safe=True)
        return PassResult(model, modified=bool(nodes))


class _Writer:
    """Puts nodes before another one."""

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self.graph, self.before, self.count = graph, before, 0

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """The output of a new node; attributes as numbers, lists of them, or those of another node."""
        return self._put(ir.node(op_type, inputs, attributes=attributes))[0]

    def halves(self, value: ir.Value) -> Sequence[ir.Value]:
        """Both halves along the last axis."""
        return self._put(ir.node("Split", [value], attributes={"axis": -1, "num_outputs": 2}, num_outputs=2))

    def _put(self, node: ir.Node) -> Sequence[ir.Value]:
        self.count += 1
        node.name = f"{self.before.outputs[0].name}_{self.count}"
        for index, output in enumerate(node.outputs):
            output.name = f"{node.name}_{index}"
        self.graph.insert_before(self.before, node)
        return node.outputs

    def constant(self, values: Sequence[float], dtype: type[np.generic] = np.int64) -> ir.Value:
        """A small constant."""
        return self("Constant", value=ir.tensor(np.asarray(values, dtype)))


def _convolution(write: _Writer, node: ir.Node) -> tuple[ir.Value, ...]:
    data, weight, *bias = node.inputs
    first, moved = (write("Transpose", value, perm=_FIRST) for value in (data, weight))
    return (write("Transpose", write("Conv", first, moved, *bias, **node.attributes), perm=_LAST),)


def _group_norm(write: _Writer, node: ir.Node) -> tuple[ir.Value, ...]:
    return (_normalized(write, node, node.inputs[0]),)


def _skip_group_norm(write: _Writer, node: ir.Node) -> tuple[ir.Value, ...]:
    total = write("Add", node.inputs[0], node.inputs[3])
    return _normalized(write, node, total), total


def _normalized(write: _Writer, node: ir.Node, data: ir.Value | None) -> ir.Value:
    """The group norm of `data`, and its SiLU, as `node` says."""
    groups, activation = node.attributes["groups"].as_int(), node.attributes["activation"].as_int()
    first = write("Cast", write("Transpose", data, perm=_FIRST), to=ir.DataType.FLOAT)
    ones, zeros = (write.constant([number] * groups, np.float32) for number in (1, 0))
    grouped = write("Reshape", first, write.constant([0, groups, -1]))
    normed = write("InstanceNormalization", grouped, ones, zeros, epsilon=node.attributes["epsilon"])
    back = write("Reshape", normed, write("Shape", first))
    gamma, beta = (write("Reshape", value, write.constant([-1, 1, 1])) for value in node.inputs[1:3])
    result = write("Add", write("Mul", back, gamma), beta)
    if activation:
        result = write("Mul", result, write("Sigmoid", result))
    return write("Transpose", write("CastLike", result, data), perm=_LAST)


def _split_gelu(write: _Writer, node: ir.Node) -> tuple[ir.Value, ...]:
    left, right = write.halves(write("Add", *node.inputs))
    root, one, half = (
        write("CastLike", write.constant([number], np.float32), right) for number in (np.sqrt(0.5), 1.0, 0.5)
    )
    rising = write("Add", write("Erf", write("Mul", right, root)), one)
    return (write("Mul", left, write("Mul", write("Mul", right, half), rising)),)
