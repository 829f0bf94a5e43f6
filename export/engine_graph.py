"""Reading a graph before it is built: its inputs and outputs, and whether its types fit together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import ArtifactError, BackendError, BuildError
from latentrt.runtime.specs import TensorSpec

FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")


def import_onnx() -> Any:
    """The onnx module.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import onnx
    except ImportError as err:
        raise BackendError(
            f"onnx: expected an importable package, got {err}. Run: pip install 'latentrt[export]'"
        ) from err
    return onnx


def load_graph(path: Path) -> Any:
    """The graph as an onnx.ModelProto, external weights left on disk.

    Raises:
        ArtifactError: it is missing or is not an ONNX graph.
    """
    onnx = import_onnx()
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as err:
        raise ArtifactError(f"{path}: expected an ONNX graph, got {err}. Export the component again.") from err


def graph_tensors(values: Any) -> tuple[TensorSpec, ...]:
    """Names, types and shapes of a graph's inputs or outputs."""
    onnx = import_onnx()
    tensors = []
    for value in values:
        kind = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in kind.shape.dim)
        tensors.append(TensorSpec(name=value.name, dtype=dtype, shape=shape))
    return tuple(tensors)


def stored_bytes(tensor: Any) -> int:
    """What the values of an onnx.TensorProto take, wherever they lie."""
    size = int(import_onnx().helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    return size * math.prod(int(dimension) for dimension in tensor.dims)


def mixed_types(model: Any) -> list[str]:
    """Nodes whose inputs must be of one type by the operator's own schema, and are of several.

    TensorRT is strongly typed and refuses these with a message that names a tensor, not the cause; PyTorch would
    have promoted silently. Types are inferred without the weights, so this takes well under a second for a U-Net.
    """
    onnx = import_onnx()
    inferred = onnx.shape_inference.infer_shapes(model, check_type=False, strict_mode=False)
    types: dict[str, int] = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    versions = {item.domain: item.version for item in model.opset_import}
    return [problem for node in model.graph.node if (problem := _mixed(onnx, node, types, versions)) is not None]


def _mixed(onnx: Any, node: Any, types: Mapping[str, int], versions: Mapping[str, int]) -> str | None:
    try:
        schema = onnx.defs.get_schema(node.op_type, versions.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:
        return None  # a custom operator states no types; the parser will speak for it
    variadic = schema.inputs[-1] if schema.inputs else None
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for index, name in enumerate(node.input):
        formal = schema.inputs[index] if index < len(schema.inputs) else variadic
        if name and formal is not None and types.get(name) and not formal.type_str.startswith("tensor("):
            groups[formal.type_str].append((name, onnx.TensorProto.DataType.Name(types[name])))
    for members in groups.values():
        if len({dtype for _, dtype in members}) > 1:
            listed = ", ".join(f"{name} {dtype.lower()}" for name, dtype in members)
            return f"{node.op_type} node {node.name or '(unnamed)'!r} mixes {listed}"
    return None


def check_types(component: str, model: Any) -> None:
    """Refuse a graph that a strongly typed builder would refuse, naming the node.

    Raises:
        BuildError: some nodes mix types.
    """
    if problems := mixed_types(model):
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise BuildError(
            f"{component}: expected inputs of one type on each node, got {problems[0]}{more}. "
            "TensorRT is strongly typed: cast them to one type in the export."
        )
