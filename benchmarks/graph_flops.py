"""What one call of a network takes at least: operations and bytes, counted in its ONNX graph. Weights are not read.

Operations are those of `operator_flops`. Bytes are what has to move between memory and arithmetic even if everything
that can be fused is, each with the type that it has in the graph, which is the precision of the artifact:

- Weights, once each, as they are stored: int8 ones in int8. Of a table of embeddings only the rows that are looked up.
- What convolutions and matrix products read and write: inputs that are no weights, and outputs. What a DequantizeLinear
  gives or only QuantizeLinear take is stored in the quantized type. Norms and activations in between are not counted:
  they can be done on the way. Neither are the scores of attention, which fused kernels never write.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from latentrt.export.graph_values import SMALL_BYTES
from latentrt.export.static_shapes import static_graph
from latentrt.runtime.errors import ExportError, LatentrtError, UsageError

from .operator_flops import is_counted, node_flops, shape_of

# What lies between the products of attention beside the softmax: scale, mask, changes of type.
_POINTWISE = ("Add", "Mul", "Div", "Where", "Cast", "Identity", "QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class GraphWork:
    """One call of a network.

    Attributes:
        flops: operations.
        weight_bytes: of the weights it reads.
        activation_bytes: of what its convolutions and products read and write beside them.
        outputs: shape and NumPy type of the graph's outputs, by name.
    """

    flops: int
    weight_bytes: int
    activation_bytes: int
    outputs: Mapping[str, tuple[tuple[int, ...], str]]


def graph_work(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> GraphWork:
    """Count a graph for inputs of given shapes. The graph stays as it is.

    Args:
        model: the plain graph of a component; of ONNX Runtime's own operators those of attention and products too.
        shapes: of its inputs, by name.

    Raises:
        UsageError: an input is missing, or a shape does not fit.
        ExportError: the sizes of the inputs do not decide all shapes, or an operator cannot be counted.
    """
    static = _static(model, _sizes(model, shapes))
    nodes = [node for node in static if is_counted(node)]
    constant, inside = _constants(static), _inside_attention(static)
    moved = [
        _bytes(node, value, _stored_type(value))
        for node in nodes
        for value in _distinct((*node.inputs, *node.outputs))
        if value not in constant and value not in inside
    ]
    return GraphWork(
        flops=sum(node_flops(node) for node in static),
        weight_bytes=sum(_weight_bytes(static.initializers[name]) for name in _weights(model, static)),
        activation_bytes=sum(moved),
        outputs={str(out.name): (_static_shape(out), _type(out).numpy().name) for out in static.outputs},
    )


def _static(model: ir.Model, sizes: Mapping[str, int]) -> ir.Graph:
    """The graph with every shape stated that can be.

    In graphs of PyTorch's older exporter, which optimum writes, shapes are computed from filled constants, which are
    no shape arithmetic to `static_graph`: these are folded where it leaves shapes open.
    """
    try:
        static = static_graph(model, sizes)
        if any(_open(out) for node in static.graph for out in node.outputs):
            fold_constants(static, onnx_shape_inference=True, should_fold=_is_small)
    except LatentrtError:
        raise
    except Exception as err:  # of a graph that others made, shape inference may say anything
        raise ExportError(f"{model.graph.name}: expected shapes that follow from {dict(sizes)}, got {err}.") from err
    return static.graph


def _open(value: ir.Value) -> bool:
    return value.shape is None or not value.shape.is_static()


def _is_small(node: ir.Node) -> bool | None:
    """Whether to fold a node: filled constants that are as small as a shape; None lets the folder decide."""
    if node.op_type == "ConstantOfShape":
        shape = node.outputs[0].shape
        return shape is not None and shape.is_static() and len(shape) <= 1
    tensors = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    return False if any(tensor.nbytes > SMALL_BYTES for tensor in tensors) else None


def _sizes(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """The sizes that shapes give to the dimensions that the inputs name."""
    sizes: dict[str, int] = {}
    for value in model.graph.inputs:
        name, stated = str(value.name), tuple(value.shape or ())
        given = tuple(shapes.get(name, ()))
        if name not in shapes or len(given) != len(stated):
            raise UsageError(f"{name}: expected a shape of {len(stated)} sizes, got {shapes.get(name)}.")
        for dim, size in zip(stated, given, strict=True):
            known = dim if isinstance(dim, int) else sizes.setdefault(str(dim.value), size)
            if known != size:
                raise UsageError(f"{name}: expected a shape that fits {value.shape}, got {given}.")
    return sizes


def _weights(model: ir.Model, static: ir.Graph) -> list[str]:
    """The graph's own initializers that are still read when shapes are known; sizes and axes (int64) are no weights."""
    return [
        name
        for name, value in static.initializers.items()
        if name in model.graph.initializers and value.uses() and value.dtype != ir.DataType.INT64
    ]


def _weight_bytes(weight: ir.Value) -> int:
    assert weight.const_value is not None
    readers = [use.node for use in weight.uses()]
    if all(node.op_type == "Gather" and node.inputs[0] is weight for node in readers):
        looked_up = sum(_bytes(node, node.outputs[0], weight.const_value.dtype) for node in readers)
        return min(looked_up, weight.const_value.nbytes)
    return weight.const_value.nbytes


def _constants(graph: ir.Graph) -> set[ir.Value]:
    """Weights, and what is computed from nothing else: dequantized, transposed, cast."""
    constant = set(graph.initializers.values())
    for node in graph:
        if all(value is None or value in constant for value in node.inputs):
            constant.update(node.outputs)
    return constant


def _inside_attention(graph: ir.Graph) -> set[ir.Value]:
    """The scores and weights of attentions that are written out: from a product through a softmax to a product."""
    inside: set[ir.Value] = set()
    for node in graph:
        if node.op_type == "Softmax":
            scores, weights = _product_behind(node.inputs[0]), _read_by_product(node.outputs[0])
            if scores is not None and weights is not None:
                inside |= {scores, weights}
    return inside


def _product_behind(value: ir.Value | None) -> ir.Value | None:
    """The output of a product that a value is made of, point by point."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    if is_counted(node):
        return value
    if node.op_type not in _POINTWISE:
        return None
    return next((found for each in node.inputs if (found := _product_behind(each)) is not None), None)


def _read_by_product(value: ir.Value) -> ir.Value | None:
    """What a product reads that a value is made into, point by point."""
    for node in value.consumers():
        if is_counted(node):
            return value
        if node.op_type in _POINTWISE and (found := _read_by_product(node.outputs[0])) is not None:
            return found
    return None


def _stored_type(value: ir.Value) -> ir.DataType:
    """The type in which a value has to lie in memory."""
    source, readers = value.producer(), value.consumers()
    if source is not None and source.op_type == "DequantizeLinear" and source.inputs[0] is not None:
        return _type(source.inputs[0])
    if readers and not value.is_graph_output() and all(node.op_type == "QuantizeLinear" for node in readers):
        return _type(readers[0].outputs[0])
    return _type(value)


def _type(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise ExportError(f"{value.name}: expected a value whose type is stated, got none.")
    return value.dtype


def _bytes(node: ir.Node, value: ir.Value, dtype: ir.DataType) -> int:
    return math.ceil(math.prod(shape_of(node, value)) * dtype.itemsize)


def _static_shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(size for size in value.shape or () if isinstance(size, int))


def _distinct(values: Iterable[ir.Value | None]) -> list[ir.Value]:
    """What a node reads and writes, each once: self attention may read one value as query, key and value.

    Outputs without a name are left out: nobody takes them.
    """
    return list(dict.fromkeys(value for value in values if value is not None and value.name))
