"""The largest absolute value of every tensor in a graph, found by running it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from latentrt.runtime.specs import Array

from .half_rounding import HALVES, HalfRoundingPass, session_beside

# Attention masks hold float32's lowest number in place of minus infinity; such stand-ins are no activations.
MASK_VALUE = 1e37
_SUFFIX = "::absmax"


def activation_ranges(path: Path, feeds: Iterable[Mapping[str, Array]]) -> dict[str, float]:
    """Max |x| of every float tensor of a graph, in float32: what would overflow in half shows by how much.

    Args:
        path: a graph in any precision. One in half runs with its own weights, without its rounding; its tensors have
            the names of the fp32 graph it was made from.
        feeds: the inputs of each run.

    Returns:
        Tensor name -> max |x| over all runs, in topological order.

    Raises:
        ArtifactError: ONNX Runtime cannot load the graph.
    """
    return recorded_runs(path, feeds, rounding=False)[1]


def recorded_runs(
    path: Path, feeds: Iterable[Mapping[str, Array]], *, rounding: bool
) -> tuple[list[dict[str, Array]], dict[str, float]]:
    """Run a graph and record max |x| of every float tensor a node makes.

    The maxima are taken inside the graph, so that no intermediate tensor outlives its use: the cost in memory is
    that of a plain run.

    Args:
        path: a graph in any precision.
        feeds: the inputs of each run.
        rounding: round as the graph does, see `half_rounding`. A tensor's maximum is that before its own rounding, so
            that whatever is infinite was made by one that is beyond the half type's range.

    Returns:
        The graph's outputs of every run, and the maxima over all runs, in topological order.

    Raises:
        ArtifactError: ONNX Runtime cannot load the graph.
    """
    model = ir.load(path)
    HalfRoundingPass(rounding=rounding)(model)
    names = _add_maxima(model)
    session = session_beside(model, path)
    ranges = dict.fromkeys(names, 0.0)
    runs = []
    for feed in feeds:
        outputs = session(feed)
        for name in names:
            # maximum() keeps a NaN, which max() may drop.
            ranges[name] = float(np.maximum(ranges[name], outputs.pop(name + _SUFFIX)))
        runs.append(outputs)
    return runs, ranges


def _add_maxima(model: ir.Model) -> list[str]:
    """Add the maxima of all tensors to the graph's outputs, each computed right behind its tensor."""
    graph = model.graph
    limit = ir.Value(name="absmax_limit", const_value=ir.tensor(np.float32(MASK_VALUE), name="absmax_limit"))
    zero = ir.Value(name="absmax_zero", const_value=ir.tensor(np.float32(0), name="absmax_zero"))
    graph.register_initializer(limit)
    graph.register_initializer(zero)
    values = [value for node in graph if not _is_copy(node) for value in node.outputs]
    values = [value for value in values if value.dtype == ir.DataType.FLOAT and value.name]
    for value in values:
        magnitude = ir.node("Abs", [value])
        masked = ir.node("Greater", [magnitude.outputs[0], limit])
        kept = ir.node("Where", [masked.outputs[0], zero, magnitude.outputs[0]])
        largest = ir.node("ReduceMax", [kept.outputs[0]], attributes={"keepdims": 0})
        producer = value.producer()
        assert producer is not None
        graph.insert_after(producer, [magnitude, masked, kept, largest])
        out = largest.outputs[0]
        out.name, out.type, out.shape = f"{value.name}{_SUFFIX}", ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.outputs.append(out)
    return [str(value.name) for value in values]


def _is_copy(node: ir.Node) -> bool:
    """Whether a node only casts a weight, or a tensor that was rounded back."""
    casts = node.op_type == "Cast"
    return casts and all(v is not None and (v.is_initializer() or v.dtype in HALVES) for v in node.inputs)
