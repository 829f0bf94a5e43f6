"""A tensor quantized where it is read: one pair for all readers, or for a Concat a scale of each branch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from latentrt.export.graph_values import is_weight
from latentrt.export.weights import Values

from .layer_quant import Kind
from .number_formats import STORED, half_scale


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized tensor: the scale that its readers share, and what they read.

    Attributes:
        columns: (channels,) to multiply the columns of weights with; None for ones.
    """

    scale: float
    kind: Kind
    dequantized: ir.Value
    columns: Values | None = None


@dataclass(frozen=True)
class Branches:
    """A Concat, and the number that each of its branches is multiplied with, as it has `sizes` channels."""

    concat: ir.Node
    factors: tuple[float, ...]
    sizes: tuple[int, ...]


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Put a tensor into a graph, under its own name."""
    value = ir.Value(
        name=str(tensor.name),
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def _constants(graph: ir.Graph, data: ir.Value, name: str, scale: float, kind: Kind) -> tuple[ir.Value, ir.Value]:
    """A tensor's scale, of its own type, and zero point."""
    assert data.dtype is not None
    step = initializer(graph, ir.tensor(np.array(scale, data.dtype.numpy()), name=f"{name}.scale"))
    zero = initializer(graph, ir.tensor(np.array(0, STORED[kind].numpy()), name=f"{name}.zero_point"))
    return step, zero


def _made(
    op_type: str,
    inputs: list[ir.Value],
    name: str,
    like: ir.Value,
    dtype: ir.DataType | None,
    attributes: Mapping[str, int] | None = None,
) -> ir.Node:
    """A node whose output has the shape of another value."""
    assert dtype is not None
    node = ir.node(op_type, inputs, attributes=attributes, name=name)
    out = node.outputs[0]
    out.name, out.shape, out.type = name, like.shape, ir.TensorType(dtype)
    return node


def quantize_tensor(graph: ir.Graph, data: ir.Value, scale: float, kind: Kind) -> QuantizedTensor:
    """QuantizeLinear and DequantizeLinear of a tensor, right behind it."""
    constants = _constants(graph, data, str(data.name), scale, kind)
    down = _made("QuantizeLinear", [data, *constants], f"{data.name}.{kind}", data, STORED[kind])
    up = _made("DequantizeLinear", [down.outputs[0], *constants], f"{data.name}.dequantized", data, data.dtype)
    maker = data.producer()
    if maker is None:
        graph.insert_before(graph[0], [down, up])
    else:
        graph.insert_after(maker, [down, up])
    return QuantizedTensor(scale, kind, up.outputs[0])


def scaled_branches(data: ir.Value) -> Branches | None:
    """What a tensor consists of, if it is a Concat times a positive constant that differs by branch only."""
    mul = data.producer()
    if mul is None or mul.op_type != "Mul" or mul.domain or data.shape is None:
        return None
    constant = next((value for value in mul.inputs if is_weight(value)), None)
    joined = next((value for value in mul.inputs if value is not constant), None)
    concat = joined.producer() if joined is not None else None
    if constant is None or constant.const_value is None or concat is None or concat.op_type != "Concat":
        return None
    # Counted from the end, as broadcasting does.
    axis = concat.attributes["axis"].as_int() % len(data.shape) - len(data.shape)
    sizes = [value.shape[axis] if value is not None and value.shape is not None else None for value in concat.inputs]
    channels = [size for size in sizes if isinstance(size, int)]
    factors = constant.const_value.numpy()
    if len(channels) < len(sizes) or factors.ndim < -axis or not factors.shape[axis] == factors.size == sum(channels):
        return None
    parts = np.split(factors.reshape(-1), np.cumsum(channels)[:-1])
    if not all(part.min() == part.max() > 0 for part in parts):
        return None
    return Branches(concat, tuple(float(part[0]) for part in parts), tuple(channels))


def quantize_branches(graph: ir.Graph, data: ir.Value, branches: Branches, scale: float, kind: Kind) -> QuantizedTensor:
    """Every branch quantized by itself, joined as integers.

    What a branch's scale, rounded to float16, differs from what smoothing asked for, the weights' columns make up for.
    """
    name, mul, axis = str(data.name), data.producer(), branches.concat.attributes["axis"].as_int()
    assert mul is not None
    quantized, columns = [], []
    for index, (factor, size) in enumerate(zip(branches.factors, branches.sizes, strict=True)):
        branch, own, step = branches.concat.inputs[index], f"{name}.{index}", float(half_scale(scale / factor))
        assert branch is not None
        constants = _constants(graph, branch, own, step, kind)
        quantized.append(_made("QuantizeLinear", [branch, *constants], f"{own}.{kind}", branch, STORED[kind]))
        columns.append(np.full(size, step * factor / scale, np.float32))
    inputs = [node.outputs[0] for node in quantized]
    joined = _made("Concat", inputs, f"{name}.{kind}", data, STORED[kind], {"axis": axis})
    constants = _constants(graph, data, name, scale, kind)
    up = _made("DequantizeLinear", [joined.outputs[0], *constants], f"{name}.dequantized", data, data.dtype)
    graph.insert_before(mul, [*quantized, joined, up])
    return QuantizedTensor(scale, kind, up.outputs[0], np.concatenate(columns))
