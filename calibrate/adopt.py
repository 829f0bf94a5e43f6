"""Take a Q/DQ graph that was made elsewhere, by ModelOpt or ONNX Runtime's quantizer, into a bundle as its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from latentrt.export.cast_cleanup import CastCleanupPass
from latentrt.export.export_plan import graph_path
from latentrt.export.graph_files import files_of, save_onnx
from latentrt.export.staging import staging_folder
from latentrt.export.tool_versions import tool_versions
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.errors import ArtifactError, CalibrationError, UsageError
from latentrt.runtime.manifest import Artifact, key_of, sha256_of
from latentrt.runtime.precisions import QUANTIZED
from latentrt.runtime.session import OnnxSession

from .layer_quant import Kind
from .number_formats import STORED
from .placement import Placement, check_placement
from .quantized_artifacts import put_in
from .quantized_graphs import Feeds, answers_of, figures_against, probe_feeds
from .source import PRECISION

# Noise as large as what is predicted: whatever it computes, it is not this network.
_BOUND = 1.0


@dataclass(frozen=True)
class Adopted:
    """A graph that is the bundle's now, and what is quantized in it."""

    artifact: Artifact
    placement: Placement


def adopt_graph(
    bundle_path: Path, component: str, graph: Path, precision: str, *, cases: Mapping[str, Feeds] | None = None
) -> Adopted:
    """Put a quantized graph into a bundle, for every runtime, in the place of those of that precision.

    Inputs and outputs have to have the names that the component's have in the bundle, which are optimum's; where they
    are float16, Casts are added, since a bundle's are float32 in every precision.

    Args:
        bundle_path: holds the component in fp32.
        component: such as unet.
        graph: the .onnx file, its external data beside it.
        precision: int8 or fp8, as the graph's weights are stored; int8w if nothing else is quantized.
        cases: inputs to compare it with the fp32 graph on, by a name for the record; noise by default.

    Raises:
        UsageError: no such precision, or the bundle lacks the component in fp32.
        ArtifactError: the file or the bundle is missing or damaged.
        CalibrationError: the graph is not of this component, is not quantized, or not as TensorRT takes it; says how.
    """
    if precision not in QUANTIZED:
        raise UsageError(f"precision: expected one of {', '.join(QUANTIZED)}, got {precision!r}.")
    bundle = open_bundle(bundle_path)
    base = bundle.manifest.artifact(component, PRECISION) if bundle.manifest is not None else None
    reference = bundle.graph(component, PRECISION)
    if bundle.manifest is None or base is None:
        raise UsageError(f"{bundle_path}: expected a latentrt bundle, got a folder without a manifest.")
    bundle.check(base.files)
    model = _loaded(graph)
    placement = _checked(model, graph, precision)
    fit_contract(model, ir.load(reference), graph)
    adopted = {file.name: sha256_of(file) for file in files_of(graph)}
    with staging_folder(bundle_path) as folder:
        path = graph_path(component, precision)
        files = save_onnx(model, folder / path)
        wanted = OnnxSession(reference, optimize=False)
        cases = cases or {"noise": probe_feeds(wanted.spec)}
        parity = figures_against(
            answers_of(wanted, cases),
            answers_of(OnnxSession(files[0], optimize=False), cases),
            name=f"{component} {precision}",
        )
        if not parity["worst_relative_l2"] < _BOUND:
            raise CalibrationError(
                f"{graph}: expected the {component} of {bundle_path}, got a graph whose answers are relative L2 "
                f"{parity['worst_relative_l2']:.3g} from its. It is of another checkpoint, or its scales are wrong."
            )
        inputs = {
            "component": component,
            "precision": precision,
            "target": "",
            "made_from": {name: bundle.manifest.files[name].sha256 for name in base.files},
            "adopted": adopted,
            "tools": tool_versions(("onnx-ir",)),
        }
        artifact = Artifact(
            component=component,
            precision=precision,
            path=path,
            files=tuple(file.relative_to(folder).as_posix() for file in files),
            opset=model.opset_imports[""],
            key=key_of(inputs),
            inputs=inputs,
            parity=parity,
            parameters=base.parameters,
        )
        put_in(bundle_path, folder, [artifact])
    return Adopted(artifact, placement)


def _loaded(graph: Path) -> ir.Model:
    try:
        return ir.load(graph)
    except Exception as err:
        raise ArtifactError(f"{graph}: expected an ONNX graph, got {err}.") from err


def _checked(model: ir.Model, graph: Path, precision: str) -> Placement:
    """Have the graph be quantized, to what it is said to be, as TensorRT takes it."""
    foreign = sorted({node.domain for node in model.graph if node.domain})
    if foreign:
        raise CalibrationError(
            f"{graph}: expected ONNX's own operators, got some of {', '.join(foreign)}. Quantize it with "
            "QuantizeLinear and DequantizeLinear, which ModelOpt and ONNX Runtime write for opset 19 and later."
        )
    placement = check_placement(model)
    if placement.problems:
        raise CalibrationError(f"{graph}: expected Q/DQ as TensorRT takes it, got " + "; ".join(placement.problems))
    stored = {
        value.dtype for node in model.graph for value in node.inputs[:1] if node.op_type == "DequantizeLinear" and value
    }
    weight_only = precision == "int8w"
    kind: Kind = "fp8" if precision == "fp8" else "int8"
    if bool(placement.quantized) == weight_only or STORED[kind] not in stored:
        found = ", ".join(sorted(dtype.name.lower() for dtype in stored if dtype is not None)) or "nothing quantized"
        found += " with inputs in floats" if stored and not placement.quantized else ""
        raise CalibrationError(f"{graph}: expected layers in {precision}, got {found}.")
    return placement


def fit_contract(model: ir.Model, reference: ir.Model, graph: Path) -> None:
    """Give a graph the inputs and outputs of another, in place, where types and names of sizes are all that differs.

    Raises:
        CalibrationError: an input or output is missing, is unknown, or has another rank or size.
    """
    for what, found, wanted in (
        ("inputs", model.graph.inputs, reference.graph.inputs),
        ("outputs", model.graph.outputs, reference.graph.outputs),
    ):
        _check_names(graph, what, found, wanted)
    known = {value.name: value for value in (*reference.graph.inputs, *reference.graph.outputs)}
    for index, value in enumerate(list(model.graph.inputs)):
        _fit_shape(graph, value, known[value.name])
        if value.dtype != (dtype := known[value.name].dtype):
            model.graph.inputs[index] = _cast_input(model.graph, value, dtype)
    for index, value in enumerate(list(model.graph.outputs)):
        _fit_shape(graph, value, known[value.name])
        if value.dtype != (dtype := known[value.name].dtype):
            model.graph.outputs[index] = _cast_output(model.graph, value, dtype)
    CastCleanupPass()(model)


def _check_names(graph: Path, what: str, found: Sequence[ir.Value], wanted: Sequence[ir.Value]) -> None:
    names, known = ({str(value.name) for value in values} for values in (found, wanted))
    if names != known:
        raise CalibrationError(
            f"{graph}: expected {what} {', '.join(sorted(known))}, got {', '.join(sorted(names))}. Export the network "
            "with the names that optimum gives them, and quantize that."
        )


def _fit_shape(graph: Path, value: ir.Value, wanted: ir.Value) -> None:
    """Have a value be of the same rank and sizes, and take the names of those that are dynamic."""
    sizes = [[size if isinstance(size, int) else None for size in each.shape or ()] for each in (value, wanted)]
    if sizes[0] != sizes[1]:
        raise CalibrationError(
            f"{graph}: {value.name}: expected shape {wanted.shape}, got {value.shape}. Export it with the same dynamic "
            "sizes, and a timestep for each row."
        )
    value.shape = wanted.shape


def _cast_input(graph: ir.Graph, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """An input of another type in the place of one, which becomes its Cast."""
    assert value.dtype is not None
    made = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(dtype or ir.DataType.FLOAT))
    cast = ir.node("Cast", [made], attributes={"to": value.dtype})
    cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = f"{value.name}.cast", value.shape, value.type
    value.replace_all_uses_with(cast.outputs[0])
    graph.insert_before(graph[0], cast)
    return made


def _cast_output(graph: ir.Graph, value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """The Cast of an output, in its place and under its name."""
    name = str(value.name)
    cast = ir.node("Cast", [value], attributes={"to": dtype or ir.DataType.FLOAT})
    made = cast.outputs[0]
    value.name, made.name, made.shape = f"{name}.uncast", name, value.shape
    made.type = ir.TensorType(dtype or ir.DataType.FLOAT)
    graph.append(cast)
    return made
