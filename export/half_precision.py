"""An fp32 graph in half precision, with float32 inputs and outputs.

Every float tensor becomes float16 or bfloat16 except in the nodes that `float32_nodes` keeps. Weights are converted
when they are read, one at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from latentrt.runtime.errors import ExportError
from latentrt.runtime.half import rounded_half, without_new_zeros

from .activation_range import MASK_VALUE
from .float32_nodes import TYPELESS, float32_nodes, float_inputs
from .lazy_weight import derived

# The type that a precision's graphs are converted to.
HALF_TYPES: Mapping[str, ir.DataType] = {
    "fp16": ir.DataType.FLOAT16,
    "mixed": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
HALF_MAX = float(np.finfo(np.float16).max)
# The first opset in which a convolution and an instance normalization may be bfloat16, and the oldest IR it goes with.
_BFLOAT16_OPSET, _BFLOAT16_IR = 22, 10


class HalfPrecisionPass(InPlacePass):
    """Convert a graph's float32 arithmetic to float16 or bfloat16.

        before   sample (f32) -> Conv -> ... -> out_sample (f32)
        after    sample (f32) -> Cast -> Conv (f16) -> ... -> Cast -> out_sample (f32)

    Weights that would become zero are raised to the smallest number instead, so that an epsilon stays one; stand-ins
    for infinity (attention masks) become the type's largest number. A weight outside the type's range is an
    ExportError when it is read.

    A bfloat16 graph declares opset 22, the first that has such convolutions.

    Args:
        dtype: FLOAT16 or BFLOAT16.
        keep: names of tensors that stay float32, with the nodes that make and read them; see `mixed_keep`.

    Raises:
        ExportError: the graph has subgraphs, or cannot be bfloat16 in its opset.
    """

    def __init__(self, dtype: ir.DataType = ir.DataType.FLOAT16, keep: Collection[str] = ()) -> None:
        super().__init__()
        self.dtype, self.keep = dtype, frozenset(keep)

    def call(self, model: ir.Model) -> PassResult:
        """Convert; `modified` is always True."""
        LiftConstantsToInitializersPass(lift_all_constants=True)(model)
        if any(value.dtype is None for node in model.graph for value in node.outputs):
            ShapeInferencePass()(model)
        if self.dtype == ir.DataType.BFLOAT16:
            _raise_opset(model)
        _Conversion(model, self.dtype, self.keep).run()
        return PassResult(model, modified=True)


class _Conversion:
    """One graph on its way, with what it holds in the other type so far, by name."""

    def __init__(self, model: ir.Model, dtype: ir.DataType, keep: Collection[str]) -> None:
        self.graph, self.dtype = model.graph, dtype
        self.full = float32_nodes(model, keep)
        self.halves: dict[str, ir.Value] = {}
        self.floats: dict[str, ir.Value] = {}

    def run(self) -> None:
        for node in list(self.graph):
            if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
                raise ExportError(f"half precision: expected no control flow, got a subgraph in {node.name}.")
            if node.op_type in TYPELESS:
                continue
            wide = node in self.full
            for index, value in enumerate(node.inputs):
                if value is None:
                    continue
                if wide and value.dtype == self.dtype:
                    node.replace_input_with(index, self._float(value, before=node))
                elif not wide and value.dtype == ir.DataType.FLOAT and index not in float_inputs(node):
                    node.replace_input_with(index, self._half(value, before=node))
            if not wide:
                _retype(node, self.dtype)
        self._restore_outputs()
        self._drop_unused()

    def _half(self, value: ir.Value, *, before: ir.Node) -> ir.Value:
        """The half of a float32 value: a converted weight, or a Cast placed before its first use."""
        name, weight = str(value.name), value.const_value
        if name not in self.halves:
            half_name = f"{name}_{self.dtype.short_name()}"
            if weight is None:
                half = self._cast(value, self.dtype, half_name)
                self.graph.insert_before(before, _maker(half))
            else:
                half = ir.Value(name=half_name, shape=value.shape, type=ir.TensorType(self.dtype))
                half.const_value = _half_weight(weight, self.dtype, name)
                self.graph.register_initializer(half)
            self.halves[name] = half
        return self.halves[name]

    def _float(self, value: ir.Value, *, before: ir.Node) -> ir.Value:
        """The float32 counterpart of a half value: a Cast placed before its first use."""
        name = str(value.name)
        if name not in self.floats:
            self.floats[name] = self._cast(value, ir.DataType.FLOAT, f"{name}_f32")
            self.graph.insert_before(before, _maker(self.floats[name]))
        return self.floats[name]

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        cast = ir.node("Cast", [value], attributes={"to": dtype}, name=f"{value.name}_to_{dtype.short_name()}")
        out = cast.outputs[0]
        out.name, out.shape, out.type = name, value.shape, ir.TensorType(dtype)
        return out

    def _restore_outputs(self) -> None:
        for index, value in enumerate(list(self.graph.outputs)):
            if value.dtype != self.dtype:
                continue
            name = str(value.name)
            out = self.floats.get(name)
            if out is None:
                out = self._cast(value, ir.DataType.FLOAT, name)
                self.graph.append(_maker(out))
            value.name, out.name = f"{name}_{self.dtype.short_name()}", name
            self.graph.outputs[index] = out

    def _drop_unused(self) -> None:
        """Remove float32 weights that nothing reads now; their halves take their names, which refitting goes by."""
        for name in [name for name, weight in self.graph.initializers.items() if not weight.uses()]:
            del self.graph.initializers[name]
            if name in self.halves:
                self.halves[name].name = name


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _half_weight(weight: ir.TensorProtocol, dtype: ir.DataType, name: str) -> ir.LazyTensor:
    return derived(
        [weight],
        lambda array: half_of(array, dtype, name=name),
        shape=weight.shape.numpy(),
        dtype=dtype,
        name=name,
    )


def _retype(node: ir.Node, dtype: ir.DataType) -> None:
    """Declare a node's float32 results half, in its attributes too."""
    for value in node.outputs:
        if value.dtype == ir.DataType.FLOAT:
            value.type = ir.TensorType(dtype)
    for name in ("to", "dtype"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.as_int() == ir.DataType.FLOAT:
            node.attributes[name] = ir.AttrInt64(name, dtype)
    fill = node.attributes.get("value")
    if fill is not None and fill.type == ir.AttributeType.TENSOR and fill.as_tensor().dtype == ir.DataType.FLOAT:
        array = half_of(fill.as_tensor().numpy(), dtype, name=str(node.name))
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))


def _raise_opset(model: ir.Model) -> None:
    """Declare the opset that has bfloat16 everywhere; the operators between differ in their types alone."""
    found = model.opset_imports[""]
    if found >= _BFLOAT16_OPSET:
        return
    if found < 20 or (found < 21 and any(node.op_type == "GroupNormalization" for node in model.graph)):
        raise ExportError(
            f"bf16: expected opset {_BFLOAT16_OPSET}, or one from 20 on without GroupNormalization, whose meaning "
            f"changed in 21, got {found}. Export with --opset {_BFLOAT16_OPSET}."
        )
    model.graph.opset_imports[""] = _BFLOAT16_OPSET
    model.ir_version = max(model.ir_version, _BFLOAT16_IR)


def half_of(array: NDArray[Any], dtype: ir.DataType, *, name: str) -> NDArray[Any]:
    """float32 to float16 or bfloat16 with the edges of the range handled; see HalfPrecisionPass.

    Raises:
        ExportError: a finite value is beyond the type's range.
    """
    largest = float(dtype.max)
    # Most weights have neither edge: they are looked through once for the range and once for zeros.
    if array.size and not (array.min() >= -largest and array.max() <= largest):
        array = _within(array, dtype, name)
    if dtype == ir.DataType.FLOAT16:  # ten times as fast as NumPy
        return without_new_zeros(array, torch.from_numpy(np.require(array, requirements=("C", "W"))).half().numpy())
    return rounded_half(array, dtype.numpy())


def _within(array: NDArray[Any], dtype: ir.DataType, name: str) -> NDArray[Any]:
    """The array with stand-ins for infinity as the type has them."""
    largest = float(dtype.max)
    stand_in = np.isfinite(array) & (np.abs(array) >= MASK_VALUE)
    beyond = np.isfinite(array) & ~stand_in & (np.abs(array) > largest)
    if beyond.any():
        raise ExportError(
            f"{dtype.name.lower()}: expected weights within {largest:g}, got {np.abs(array[beyond]).max():g} in "
            f"{name}. Export this component in bf16 or fp32."
        )
    return np.clip(array, -largest, largest, where=~np.isinf(array), out=array.copy())


def cast_count(model: ir.Model) -> int:
    """How many Cast nodes a graph holds."""
    return sum(node.op_type == "Cast" for node in model.graph)
