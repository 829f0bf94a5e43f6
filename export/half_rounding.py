"""What float16 costs, measured where no operator computes in float16.

ONNX Runtime's CPU has few float16 kernels: it runs most operators of an fp16 graph in float32 and drops the casts
between neighbours, so that whole chains are never rounded and the error comes out ten times too small. Here the
fp32 graph gets float16's weights and a rounding to float16 after every operator. Sums inside an operator stay
float32, as on tensor cores.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .fp16 import float32_island, half_of


class HalfRoundingPass(InPlacePass):
    """Round a float32 graph to float16 everywhere that Float16Pass makes it float16.

        before   x -> Conv(w) -> y
        after    x -> Conv(float16(w)) -> Cast float16 -> Cast float32 -> y

    Raises:
        ExportError: a weight is beyond float16's range.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite; `modified` is always True."""
        island = float32_island(model)
        for node in list(model.graph):
            if node in island:
                continue
            for value in node.outputs:
                if value.dtype == ir.DataType.FLOAT:
                    _round(model.graph, node, value)
        for value in model.graph.inputs:
            readers = [node for node, _ in value.uses()]
            if value.dtype == ir.DataType.FLOAT and readers and not island.intersection(readers):
                _round(model.graph, None, value)
        for name, weight in model.graph.initializers.items():
            readers = [node for node, _ in weight.uses()]
            if (
                weight.dtype == ir.DataType.FLOAT
                and weight.const_value is not None
                and not island.intersection(readers)
            ):
                rounded = half_of(weight.const_value.numpy(), name=name).astype(np.float32)
                weight.const_value = ir.tensor(rounded, name=name)
        return PassResult(model, modified=True)


def _round(graph: ir.Graph, producer: ir.Node | None, value: ir.Value) -> None:
    """Put two Casts behind a value; a graph output keeps its name."""
    half = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT16})
    full = ir.node("Cast", [half.outputs[0]], attributes={"to": ir.DataType.FLOAT})
    out = full.outputs[0]
    out.type, out.shape = value.type, value.shape
    for node, index in [*value.uses()]:
        if node is not half:
            node.replace_input_with(index, out)
    if value.is_graph_output():
        index = next(i for i, output in enumerate(graph.outputs) if output is value)
        value.name, out.name = f"{value.name}_unrounded", value.name
        graph.outputs[index] = out
    if producer is None:
        graph.insert_before(graph[0], [half, full])
    else:
        graph.insert_after(producer, [half, full])
