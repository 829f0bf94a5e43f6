"""Group norm in the forms that ONNX has: with a run-time shape, without one, and as one operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import version_converter

from .graph_matching import consumer, integers, producer, redirect
from .graph_values import insert, ints_of, is_weight, small_constant
from .weight_moves import FoldWeightMovesPass

# The first opset whose GroupNormalization has a scale for each channel, as PyTorch's has.
NATIVE_OPSET = 21


@dataclass(frozen=True)
class _GroupNorm:
    """Reshape to groups -> InstanceNormalization by ones and zeros -> Reshape back; `data` is (b, channels, …)."""

    data: ir.Value
    to_groups: ir.Node
    norm: ir.Node
    back: ir.Node
    groups: int
    channels: int
    rank: int


class ShapeFreeGroupNormPass(InPlacePass):
    """Bring group norm back to its input's shape without computing that shape.

        before   Reshape(x, [0, 32, -1])    -> InstanceNormalization -> Reshape(y, Shape(x))
        after    Reshape(x, [0, 32, -1, 0]) -> InstanceNormalization -> Reshape(y, [0, 320, -1, 0])

    x is (b, 320, h, w). With the width kept as its own axis it can be copied, and the height is what is left. A group
    is the same run of elements either way: equal bit for bit.

    TensorRT-RTX 1.7 makes one kernel of it and the SiLU after it in either form; a decoder of dynamic size took a
    fifth less scratch memory without the shapes. GroupNormFusionPass takes either form, ONNX Runtime's own tool for
    CUDA only the first.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        graph = model.graph
        modified = False
        for node in list(graph):
            found = _group_norm(node)
            if found is None or producer(found.back.inputs[1], "Shape") is None:
                continue
            copied = [0] * (found.rank - 3)
            found.to_groups.replace_input_with(1, integers(graph, (0, found.groups, -1, *copied)))
            found.back.replace_input_with(1, integers(graph, (0, found.channels, -1, *copied)))
            sizes = list(found.data.shape or ())
            for value in (found.to_groups.outputs[0], found.norm.outputs[0]):
                value.shape = ir.Shape([sizes[0], found.groups, None, *sizes[3:]])
            found.back.outputs[0].shape = found.data.shape
            modified = True
        RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=modified)


class NativeGroupNormPass(InPlacePass):
    """Write group norm as GroupNormalization, which ONNX has from opset 21 on, and raise the opset to that.

        before   Reshape -> InstanceNormalization by ones and zeros -> Reshape -> Mul by scale -> Add of bias
        after    GroupNormalization(x, scale, bias; num_groups)

    One node instead of five, in the file: TensorRT-RTX 1.7 builds the same kernels from the other forms, which every
    opset and runtime has, so this one is for those who want the smaller graph. Equal up to rounding.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        graph = model.graph
        if not any(_affine_group_norm(node) for node in graph):
            return PassResult(model, modified=False)
        if model.opset_imports[""] < NATIVE_OPSET:
            version_converter.convert_version(model, NATIVE_OPSET)
        for found, end, scale, bias in [match for node in graph if (match := _affine_group_norm(node)) is not None]:
            vectors = [_vector(graph, value, found.channels, before=end) for value in (scale, bias)]
            epsilon = found.norm.attributes.get_float("epsilon", 1e-5)
            node = ir.node(
                "GroupNormalization",
                [found.data, *vectors],
                attributes={"num_groups": found.groups, "epsilon": epsilon},
                name=f"{found.norm.name}_group",
            )
            graph.insert_before(end, node)
            redirect(end.outputs[0], node.outputs[0])
            graph.remove(end, safe=True)
        RemoveUnusedNodesPass()(model)
        FoldWeightMovesPass()(model)
        return PassResult(model, modified=True)


class InstanceGroupNormPass(InPlacePass):
    """Write GroupNormalization as ONNX Runtime's CUDA provider and its fusions want it: the way back.

        before   GroupNormalization(x, scale, bias; num_groups = 32)
        after    Reshape(x, [0, 32, -1]) -> InstanceNormalization by ones and zeros -> Reshape(y, Shape(x))
                 -> Mul by scale -> Add of bias

    Equal up to rounding. The opset stays.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        matches = [node for node in model.graph if node.op_type == "GroupNormalization" and _is_affine_native(node)]
        for node in matches:
            _expand(model.graph, node)
        if matches:
            FoldWeightMovesPass()(model)
        return PassResult(model, modified=bool(matches))


def _group_norm(node: ir.Node) -> _GroupNorm | None:
    """The group norm around an InstanceNormalization of opset 18's form."""
    to_groups = producer(node.inputs[0], "Reshape") if node.op_type == "InstanceNormalization" else None
    back = consumer(node.outputs[0], "Reshape") if to_groups is not None else None
    data = to_groups.inputs[0] if to_groups is not None else None
    if to_groups is None or back is None or data is None or data.shape is None or len(data.shape) < 3:
        return None
    ones, zeros, channels = small_constant(node.inputs[1]), small_constant(node.inputs[2]), data.shape[1]
    if ones is None or zeros is None or not isinstance(channels, int) or not ((ones == 1).all() and (zeros == 0).all()):
        return None
    rank, groups = len(data.shape), ones.size
    free = [0] * (rank - 3)
    if ints_of(to_groups.inputs[1]) not in ([0, groups, -1], [0, groups, -1, *free]):
        return None
    shape = producer(back.inputs[1], "Shape")
    whole = shape is not None and shape.inputs[0] is data and not shape.attributes.get_int("start", 0)
    if not (whole and shape and "end" not in shape.attributes) and ints_of(back.inputs[1]) != [0, channels, -1, *free]:
        return None
    return _GroupNorm(data, to_groups, node, back, groups, channels, rank)


def _affine_group_norm(node: ir.Node) -> tuple[_GroupNorm, ir.Node, ir.Value, ir.Value] | None:
    """A group norm with its scale and bias of one number a channel, and the node that adds the bias."""
    found = _group_norm(node)
    scaled = consumer(found.back.outputs[0], "Mul") if found is not None else None
    end = consumer(scaled.outputs[0], "Add") if scaled is not None else None
    if found is None or scaled is None or end is None:
        return None
    scale, bias = _of_channels(scaled, found), _of_channels(end, found)
    return None if scale is None or bias is None else (found, end, scale, bias)


def _of_channels(node: ir.Node, found: _GroupNorm) -> ir.Value | None:
    """The weight of a Mul or an Add, if it broadcasts one number a channel."""
    shapes = ([found.channels, *[1] * (found.rank - 2)], [1, found.channels, *[1] * (found.rank - 2)])
    for value in node.inputs:
        if value is not None and is_weight(value) and list(value.shape or ()) in shapes:
            return value
    return None


def _vector(graph: ir.Graph, weight: ir.Value, channels: int, *, before: ir.Node) -> ir.Value:
    return _reshaped(graph, weight, (channels,), before=before, name=f"{weight.name}_vector")


def _reshaped(graph: ir.Graph, value: ir.Value, sizes: tuple[int, ...], *, before: ir.Node, name: str) -> ir.Value:
    return insert(
        graph,
        "Reshape",
        [value, integers(graph, sizes)],
        before=before,
        name=name,
        shape=ir.Shape(sizes),
        dtype=value.dtype,
    )


def _expand(graph: ir.Graph, node: ir.Node) -> None:
    """Put InstanceNormalization and what it needs in the place of a GroupNormalization."""
    data, scale, bias = node.inputs
    result, groups = node.outputs[0], node.attributes.get_int("num_groups", 1)
    if data is None or data.shape is None or data.dtype is None or scale is None or bias is None:
        return
    sizes = list(data.shape)
    grouped = ir.Shape([sizes[0], groups, None])
    name = str(result.name)

    def put(op_type: str, inputs: list[ir.Value], word: str, shape: ir.Shape, **attributes: float) -> ir.Value:
        return insert(
            graph,
            op_type,
            inputs,
            before=node,
            name=f"{name}_{word}",
            shape=shape,
            dtype=ir.DataType.INT64 if op_type == "Shape" else data.dtype,
            attributes=attributes,
        )

    units = [_filled(graph, number, groups, data.dtype) for number in (1, 0)]
    flat = put("Reshape", [data, integers(graph, (0, groups, -1))], "groups", grouped)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    normed = put("InstanceNormalization", [flat, *units], "normed", grouped, epsilon=epsilon)
    shape = put("Shape", [data], "shape", ir.Shape([len(sizes)]))
    back = put("Reshape", [normed, shape], "back", data.shape)
    channels = (-1, *[1] * (len(sizes) - 2))
    factors = [
        _reshaped(graph, weight, channels, before=node, name=f"{weight.name}_channels") for weight in (scale, bias)
    ]
    scaled = put("Mul", [back, factors[0]], "scaled", data.shape)
    made = put("Add", [scaled, factors[1]], "biased", data.shape)
    redirect(result, made)
    graph.remove(node, safe=True)


def _filled(graph: ir.Graph, number: int, count: int, dtype: ir.DataType) -> ir.Value:
    """An initializer of `count` times the same number, shared by all that ask for the same."""
    name = f"{'ones' if number else 'zeros'}_{count}_{dtype.name.lower()}"
    if name not in graph.initializers:
        tensor = ir.tensor(np.full(count, number, dtype.numpy()), name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([count]), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _is_affine_native(node: ir.Node) -> bool:
    """Whether a GroupNormalization has all that its expansion needs: a static number of channels, and weights."""
    data = node.inputs[0]
    known = data is not None and data.dtype is not None and data.shape is not None and isinstance(data.shape[1], int)
    return known and is_weight(node.inputs[1]) and is_weight(node.inputs[2])
