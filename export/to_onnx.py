"""From a wrapped module to an ONNX graph that says nothing about the machine that made it."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from latentrt.runtime.errors import ExportError
from latentrt.runtime.specs import ModelSpec, TensorSpec

from .attention_scale import AttentionScalePass, scales_after_matmul
from .component import Component
from .key_transpose import KeyTransposePass
from .opset import DEFAULT_OPSET

# One file is easier to handle, but protobuf stops at 2 GB and reads the whole file to see the graph.
EXTERNAL_DATA_BYTES = 100 * 2**20


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


def to_onnx(component: Component, *, opset: int = DEFAULT_OPSET) -> ir.Model:
    """Export a component with `torch.onnx.export(dynamo=True)` and clean the graph.

    Dimension names are those of the component's spec; stack traces and exporter metadata are gone, so the same
    weights give the same bytes; attention is scaled before its first matmul.

    Raises:
        ExportError: the exporter failed, or the graph's inputs and outputs are not those of the spec.
    """
    spec = component.spec
    examples, dynamic = _arguments(component)
    try:
        with _exporter_quiet(), torch.no_grad():
            # Traced here, because torch.onnx traces U-Nets twice: its first way, with sizes of one in view, fails on
            # their shape arithmetic.
            traced = torch.export.export(component.module, (), kwargs=examples, dynamic_shapes=dynamic, strict=False)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                opset_version=opset,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                external_data=False,
                verbose=False,
            )
    except (MemoryError, OSError):
        raise
    except Exception as err:
        raise ExportError(f"{spec.name}: expected torch.onnx to export it, got {type(err).__name__}: {err}") from err
    if program is None:
        raise ExportError(f"{spec.name}: expected an ONNX program from torch.onnx, got none.")
    model: ir.Model = program.model
    _apply_spec(model, spec)
    for graph_pass in (KeyTransposePass(), AttentionScalePass(), RemoveUnusedNodesPass()):
        graph_pass(model)
    if late := scales_after_matmul(model):
        raise ExportError(f"{spec.name}: expected attention scaled before its first matmul, got a scale after {late}.")
    _strip_metadata(model)
    model.producer_name, model.producer_version = "latentrt", version("latentrt")
    model.graph.name = spec.name
    return model


def _arguments(component: Component) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example and dynamic axes by argument of `forward`; inputs without one are its last argument, a tuple."""
    parameters = list(inspect.signature(component.module.forward).parameters)
    examples: dict[str, Any] = {}
    dynamic: dict[str, Any] = {}
    for tensor in component.spec.inputs:
        axes = {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        example = component.example_inputs[tensor.name]
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


def save_onnx(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Write a graph; weights of more than EXTERNAL_DATA_BYTES go to `<path>_data` beside it.

    Returns:
        The files written.
    """
    size = sum(init.const_value.nbytes for init in model.graph.initializers.values() if init.const_value is not None)
    path.parent.mkdir(parents=True, exist_ok=True)
    if size <= EXTERNAL_DATA_BYTES:
        ir.save(model, path)
        return (path,)
    data = path.with_name(path.name + "_data")
    ir.save(model, path, external_data=data.name)
    return (path, data)
