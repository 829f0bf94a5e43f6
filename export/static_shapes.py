"""A graph for one set of sizes: nothing left to work out about shapes in the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants

from latentrt.runtime.errors import ExportError, UsageError

from .graph_values import SMALL_BYTES
from .shape_arithmetic import shape_nodes


def static_graph(model: ir.Model, sizes: Mapping[str, int]) -> ir.Model:
    """A copy of a graph with the dimensions of its inputs fixed and all that was computed from them folded.

        before   sample: (batch, 4, latent_height, latent_width);  Reshape(x, Concat(0, Shape(sample)[2:3], -1, 320))
        after    sample: (2, 4, 64, 64);                           Reshape(x, [0, 64, -1, 320])

    The shape of every value is stated, the outputs' too. Weights are neither read nor copied: both graphs hold the
    same tensors.

    Args:
        sizes: of every dimension that the graph's inputs name.

    Raises:
        UsageError: a size is missing, is of no dimension of the inputs, or is not a positive number.
        ExportError: a shape depends on more than the sizes of the inputs.
    """
    name = model.graph.name or "graph"
    _check_sizes(name, input_dimensions(model), sizes)
    static = model.clone()
    for value in (*static.graph.inputs, *(out for node in static.graph for out in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([dim if isinstance(dim, int) else sizes.get(str(dim.value)) for dim in value.shape])
    with _norms_inferred(static.graph):
        fold_constants(static, onnx_shape_inference=True, should_fold=_reads_small_constants)
    CommonSubexpressionEliminationPass()(static)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(static)
    RemoveUnusedNodesPass()(static)
    open_shapes = [str(out.name) for out in static.graph.outputs if out.shape is None or not out.shape.is_static()]
    if left := [str(node.outputs[0].name) for node in shape_nodes(static)] or open_shapes:
        raise ExportError(
            f"{name}: expected every shape to follow from {dict(sizes)}, got {left[0]} computed in the run."
        )
    return static


def input_dimensions(model: ir.Model) -> tuple[str, ...]:
    """The names of the dimensions of a graph's inputs, in order."""
    dims = [dim for value in model.graph.inputs for dim in value.shape or () if isinstance(dim, ir.SymbolicDim)]
    return tuple(dict.fromkeys(dim.value for dim in dims if dim.value is not None))


def _check_sizes(name: str, known: tuple[str, ...], sizes: Mapping[str, int]) -> None:
    if sizes.keys() != set(known):
        raise UsageError(f"{name}: expected the sizes of {', '.join(known) or 'nothing'}, got {dict(sizes)}.")
    if wrong := {dim: size for dim, size in sizes.items() if not size >= 1}:
        raise UsageError(f"{name}: expected sizes of at least 1, got {wrong}.")


def _reads_small_constants(node: ir.Node) -> bool | None:
    """Leave a node that reads a weight alone; None lets the folder decide about the others."""
    tensors = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    return False if any(tensor.nbytes > SMALL_BYTES for tensor in tensors) else None


@contextmanager
def _norms_inferred(graph: ir.Graph) -> Iterator[None]:
    """Let group norms pass for the instance norms whose shape theirs is: ONNX has no shape inference for them."""
    norms = {node: dict(node.attributes) for node in graph if node.op_type == "GroupNormalization"}
    for node in norms:
        node.op_type = "InstanceNormalization"
        node.attributes.clear()
    try:
        yield
    finally:
        for node, attributes in norms.items():
            node.op_type = "GroupNormalization"
            node.attributes.update(attributes)
