"""An fp32 graph in half precision, with float32 inputs and outputs, and the check that nothing overflows.

Every float tensor becomes float16 except two kinds. The sines and cosines of the timestep stay float32, with all
they are made from: at t = 981 a float16 is 0.5 apart from its neighbour, and the angle would be noise (diffusers
computes them in float32 for the same reason). Scales of a Resize stay float32 because ONNX says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from latentrt.runtime.errors import ExportError

from .activation_range import MASK_VALUE

HALF_MAX = float(np.finfo(np.float16).max)
HALF_TINY = float(np.finfo(np.float16).smallest_subnormal)
# Operators that only move elements: behind a float32 island they stay in it, so that one Cast ends it.
_MOVES = frozenset({"Concat", "Slice", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity", "Flatten"})

# Operators that read no elements: a Cast before them would only be work.
_TYPELESS = frozenset({"Shape", "Size"})


class Float16Pass(InPlacePass):
    """Convert a graph's float32 arithmetic to float16.

        before   sample (f32) -> Conv -> ... -> out_sample (f32)
        after    sample (f32) -> Cast -> Conv (f16) -> ... -> Cast -> out_sample (f32)

    Weights that would become zero are raised to the smallest float16 instead, so that an epsilon stays one;
    stand-ins for infinity (attention masks) become float16's largest number.

    Raises:
        ExportError: a weight is beyond float16's range, or the graph has subgraphs.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Convert; `modified` is always True."""
        LiftConstantsToInitializersPass(lift_all_constants=True)(model)
        if any(value.dtype is None for node in model.graph for value in node.outputs):
            ShapeInferencePass()(model)
        island = float32_island(model)
        halves: dict[str, ir.Value] = {}
        for node in list(model.graph):
            if node in island or node.op_type in _TYPELESS:
                continue
            if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
                raise ExportError(f"fp16: expected a graph without control flow, got a subgraph in {node.name}.")
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype == ir.DataType.FLOAT and index not in _float_inputs(node):
                    node.replace_input_with(index, _half(model.graph, value, halves, before=node))
            _retype(node)
        _restore_outputs(model.graph)
        _drop_unused(model.graph, halves)
        return PassResult(model, modified=True)


def _half(graph: ir.Graph, value: ir.Value, halves: dict[str, ir.Value], *, before: ir.Node) -> ir.Value:
    """The float16 counterpart of a float32 value: a converted weight, or a Cast placed before its first use."""
    name = str(value.name)
    if name in halves:
        return halves[name]
    if value.const_value is not None:
        half = ir.Value(name=f"{name}_f16", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT16))
        half.const_value = ir.tensor(half_of(value.const_value.numpy(), name=name), name=half.name)
        graph.register_initializer(half)
    else:
        cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT16}, name=f"{name}_to_f16")
        half = cast.outputs[0]
        half.name, half.shape, half.type = f"{name}_f16", value.shape, ir.TensorType(ir.DataType.FLOAT16)
        graph.insert_before(before, cast)
    halves[name] = half
    return half


def _retype(node: ir.Node) -> None:
    """Declare a node's float32 results float16, in its attributes too."""
    for value in node.outputs:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    for name in ("to", "dtype"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.as_int() == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT16)
    fill = node.attributes.get("value")
    if fill is not None and fill.type == ir.AttributeType.TENSOR and fill.as_tensor().dtype == ir.DataType.FLOAT:
        array = half_of(fill.as_tensor().numpy(), name=str(node.name))
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))


def _restore_outputs(graph: ir.Graph) -> None:
    for index, value in enumerate(list(graph.outputs)):
        if value.dtype != ir.DataType.FLOAT16:
            continue
        name = str(value.name)
        cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, name=f"{name}_to_f32")
        out = cast.outputs[0]
        value.name = f"{name}_f16"
        out.name, out.shape, out.type = name, value.shape, ir.TensorType(ir.DataType.FLOAT)
        graph.append(cast)
        graph.outputs[index] = out


def _drop_unused(graph: ir.Graph, halves: Mapping[str, ir.Value]) -> None:
    """Remove float32 weights that nothing reads now; their halves take their names, which refitting goes by."""
    for name in [name for name, weight in graph.initializers.items() if not weight.uses()]:
        del graph.initializers[name]
        if name in halves:
            halves[name].name = name


def float32_island(model: ir.Model) -> set[ir.Node]:
    """The nodes that stay in float32: sines, cosines and sizes, what they are made from, and moves of their results."""
    pending = [node for node in model.graph if node.op_type in ("Sin", "Cos")]
    for node in model.graph:
        pending += [p for i in _float_inputs(node) if i < len(node.inputs) and (p := _producer(node.inputs[i]))]
    island: set[ir.Node] = set()
    while pending:
        node = pending.pop()
        if node in island or not any(value.dtype == ir.DataType.FLOAT for value in node.outputs):
            continue
        island.add(node)
        pending += [producer for value in node.inputs if (producer := _producer(value)) is not None]
    for node in model.graph:
        floats = [value for value in node.inputs if value is not None and value.dtype == ir.DataType.FLOAT]
        if node.op_type in _MOVES and floats and all(_producer(value) in island for value in floats):
            island.add(node)
    return island


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _float_inputs(node: ir.Node) -> tuple[int, ...]:
    """The inputs that ONNX wants in float32 whatever the data is: roi and scales of a Resize."""
    return (1, 2) if node.op_type == "Resize" else ()


def half_of(array: NDArray[Any], *, name: str) -> NDArray[np.float16]:
    """float32 to float16 with the edges of the range handled; see Float16Pass.

    Raises:
        ExportError: a finite value is beyond float16's range.
    """
    stand_in = np.isfinite(array) & (np.abs(array) >= MASK_VALUE)
    beyond = np.isfinite(array) & ~stand_in & (np.abs(array) > HALF_MAX)
    if beyond.any():
        raise ExportError(
            f"fp16: expected weights within {HALF_MAX:g}, got {np.abs(array[beyond]).max():g} in {name}. "
            "Export this component in fp32 only."
        )
    half = np.clip(array, -HALF_MAX, HALF_MAX, where=~np.isinf(array), out=array.copy()).astype(np.float16)
    flushed = (half == 0) & (array != 0)
    half[flushed] = np.copysign(np.float16(HALF_TINY), array[flushed]).astype(np.float16)
    return half


def cast_count(model: ir.Model) -> int:
    """How many Cast nodes a graph holds."""
    return sum(node.op_type == "Cast" for node in model.graph)


def check_overflow(model: ir.Model, ranges: Mapping[str, float], *, name: str) -> list[dict[str, Any]]:
    """Hold the fp32 graph's activations to float16's range.

    ONNX Runtime's CPU computes many float16 operators in float32 inside, so a run of the fp16 graph there does not
    show every overflow that a GPU would have. The fp32 activations do.

    Args:
        model: the fp32 graph.
        ranges: max |x| of its tensors, from `activation_ranges`.
        name: of the component, for the message.

    Returns:
        The three tensors nearest to overflow, largest first: {"tensor", "max_abs"}.

    Raises:
        ExportError: a tensor exceeds float16's range; names the first in topological order and the largest.
    """
    island = float32_island(model)
    halved = {str(value.name) for node in model.graph if node not in island for value in node.outputs}
    reached = {tensor: value for tensor, value in ranges.items() if tensor in halved}
    nearest = sorted(reached, key=lambda tensor: reached[tensor], reverse=True)[:3]
    summary = [{"tensor": tensor, "max_abs": reached[tensor]} for tensor in nearest]
    first = next((tensor for tensor, value in reached.items() if not value <= HALF_MAX), None)
    if first is not None:
        largest = ", ".join(f"{item['tensor']} {item['max_abs']:.4g}" for item in summary)
        raise ExportError(
            f"{name} fp16: expected activations within {HALF_MAX:g}, got {reached[first]:.4g} first in {first} "
            f"(largest: {largest}). It would give black pictures: export this component in fp32 only."
        )
    return summary
