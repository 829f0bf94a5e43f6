"""The largest absolute value of every tensor in a graph, found by running it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from latentrt.runtime.session import OnnxSession
from latentrt.runtime.specs import Array

# Attention masks hold float32's lowest number in place of minus infinity; such stand-ins are no activations.
MASK_VALUE = 1e37
_SUFFIX = "::absmax"


def activation_ranges(path: Path, feeds: Iterable[Mapping[str, Array]]) -> dict[str, float]:
    """Run a graph and record max |x| of every float32 tensor a node makes.

    The maxima are taken inside the graph, so that no intermediate tensor outlives its use: the cost in memory is
    that of a plain run.

    Args:
        path: an fp32 graph.
        feeds: the inputs of each run.

    Returns:
        Tensor name -> max |x| over all runs, in topological order.

    Raises:
        ArtifactError: ONNX Runtime cannot load the graph.
    """
    model = ir.load(path)
    names = _add_maxima(model)
    # Beside the original, because that is where its external data is.
    probe = path.with_name(f".{path.name}.{uuid.uuid4().hex}.probe")
    try:
        ir.save(model, probe)
        session = OnnxSession(probe)
        ranges = dict.fromkeys(names, 0.0)
        for feed in feeds:
            outputs = session(feed)
            for name in names:
                # maximum() keeps a NaN, which max() may drop.
                ranges[name] = float(np.maximum(ranges[name], outputs[name + _SUFFIX]))
    finally:
        probe.unlink(missing_ok=True)
    return ranges


def _add_maxima(model: ir.Model) -> list[str]:
    graph = model.graph
    limit = ir.Value(name="absmax_limit", const_value=ir.tensor(np.float32(MASK_VALUE), name="absmax_limit"))
    zero = ir.Value(name="absmax_zero", const_value=ir.tensor(np.float32(0), name="absmax_zero"))
    graph.register_initializer(limit)
    graph.register_initializer(zero)
    values = [v for node in graph for v in node.outputs if v.dtype == ir.DataType.FLOAT and v.name]
    graph.outputs.clear()
    for value in values:
        magnitude = ir.node("Abs", [value])
        masked = ir.node("Greater", [magnitude.outputs[0], limit])
        kept = ir.node("Where", [masked.outputs[0], zero, magnitude.outputs[0]])
        largest = ir.node("ReduceMax", [kept.outputs[0]], attributes={"keepdims": 0})
        graph.extend([magnitude, masked, kept, largest])
        out = largest.outputs[0]
        out.name, out.type, out.shape = f"{value.name}{_SUFFIX}", ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        graph.outputs.append(out)
    return [str(value.name) for value in values]
