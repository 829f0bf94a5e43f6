"""A sum and the group norm after it as one operator, for ONNX Runtime's CUDA provider."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .graph_matching import MICROSOFT, finished, producer, redirect, replace_with


class SkipGroupNormFusionPass(InPlacePass):
    """Replace an Add and the GroupNorm of its result by SkipGroupNorm.

        before   s = Add(x, skip) -> y = GroupNorm(s), with s perhaps read further down
        after    y, s = com.microsoft.SkipGroupNorm(x, gamma, beta, skip)

    The skip is a residual (b, h, w, c) or the timestep's embedding (b, 1, 1, c).

    Requires ChannelsLastPass before. Equal up to rounding.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        modified = False
        for node in list(model.graph):
            total = producer(node.inputs[0], "Add") if node.op_type == "GroupNorm" else None
            if total is None or node.attributes["channels_last"].as_int() != 1:
                continue
            operands = sorted(total.inputs, key=_is_broadcast)
            # A constant is no skip, and two broadcast operands make no picture.
            if any(value is None or value.is_initializer() for value in operands) or _is_broadcast(operands[0]):
                continue
            data, skip = operands
            summed = bool(total.outputs[0].is_graph_output() or len(total.outputs[0].uses()) > 1)
            fused = ir.node(
                "SkipGroupNorm",
                [data, node.inputs[1], node.inputs[2], skip],
                attributes=node.attributes,
                domain=MICROSOFT,
                num_outputs=2 if summed else 1,
            )
            # Where the sum was made and not where it is normalized: what else reads it may stand between the two.
            replace_with(model.graph, node, fused, before=total)
            if summed:
                redirect(total.outputs[0], fused.outputs[1])
            modified = True
        return finished(model, modified=modified)


def _is_broadcast(value: ir.Value | None) -> bool:
    shape = value.shape if value is not None else None
    return shape is None or list(shape[1:3]) == [1, 1]
