"""Explicit quantization: QuantizeLinear and DequantizeLinear where TensorRT wants them, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from latentrt.export.graph_values import insert, is_weight
from latentrt.export.lazy_weight import derived
from latentrt.export.weights import Values
from latentrt.runtime.errors import CalibrationError

# The axis of a weight's output channels.
CHANNEL_AXIS = {"Conv": 0, "MatMul": 1}
# Symmetric, so that a weight and its negative are the same integer but for the sign.
WEIGHT_MAX = 127
# The smallest positive float16, which no scale may be below: the parser refuses zero.
LEAST_SCALE = float(np.finfo(np.float16).smallest_subnormal)


def half_scale(values: Values | float) -> Values:
    """Scales as both graphs, in float32 and in float16, can hold them: rounded up to float16.

    Rounded up, no value that was in range leaves it. Weights are to be quantized with the rounded scale; with the
    unrounded one, 20 dB are lost where weights are small.

    Raises:
        CalibrationError: a scale is not finite, or beyond float16.
    """
    wanted = np.maximum(np.asarray(values, np.float64), LEAST_SCALE)
    with np.errstate(over="ignore"):
        near = wanted.astype(np.float16)
        scales = np.where(near.astype(np.float64) < wanted, np.nextafter(near, np.float16(np.inf)), near)
    if not np.isfinite(scales).all():
        raise CalibrationError(
            f"scale: expected finite numbers up to {np.finfo(np.float16).max:g}, got {np.asarray(values).max():g}. "
            "Look for NaN or overflow in the calibration's inputs."
        )
    return np.asarray(scales, np.float16)


def weight_scales(weight: Values, axis: int) -> Values:
    """One symmetric scale for every output channel, float16: its largest absolute value is 127 steps."""
    others = tuple(index for index in range(weight.ndim) if index != axis)
    return half_scale(np.abs(weight.astype(np.float32)).max(axis=others) / WEIGHT_MAX)


def quantized(values: Values, scale: Values, axis: int) -> Values:
    """Weights as int8, rounded to the nearest, ties to even as in QuantizeLinear."""
    shape = [1] * values.ndim
    shape[axis] = -1
    steps = values.astype(np.float32) / scale.astype(np.float32).reshape(shape)
    return np.asarray(np.clip(np.rint(steps), -WEIGHT_MAX, WEIGHT_MAX), np.int8)


class QuantizePass(InPlacePass):
    """Let weighted operators compute in int8.

        before   x -> Conv(w)
        after    x -> QuantizeLinear(s) -> DequantizeLinear(s) -> Conv(DequantizeLinear(w int8, s by channel))

    As TensorRT's placement rules have it: both inputs of a weighted operator and nothing else, symmetric with zero
    point 0, scales that are constants, one pair for a tensor whoever reads it, weights stored as int8, biases as they
    are. For a float16 graph with the same integers, `HalfPrecisionPass` comes after this one: scales are numbers that
    float16 holds, and it gives them the type of what they scale, as strong typing asks for.

    Args:
        scales: by weight of the Conv or MatMul to quantize, the scale of its other input: largest absolute value
            over 127. Those of one tensor have to be equal.

    Raises:
        CalibrationError: a name is no weight of such an operator, or two scales are given for one tensor.
    """

    def __init__(self, scales: Mapping[str, float]) -> None:
        super().__init__()
        self.scales = scales

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the operators that were named; `modified` says whether there was one."""
        graph = model.graph
        found = {str(node.inputs[1].name): node for node in graph if _weighted(node) and node.inputs[1] is not None}
        if unknown := sorted(self.scales.keys() - found.keys()):
            raise CalibrationError(
                f"{graph.name}: expected weights of a Conv or MatMul, got {', '.join(unknown[:10])}"
                f"{' …' if len(unknown) > 10 else ''}. The plan is of another graph: calibrate again."
            )
        pairs: dict[ir.Value, tuple[float, ir.Value]] = {}
        for name, node in found.items():
            if name not in self.scales:
                continue
            data = node.inputs[0]
            assert data is not None
            scale = float(half_scale(self.scales[name]))
            if data not in pairs:
                pairs[data] = scale, _pair(graph, data, scale)
            if pairs[data][0] != scale:
                raise CalibrationError(
                    f"{name}: expected scale {pairs[data][0]:g}, as another operator has for the same input, got "
                    f"{scale:g}. Operators that read one tensor share its scale."
                )
            weight = node.inputs[1]
            assert weight is not None
            node.replace_input_with(0, pairs[data][1])
            node.replace_input_with(1, _int8_weight(graph, node, weight))
            if not weight.uses():
                del graph.initializers[name]
        return PassResult(model, modified=bool(self.scales))


def _weighted(node: ir.Node) -> bool:
    return node.op_type in CHANNEL_AXIS and node.domain == "" and is_weight(node.inputs[1])


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=str(tensor.name),
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def _pair(graph: ir.Graph, data: ir.Value, scale: float) -> ir.Value:
    """QuantizeLinear and DequantizeLinear of a tensor, right behind it."""
    assert data.dtype is not None
    step = _initializer(graph, ir.tensor(np.array(scale, data.dtype.numpy()), name=f"{data.name}.scale"))
    zero = _initializer(graph, ir.tensor(np.array(0, np.int8), name=f"{data.name}.zero_point"))
    down = ir.node("QuantizeLinear", [data, step, zero], name=f"{data.name}.quantize")
    up = ir.node("DequantizeLinear", [down.outputs[0], step, zero], name=f"{data.name}.dequantize")
    for node, name, dtype in ((down, "int8", ir.DataType.INT8), (up, "dequantized", data.dtype)):
        made = node.outputs[0]
        made.name, made.shape, made.type = f"{data.name}.{name}", data.shape, ir.TensorType(dtype)
    maker = data.producer()
    if maker is None:
        graph.insert_before(graph[0], [down, up])
    else:
        graph.insert_after(maker, [down, up])
    return up.outputs[0]


def _int8_weight(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> ir.Value:
    """The DequantizeLinear of a weight that is stored as int8."""
    assert weight.const_value is not None
    assert weight.dtype is not None
    name, tensor, axis = str(weight.name), weight.const_value, CHANNEL_AXIS[node.op_type]
    scales = weight_scales(tensor.numpy(), axis)
    stored = derived(
        [tensor],
        lambda values: quantized(values, scales, axis),
        shape=tensor.shape.numpy(),
        dtype=ir.DataType.INT8,
        name=f"{name}.int8",
    )
    steps = ir.tensor(scales.astype(weight.dtype.numpy()), name=f"{name}.scale")
    inputs = [_initializer(graph, stored), _initializer(graph, steps)]
    return insert(
        graph,
        "DequantizeLinear",
        inputs,
        before=node,
        name=f"{name}.dequantized",
        shape=weight.shape,
        dtype=weight.dtype,
        attributes={"axis": axis},
    )
