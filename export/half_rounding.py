"""What half precision costs, measured where no operator computes in it.

ONNX Runtime's CPU has few float16 kernels and no bfloat16 ones: it runs most operators of an fp16 graph in float32
and drops the casts between neighbours, so that whole chains are never rounded and the error comes out ten times too
small. Here a half-precision graph computes in float32 and rounds to its own types after every operator. Sums inside
an operator stay float32, as on tensor cores. The weights are the graph's own initializers, cast when they are used:
a check of gigabytes needs no second copy of them, on disk or in memory.
"""

from __future__ import annotations

import uuid
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from latentrt.runtime.session import OnnxSession

from .float32_nodes import MOVES

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# No attention mask is larger; weights that are need not be looked through.
_MASK_BYTES = 2**20


class HalfRoundingPass(InPlacePass):
    """Let a half-precision graph compute in float32, rounded where it was half.

        before   x (f16) -> Conv(w f16) -> y (f16)
        after    x (f32) -> Conv(Cast(w)) -> Cast float16 -> Cast float32 -> y (f32)

    Its numbers are those of a machine that computes each operator in float32 and stores its results in half.
    Requires that no optimizer removes the pairs of Casts or folds those of the weights, as in `session_beside`.

    Args:
        rounding: False leaves the rounding away: the graph's own weights in float32 arithmetic, with the stand-ins
            for infinity in its masks as float32 has them.
    """

    def __init__(self, *, rounding: bool = True) -> None:
        super().__init__()
        self.rounding = rounding

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite; `modified` says whether anything was in half precision."""
        graph = model.graph
        nodes = list(graph)
        weights = [value for value in graph.initializers.values() if value.dtype in HALVES]
        modified = bool(weights)
        for weight in weights:
            if self.rounding or not _restore_mask(weight):
                _cast_where_read(graph, weight)
        for node in nodes:
            for value in node.outputs:
                if value.dtype in HALVES:
                    modified = True
                    self._widen(graph, node, value)
        return PassResult(model, modified=modified)

    def _widen(self, graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
        """Make a half value float32, rounded to what it was."""
        half = value.dtype
        assert half is not None
        value.type = ir.TensorType(ir.DataType.FLOAT)
        for name in ("to", "dtype"):
            if name in node.attributes:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
        fill = node.attributes.get("value")
        if fill is not None and fill.type == ir.AttributeType.TENSOR:
            array = fill.as_tensor().numpy().astype("float32")
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
        if not self.rounding or node.op_type in MOVES:
            return
        down = ir.node("Cast", [value], attributes={"to": half})
        down.outputs[0].type = ir.TensorType(half)
        up = ir.node("Cast", [down.outputs[0]], attributes={"to": ir.DataType.FLOAT})
        rounded = up.outputs[0]
        rounded.name, rounded.type, rounded.shape = f"{value.name}_rounded", value.type, value.shape
        for reader, index in [*value.uses()]:
            if reader is not down:
                reader.replace_input_with(index, rounded)
        graph.insert_after(node, [down, up])


def _restore_mask(weight: ir.Value) -> bool:
    """Make a weight that holds the half type's largest number float32, with float32's in its place."""
    tensor = weight.const_value
    if tensor is None or tensor.nbytes > _MASK_BYTES:
        return False
    values = tensor.numpy().astype(np.float32)
    stand_ins = np.abs(values) == np.float32(tensor.dtype.max)
    if not stand_ins.any():
        return False
    values[stand_ins] = np.copysign(np.finfo(np.float32).max, values[stand_ins])
    weight.const_value, weight.type = ir.tensor(values, name=weight.name), ir.TensorType(ir.DataType.FLOAT)
    return True


def _cast_where_read(graph: ir.Graph, weight: ir.Value) -> None:
    """A Cast of its own before every reader, so that no float32 copy outlives the operator it is for."""
    for node, index in [*weight.uses()]:
        cast = ir.node("Cast", [weight], attributes={"to": ir.DataType.FLOAT})
        out = cast.outputs[0]
        out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), weight.shape
        node.replace_input_with(index, out)
        graph.insert_before(node, cast)


def session_beside(model: ir.Model, path: Path) -> OnnxSession:
    """A session of a changed graph whose weights lie in the files of the one that it was made from.

    Nothing is optimized: ONNX Runtime would fold the weights' Casts, and hold all weights in float32.

    Args:
        model: loaded from `path` and changed.
        path: where the graph is written beside while it is loaded.

    Raises:
        ArtifactError: ONNX Runtime cannot load the graph.
    """
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.probe")
    try:
        ir.save(model, scratch)
        return OnnxSession(scratch, optimize=False)
    finally:
        scratch.unlink(missing_ok=True)
