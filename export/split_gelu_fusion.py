"""GEGLU as one operator, for ONNX Runtime's CUDA provider."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .graph_matching import MICROSOFT, consumer, finished, is_vector, producer, replace_with

# The widths that the CUDA kernel was compiled for: those of Stable Diffusion 1.x to SDXL.
_WIDTHS = (1280, 2560, 5120)


class SplitGeluFusionPass(InPlacePass):
    """Replace the bias, the halving, the GELU and the product of GEGLU by BiasSplitGelu.

        before   Add(x, bias) -> Split into a, b; Gelu(b) -> Mul(a, Gelu(b))
        after    com.microsoft.BiasSplitGelu(x, bias)

    Requires halves as wide as the kernel was compiled for and an exact GELU. Equal up to rounding.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        modified = False
        for node in list(model.graph):
            match = _match(node) if node.op_type == "Gelu" else None
            if match is not None:
                data, bias, end = match
                replace_with(model.graph, end, ir.node("BiasSplitGelu", [data, bias], domain=MICROSOFT))
                modified = True
        return finished(model, modified=modified)


def _match(gelu: ir.Node) -> tuple[ir.Value, ir.Value, ir.Node] | None:
    """What GEGLU reads, its bias, and the node that ends it."""
    split, end = producer(gelu.inputs[0], "Split"), consumer(gelu.outputs[0], "Mul")
    if split is None or end is None or len(split.outputs) != 2 or gelu.inputs[0] is not split.outputs[1]:
        return None
    gate, width = split.outputs[0], split.outputs[0].shape[2] if split.outputs[0].shape is not None else None
    add = producer(split.inputs[0], "Add")
    approximate = gelu.attributes.get("approximate")
    if add is None or gate not in end.inputs or width not in _WIDTHS or split.outputs[1].shape != gate.shape:
        return None
    if approximate is not None and approximate.as_string() != "none":
        return None
    bias = next((value for value in add.inputs if is_vector(value)), None)
    data = next((value for value in add.inputs if value is not bias), None)
    return None if data is None or bias is None else (data, bias, end)
