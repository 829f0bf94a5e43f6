"""A residual sum and the layer norm after it as one operator, for ONNX Runtime."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .graph_matching import MICROSOFT, consumer, finished, is_vector, producer, redirect, replace_with


class SkipLayerNormFusionPass(InPlacePass):
    """Replace [Add of a bias], Add of the residual and LayerNormalization by SkipLayerNormalization.

        before   s = Add([Add(x, bias)], skip) -> y = LayerNormalization(s), with s read further down
        after    y, s = com.microsoft.SkipLayerNormalization(x, skip, gamma, beta, [bias])

    Requires a norm over the last axis of (b, n, c) and a residual of the same shape. Equal up to rounding.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        modified = False
        for node in list(model.graph):
            total = producer(node.inputs[0], "Add") if node.op_type == "LayerNormalization" else None
            if total is not None and _fits(node, total):
                _fuse(model.graph, node, total)
                modified = True
        return finished(model, modified=modified)


def _fits(norm: ir.Node, total: ir.Node) -> bool:
    left, right = (value.shape if value is not None else None for value in total.inputs)
    axis = norm.attributes.get("axis")
    return (
        left is not None
        and len(left) == 3
        and left == right
        and (axis is None or axis.as_int() in (-1, 2))
        and len(norm.inputs) == 3
        and len(norm.outputs) == 1
    )


def _fuse(graph: ir.Graph, norm: ir.Node, total: ir.Node) -> None:
    left, right = total.inputs
    (data, bias), skip = _biased(left), right
    if bias is None:
        (data, bias), skip = _biased(right), left
    inputs = [data, skip, norm.inputs[1], norm.inputs[2], *([] if bias is None else [bias])]
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    summed = bool(total.outputs[0].is_graph_output() or len(total.outputs[0].uses()) > 1)
    fused = ir.node(
        "SkipLayerNormalization",
        inputs,
        attributes={"epsilon": epsilon},
        domain=MICROSOFT,
        num_outputs=4 if summed else 1,
    )
    # Where the sum was made and not where it is normalized: what else reads it may stand between the two.
    replace_with(graph, norm, fused, before=total)
    if summed:
        redirect(total.outputs[0], fused.outputs[3])
        for unused in fused.outputs[1:3]:
            unused.name = ""


def _biased(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """What a vector is added to, and the vector, if nothing else reads the sum."""
    node = producer(value, "Add")
    if node is None or value is None or consumer(value, "Add") is None:
        return value, None
    for index in (0, 1):
        if is_vector(node.inputs[index]):
            return node.inputs[1 - index], node.inputs[index]
    return value, None
