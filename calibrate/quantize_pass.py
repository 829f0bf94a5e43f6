"""Explicit quantization: QuantizeLinear and DequantizeLinear where TensorRT wants them, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from latentrt.export.graph_values import insert, is_weight
from latentrt.export.lazy_weight import derived
from latentrt.export.weights import Values
from latentrt.runtime.errors import CalibrationError

from .layer_quant import Kind, LayerQuant
from .number_formats import STORED, half_scale, quantized, weight_scales
from .quantized_tensor import QuantizedTensor, initializer, quantize_branches, quantize_tensor, scaled_branches

# The axis of a weight's output channels; that of the input channels is the other of the first two.
CHANNEL_AXIS = {"Conv": 0, "MatMul": 1}
# The first with float16 scales, and with float8 at all.
_OPSET = 19


class QuantizePass(InPlacePass):
    """Let weighted operators compute in int8 or fp8.

        before   x -> Conv(w)
        after    x -> QuantizeLinear(s) -> DequantizeLinear(s) -> Conv(DequantizeLinear(w int8, s by channel))

    As TensorRT's placement rules have it: both inputs of a weighted operator and nothing else, symmetric with zero
    point 0, scales that are constants, one pair for a tensor whoever reads it, weights stored as they are computed
    with, biases as they are. For a float16 graph with the same integers, `HalfPrecisionPass` comes after this one:
    scales are numbers that float16 holds, and it gives them the type of what they scale, as strong typing asks for.

    A Concat whose branches smoothing multiplies by one number each is quantized to int8 by branch, and the Mul is
    gone. This is the split of Q-Diffusion (Li et al. 2023, arXiv 2302.04304) at no cost:

        before   Concat(x, y) -> Mul(1/v, 1/w by branch) -> Conv(w)
        after    Concat(x -> QuantizeLinear(s v), y -> QuantizeLinear(s w)) -> DequantizeLinear(s) -> Conv(…)

    Args:
        quants: by weight of the Conv or MatMul to quantize. Of each, `scale` and `kind` are read: `SmoothPass` and
            `BiasCorrectionPass`, which come before, have dealt with the rest. Layers that read one tensor need the
            same of both. Without a scale, weights alone are stored quantized, and the operator computes in floats.

    Raises:
        CalibrationError: a name is no weight of such an operator, two scales are given for one tensor, or the graph's
            opset has no such types.
    """

    def __init__(self, quants: Mapping[str, LayerQuant]) -> None:
        super().__init__()
        self.quants = quants

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the operators that were named; `modified` says whether there was one."""
        graph = model.graph
        _check_opset(model)
        found = {str(node.inputs[1].name): node for node in graph if _weighted(node) and node.inputs[1] is not None}
        if unknown := sorted(self.quants.keys() - found.keys()):
            raise CalibrationError(
                f"{graph.name}: expected weights of a Conv or MatMul, got {', '.join(unknown[:10])}"
                f"{' …' if len(unknown) > 10 else ''}. The plan is of another graph: calibrate again."
            )
        pairs: dict[ir.Value, QuantizedTensor] = {}
        for name, node in found.items():
            if name not in self.quants:
                continue
            quant, data, weight = self.quants[name], node.inputs[0], node.inputs[1]
            assert data is not None
            assert weight is not None
            columns = None
            if quant.scale is not None:
                pair = _pair_for(graph, pairs, data, quant.scale, quant.kind, name)
                node.replace_input_with(0, pair.dequantized)
                columns = pair.columns
            node.replace_input_with(1, _stored_weight(graph, node, weight, quant.kind, columns))
            if not weight.uses():
                del graph.initializers[name]
        for data in pairs:
            _drop_unread(graph, data)
        return PassResult(model, modified=bool(self.quants))


def _check_opset(model: ir.Model) -> None:
    opset = model.graph.opset_imports.get("", 0)
    if opset < _OPSET:
        raise CalibrationError(
            f"{model.graph.name}: expected a graph of opset {_OPSET} or later, which has float16 scales, got {opset}. "
            "Export the checkpoint again without --opset."
        )


def _weighted(node: ir.Node) -> bool:
    return node.op_type in CHANNEL_AXIS and node.domain == "" and is_weight(node.inputs[1])


def _pair_for(
    graph: ir.Graph, pairs: dict[ir.Value, QuantizedTensor], data: ir.Value, wanted: float, kind: Kind, name: str
) -> QuantizedTensor:
    """The pair of a tensor, made for the first that reads it; `name` is the reader's."""
    scale = float(half_scale(wanted))
    if data not in pairs:
        # ONNX joins no float8; whose steps grow with the number, it has no need of it either.
        branches = scaled_branches(data) if kind == "int8" else None
        if branches is None:
            pairs[data] = quantize_tensor(graph, data, scale, kind)
        else:
            pairs[data] = quantize_branches(graph, data, branches, scale, kind)
    pair = pairs[data]
    if (pair.scale, pair.kind) != (scale, kind):
        raise CalibrationError(
            f"{name}: expected {pair.kind} with scale {pair.scale:g}, as another operator has for the same input, got "
            f"{kind} with {scale:g}. Operators that read one tensor share its scale."
        )
    return pair


def _drop_unread(graph: ir.Graph, data: ir.Value) -> None:
    """Remove the Mul that quantized branches took the place of, and its constant, once nobody reads them."""
    maker = data.producer()
    if maker is None or data.uses() or data.is_graph_output():
        return
    constants = [value for value in maker.inputs if value is not None and is_weight(value)]
    graph.remove(maker, safe=True)
    for value in constants:
        if not value.uses():
            del graph.initializers[str(value.name)]


def _stored_weight(graph: ir.Graph, node: ir.Node, weight: ir.Value, kind: Kind, columns: Values | None) -> ir.Value:
    """The DequantizeLinear of a weight that is stored as it is computed with."""
    assert weight.const_value is not None
    assert weight.dtype is not None
    name, tensor, axis = str(weight.name), weight.const_value, CHANNEL_AXIS[node.op_type]

    def scaled(values: Values) -> Values:
        if columns is None:
            return values
        shape = [1] * values.ndim
        shape[1 - axis] = -1
        return values * columns.reshape(shape)

    scales = weight_scales(scaled(tensor.numpy()), axis, kind)
    stored = derived(
        [tensor],
        lambda values: quantized(scaled(values), scales, axis, kind),
        shape=tensor.shape.numpy(),
        dtype=STORED[kind],
        name=f"{name}.{kind}",
    )
    steps = ir.tensor(scales.astype(weight.dtype.numpy()), name=f"{name}.scale")
    inputs = [initializer(graph, stored), initializer(graph, steps)]
    return insert(
        graph,
        "DequantizeLinear",
        inputs,
        before=node,
        name=f"{name}.dequantized",
        shape=weight.shape,
        dtype=weight.dtype,
        attributes={"axis": axis} if scales.ndim else None,
    )
