"""SiLU and CLIP's quick GELU as one operator, for ONNX Runtime."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .attention_pattern import data_input, scalar_factor
from .graph_matching import MICROSOFT, consumer, finished, producer, replace_with


class SiluFusionPass(InPlacePass):
    """Replace a value times the sigmoid of its multiple by QuickGelu.

        before   [Mul x by a] -> Sigmoid -> Mul by x
        after    com.microsoft.QuickGelu(x; alpha = a), with a = 1 where nothing scaled x

    One pass over the activations instead of two or three. Equal up to rounding.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "Sigmoid":
                continue
            end = consumer(node.outputs[0], "Mul")
            factor, alpha = node.inputs[0], 1.0
            if end is None or factor is None:
                continue
            gated = end.inputs[1] if end.inputs[0] is node.outputs[0] else end.inputs[0]
            scaled = producer(factor, "Mul") if factor is not gated else None
            scale = scalar_factor(scaled) if scaled is not None else None
            if scaled is not None and scale is not None:
                factor, alpha = data_input(scaled), scale
            if gated is None or factor is not gated:
                continue
            fused = ir.node("QuickGelu", [gated], attributes={"alpha": alpha}, domain=MICROSOFT)
            replace_with(model.graph, end, fused)
            modified = True
        return finished(model, modified=modified)
