"""Small graphs written as text, with weights that are read lazily, and whole ones run side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from latentrt.export.lazy_weight import lazy_tensor
from latentrt.export.weights import Values, Weight
from latentrt.runtime.session import OnnxSession


def model_of(text: str, weights: Mapping[str, Values] | None = None, *, reads: list[str] | None = None) -> ir.Model:
    """The graph of a text in ONNX's own notation, its shapes inferred.

    Args:
        text: "<opset_import…> name (inputs) => (outputs) { nodes }", the opset 20 if it is left out.
        weights: initializers, which the graph reads lazily as it does a checkpoint's.
        reads: the name of a weight is appended whenever its values are read.
    """
    header = "" if text.lstrip().startswith("<") else '<ir_version: 10, opset_import: ["" : 20]>'
    proto = onnx.parser.parse_model(header + text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, name) for name, v in (weights or {}).items())
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))

    def reader(name: str, values: Values) -> Callable[[], Values]:
        def read() -> Values:
            if reads is not None:
                reads.append(name)
            return values

        return read

    for name, values in (weights or {}).items():
        weight = Weight(values.shape, values.dtype, reader(name, values))
        model.graph.initializers[name].const_value = lazy_tensor(weight, name)
    return model


def run(model: ir.Model, folder: Path, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of a graph, which must be valid, as `outputs_of` has them."""
    path = folder / "model.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    return outputs_of(path, feeds)


def outputs_of(path: Path, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of a graph in ONNX Runtime as it is written: its own optimizer changes the last bits."""
    return dict(OnnxSession(path, optimize=False)(feeds))


def counts(model: ir.Model) -> Counter[str]:
    """Nodes by operator."""
    return Counter(node.op_type for node in model.graph)
