"""From a wrapped module to an ONNX graph that says nothing about the machine that made it."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript.optimizer import optimize_ir

from latentrt.runtime.errors import ExportError
from latentrt.runtime.manifest import key_of
from latentrt.runtime.specs import Array, ModelSpec, TensorSpec

from .attention_scale import AttentionScalePass, scales_after_matmul
from .component import Component, weights_of
from .gelu import GeluPass
from .group_norm import ShapeFreeGroupNormPass
from .key_transpose import KeyTransposePass
from .lazy_weight import lazy_tensor
from .opset import DEFAULT_OPSET
from .shape_arithmetic import ShapeArithmeticPass
from .silu import SiluPass
from .timestep_rows import TimestepRowsPass
from .tool_versions import GRAPH_REVISION, GRAPH_TOOLS, tool_versions
from .trace_cache import cached
from .weight_moves import FoldWeightMovesPass
from .weights import Weight, as_float32


@contextmanager
def _exporter_quiet() -> Iterator[None]:
    """Hold back the exporter's chatter about torchvision and its own deprecations."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def to_onnx(component: Component, *, opset: int = DEFAULT_OPSET, cache: Path | None = None) -> ir.Model:
    """A component's graph, made by `torch.onnx.export(dynamo=True)` and cleaned; its weights are not read yet.

    The module is traced without its weights, so that the cost is that of the graph. Dimension names are those of the
    component's spec; stack traces and exporter metadata are gone, so the same weights give the same bytes; weights
    have their parameters' names and lie as the graph reads them; attention is scaled before its first matmul.

    Args:
        component: its module may be on the meta device.
        opset: of the default ONNX domain.
        cache: a folder of graphs without weights, by architecture and tools, where to look first.

    Raises:
        ExportError: the exporter failed, or the graph's inputs and outputs are not those of the spec.
    """
    data = cached(cache, _identity(component, opset), lambda: _traced(component, opset))
    model = ir.from_proto(onnx.load_from_string(data))
    weights, _ = weights_of(component)
    for value in list(model.graph.inputs)[len(component.spec.inputs) :]:
        model.graph.inputs.remove(value)
        value.const_value = lazy_tensor(as_float32(weights[str(value.name)]), str(value.name))
        model.graph.register_initializer(value)
    passes = (
        FoldWeightMovesPass(),
        RemoveUnusedNodesPass(),
        ShapeArithmeticPass(),
        SiluPass(),
        GeluPass(),
        ShapeFreeGroupNormPass(),
        RemoveUnusedNodesPass(),
    )
    for graph_pass in passes:
        graph_pass(model)
    return model


def graph_key(component: Component, opset: int) -> str:
    """The key of a component's graph in a cache; its weights have no part in it."""
    return key_of(_identity(component, opset))


def _identity(component: Component, opset: int) -> dict[str, Any]:
    """What decides about a component's graph, its weights apart."""
    module = component.module
    return {
        "component": component.spec.name,
        "module": f"{type(module).__module__}.{type(module).__qualname__}",
        "config": dict(component.config),
        "parameters": {name: list(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()},
        "inputs": [[tensor.name, list(tensor.shape)] for tensor in component.spec.inputs],
        "outputs": [[tensor.name, list(tensor.shape)] for tensor in component.spec.outputs],
        "opset": opset,
        "tools": {**tool_versions(GRAPH_TOOLS), "graph_revision": str(GRAPH_REVISION)},
    }


def _traced(component: Component, opset: int) -> bytes:
    """The graph with its weights as inputs behind its own, serialized."""
    spec = component.spec
    weights, buffers = weights_of(component)
    module = copy.deepcopy(component.module).to("meta")
    examples, dynamic = _arguments(component)
    try:
        with _exporter_quiet(), torch.no_grad():
            # Traced here, because torch.onnx traces U-Nets twice: its first way, with sizes of one in view, fails on
            # their shape arithmetic.
            traced = torch.export.export(module, (), kwargs=examples, dynamic_shapes=dynamic, strict=False)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=opset,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                external_data=False,
                verbose=False,
                optimize=False,
            )
            if program is None:
                raise ExportError("got no ONNX program")
            model: ir.Model = program.model
            _optimize(model, weights, buffers)
    except (MemoryError, OSError):
        raise
    except Exception as err:
        raise ExportError(f"{spec.name}: expected torch.onnx to export it, got {type(err).__name__}: {err}") from err
    _apply_spec(model, spec)
    for graph_pass in (TimestepRowsPass(), KeyTransposePass(), AttentionScalePass(), RemoveUnusedNodesPass()):
        graph_pass(model)
    if late := scales_after_matmul(model):
        raise ExportError(f"{spec.name}: expected attention scaled before its first matmul, got a scale after {late}.")
    _strip_metadata(model)
    model.producer_name, model.producer_version = "latentrt", version("latentrt")
    model.graph.name = spec.name
    for name in weights:
        if (value := model.graph.initializers.pop(name, None)) is not None:
            model.graph.inputs.append(value)
    return ir.to_proto(model).SerializeToString()


def _optimize(model: ir.Model, weights: Mapping[str, Weight], buffers: Mapping[str, Array]) -> None:
    """The optimizer of onnxscript on a graph whose weights are unknown and whose buffers are constants."""
    for name, value in model.graph.initializers.items():
        if name in weights:
            value.const_value = None
        elif name in buffers:
            value.const_value = ir.tensor(buffers[name], name=name)
    optimize_ir(model)


def _arguments(component: Component) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example and dynamic axes by argument of `forward`; inputs without one are its last argument, a tuple."""
    parameters = list(inspect.signature(component.module.forward).parameters)
    examples: dict[str, Any] = {}
    dynamic: dict[str, Any] = {}
    for tensor in component.spec.inputs:
        axes = {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        example = component.example_inputs[tensor.name].to("meta")
        if tensor.name in parameters:
            examples[tensor.name], dynamic[tensor.name] = example, axes
        else:
            examples[parameters[-1]] = (*examples.get(parameters[-1], ()), example)
            dynamic[parameters[-1]] = (*dynamic.get(parameters[-1], ()), axes)
    return examples, dynamic


def _apply_spec(model: ir.Model, spec: ModelSpec) -> None:
    names: dict[str, str] = {}
    for kind, values, tensors in (
        ("input", model.graph.inputs, spec.inputs),
        ("output", model.graph.outputs, spec.outputs),
    ):
        found, wanted = [value.name for value in values], [tensor.name for tensor in tensors]
        if found != wanted:
            raise ExportError(f"{spec.name}: expected {kind}s {wanted}, got {found}.")
        for value, tensor in zip(values, tensors, strict=True):
            _check_shape(spec.name, value, tensor)
    for value, tensor in zip(model.graph.inputs, spec.inputs, strict=True):
        for dim, name in zip(value.shape or (), tensor.shape, strict=True):
            if isinstance(dim, ir.SymbolicDim) and isinstance(name, str):
                names[str(dim.value)] = name
    for node in model.graph:
        for value in node.outputs:
            if value is not None and value.shape is not None:
                value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])
    for values, tensors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            value.shape = ir.Shape(tensor.shape)


def _check_shape(component: str, value: ir.Value, tensor: TensorSpec) -> None:
    shape = tuple(value.shape or ())
    fits = len(shape) == len(tensor.shape) and all(
        isinstance(have, ir.SymbolicDim) if isinstance(want, str) else have == want
        for have, want in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ExportError(
            f"{component}.{tensor.name}: expected shape {tensor.shape}, got {value.shape}. "
            "A dimension that should be dynamic was fixed while tracing, or the other way round."
        )


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    """A symbol's clean name; None for the tracer's arithmetic on symbols, which shape tools trip over."""
    return dim if isinstance(dim, int) else names.get(str(dim.value))


def _strip_metadata(model: ir.Model) -> None:
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.doc_string = None
    model.graph.metadata_props.clear()
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
