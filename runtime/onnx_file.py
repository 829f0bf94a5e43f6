"""An .onnx file, read without the onnx package: its nodes, and its weights, inline or in the file beside it.

ONNX files are protobuf messages. This walks the few fields that it needs (numbers from onnx.proto) and copies the rest
untouched, so that the runtime can look at a graph's weights and put others in their place.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ArtifactError
from .protobuf import Field, fields, message, packed_varints, text_of, varint
from .specs import Array

_GRAPH = 7  # ModelProto
_NODE, _INITIALIZER, _VALUE_INFO = 1, 5, 13  # GraphProto
_NODE_INPUT, _NODE_OUTPUT, _OP_TYPE, _ATTRIBUTE = 1, 2, 4, 5  # NodeProto
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3  # AttributeProto
_DIMS, _DATA_TYPE, _NAME, _RAW, _EXTERNAL = 1, 2, 8, 9, 13  # TensorProto
# TensorProto.DataType; NumPy has no bfloat16: its 16 bits.
FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16
DTYPES: Mapping[int, np.dtype[Any]] = {
    FLOAT: np.dtype("<f4"),
    FLOAT16: np.dtype("<f2"),
    BFLOAT16: np.dtype("<u2"),
    2: np.dtype("u1"),
    3: np.dtype("i1"),
    6: np.dtype("<i4"),
    7: np.dtype("<i8"),
    9: np.dtype("?"),
    11: np.dtype("<f8"),
    17: np.dtype("u1"),  # float8 E4M3, which NumPy lacks: its bits
}


@dataclass(frozen=True)
class OnnxTensor:
    """An initializer: where its message lies in the file, and where its values do."""

    field: Field
    dims: tuple[int, ...]
    data_type: int
    raw: Field | None
    external: Mapping[str, str]


@dataclass(frozen=True)
class OnnxNode:
    """A node; `ints` are those of its attributes that are whole numbers."""

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ints: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class OnnxGraph:
    """A graph with its bytes.

    Attributes:
        path: of the file; external data lies beside it.
        data: of the whole file.
        field: of the graph in it.
        node_fields: of its nodes.
    """

    path: Path
    data: memoryview
    field: Field
    tensors: Mapping[str, OnnxTensor]
    node_fields: tuple[Field, ...]

    @cached_property
    def nodes(self) -> tuple[OnnxNode, ...]:
        """In the order of the file.

        Raises:
            ArtifactError: one of them is damaged.
        """
        with damage_named(self.path):
            return tuple(_read_node(self.data, field) for field in self.node_fields)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into one error.

    Raises:
        ArtifactError: names the file.
    """
    try:
        yield
    except (OSError, ValueError, IndexError, KeyError, StopIteration) as err:
        raise ArtifactError(f"{path}: expected an ONNX graph, got a damaged file ({err!r}). Export it again.") from err


def mapped(path: Path) -> memoryview:
    """A file's bytes, mapped.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is empty.
    """
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read_graph(path: Path, model: bytes | None = None) -> OnnxGraph:
    """A graph: its initializers without their values, its nodes when they are asked for.

    Args:
        model: the graph's bytes, if not those of the file.

    Raises:
        ArtifactError: it is missing or no ONNX graph.
    """
    with damage_named(path):
        data = mapped(path) if model is None else memoryview(model)
        graph = next(field for field in fields(data, 0, len(data)) if field.number == _GRAPH)
        tensors: dict[str, OnnxTensor] = {}
        nodes: list[Field] = []
        for field in fields(data, graph.start, graph.stop):
            if field.number == _INITIALIZER:
                name, tensor = _read_tensor(data, field)
                tensors[name] = tensor
            elif field.number == _NODE:
                nodes.append(field)
        return OnnxGraph(path, data, graph, tensors, tuple(nodes))


def _read_tensor(data: memoryview, field: Field) -> tuple[str, OnnxTensor]:
    name, data_type, raw = "", 0, None
    dims: list[int] = []
    external: dict[str, str] = {}
    for inner in fields(data, field.start, field.stop):
        if inner.number == _DIMS:
            dims += packed_varints(data, inner)
        elif inner.number == _DATA_TYPE:
            data_type = inner.value
        elif inner.number == _NAME:
            name = text_of(data, inner)
        elif inner.number == _RAW:
            raw = inner
        elif inner.number == _EXTERNAL:
            key, value = (text_of(data, part) for part in fields(data, inner.start, inner.stop))
            external[key] = value
    return name, OnnxTensor(field, tuple(dims), data_type, raw, external)


def _read_node(data: memoryview, field: Field) -> OnnxNode:
    op_type = ""
    names: dict[int, list[str]] = {_NODE_INPUT: [], _NODE_OUTPUT: []}
    ints: dict[str, int] = {}
    for inner in fields(data, field.start, field.stop):
        if inner.number in names:
            names[inner.number].append(text_of(data, inner))
        elif inner.number == _OP_TYPE:
            op_type = text_of(data, inner)
        elif inner.number == _ATTRIBUTE:
            parts = {part.number: part for part in fields(data, inner.start, inner.stop)}
            if _ATTRIBUTE_NAME in parts and _ATTRIBUTE_INT in parts:
                ints[text_of(data, parts[_ATTRIBUTE_NAME])] = parts[_ATTRIBUTE_INT].value
    return OnnxNode(op_type, tuple(names[_NODE_INPUT]), tuple(names[_NODE_OUTPUT]), ints)


def content(graph: OnnxGraph, tensor: OnnxTensor) -> memoryview:
    """The raw bytes of an initializer, inline or from the file beside the graph.

    Raises:
        OSError, ValueError, KeyError: they are not there, not as many as belong, or of no known type.
    """
    size = math.prod(tensor.dims) * DTYPES[tensor.data_type].itemsize
    if tensor.raw is not None:
        found = graph.data[tensor.raw.start : tensor.raw.stop]
    elif "location" in tensor.external:
        beside = (graph.path.parent / tensor.external["location"]).resolve()
        if not beside.is_relative_to(graph.path.parent.resolve()):
            raise ValueError(f"external data outside the folder: {beside}")
        start = int(tensor.external.get("offset", 0))
        found = mapped(beside)[start : start + size]
    else:
        raise ValueError("weights held in neither raw nor external data")
    if len(found) != size:
        raise ValueError(f"{len(found)} bytes of weights where {size} belong")
    return found


def values_of(graph: OnnxGraph, name: str) -> Array:
    """An initializer's values, in the mapped file: read-only, and valid as long as the array is.

    Raises:
        ArtifactError: the file is damaged, or has no such initializer.
    """
    with damage_named(graph.path):
        tensor = graph.tensors[name]
        dtype = DTYPES[tensor.data_type]
        return np.frombuffer(content(graph, tensor), dtype=dtype).reshape(tensor.dims)


def rewritten(graph: OnnxGraph, contents: Mapping[str, tuple[Sequence[int], Sequence[bytes | memoryview]]]) -> bytes:
    """The bytes of the file with other initializers, inline; external data of the rest stays external.

    Args:
        contents: sizes and values, of the type that the initializer has, by name.
    """
    data = graph.data
    replaced = {graph.tensors[name].field.tag: _tensor(graph, name, *parts) for name, parts in contents.items()}
    kept: list[bytes | memoryview] = []
    position = graph.field.start
    for field in fields(data, graph.field.start, graph.field.stop):
        new = replaced.get(field.tag) if field.number == _INITIALIZER else None
        if new is not None or (field.number == _VALUE_INFO and _name_of(data, field) in contents):
            kept += [data[position : field.tag], *(new or ())]
            position = field.stop
    kept.append(data[position : graph.field.stop])
    return b"".join([data[: graph.field.tag], *message(_GRAPH, *kept), data[graph.field.stop :]])


def _tensor(
    graph: OnnxGraph, name: str, dims: Sequence[int], parts: Sequence[bytes | memoryview]
) -> list[bytes | memoryview]:
    return message(
        _INITIALIZER,
        *(varint(_DIMS << 3) + varint(size) for size in dims),
        varint(_DATA_TYPE << 3) + varint(graph.tensors[name].data_type),
        *message(_NAME, name.encode()),
        *message(_RAW, *parts),
    )


def _name_of(data: memoryview, field: Field) -> str:
    """The name of a ValueInfoProto."""
    return next((text_of(data, inner) for inner in fields(data, field.start, field.stop) if inner.number == 1), "")
