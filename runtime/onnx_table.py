"""The token-embedding table inside a text encoder's .onnx file: find it, read it, put a longer one in its place.

ONNX files are protobuf messages. This walks the few fields that it needs (numbers from onnx.proto) and copies the rest
untouched, so that the runtime can add rows without the onnx package. ONNX Runtime's own `add_initializer` does not do:
a table that its optimizer has folded, as in fp16 graphs on the CPU, keeps its old length.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ArtifactError
from .protobuf import Field, fields, message, packed_varints, text_of, varint

_GRAPH = 7  # ModelProto
_NODE, _INITIALIZER, _VALUE_INFO = 1, 5, 13  # GraphProto
_NODE_INPUT, _NODE_OUTPUT, _OP_TYPE = 1, 2, 4  # NodeProto
_DIMS, _DATA_TYPE, _NAME, _RAW, _EXTERNAL = 1, 2, 8, 9, 13  # TensorProto
_FLOAT, _FLOAT16 = 1, 10  # TensorProto.DataType
_DTYPES: dict[int, np.dtype[np.floating[Any]]] = {_FLOAT: np.dtype("<f4"), _FLOAT16: np.dtype("<f2")}


@dataclass(frozen=True)
class TokenTable:
    """Where a text encoder's graph holds its token embeddings.

    Attributes:
        path: the .onnx file.
        name: of the initializer.
        shape: (tokens, width).
        dtype: float32 or float16.
        pools_at_argmax: whether the pooled output is taken where the token id is largest, as CLIP configs with
            `eos_token_id: 2` do. New ids must then stay below that of EOS.
    """

    path: Path
    name: str
    shape: tuple[int, int]
    dtype: np.dtype[np.floating[Any]]
    pools_at_argmax: bool


@dataclass
class _Tensor:
    field: Field
    dims: list[int]
    data_type: int = 0
    raw: Field | None = None
    external: dict[str, str] | None = None


def _read_tensor(data: memoryview, field: Field) -> tuple[str, _Tensor]:
    tensor, name = _Tensor(field, []), ""
    for inner in fields(data, field.start, field.stop):
        if inner.number == _DIMS:
            tensor.dims += packed_varints(data, inner)
        elif inner.number == _DATA_TYPE:
            tensor.data_type = inner.value
        elif inner.number == _NAME:
            name = text_of(data, inner)
        elif inner.number == _RAW:
            tensor.raw = inner
        elif inner.number == _EXTERNAL:
            key, value = (text_of(data, part) for part in fields(data, inner.start, inner.stop))
            tensor.external = {**(tensor.external or {}), key: value}
    return name, tensor


@dataclass
class _Graph:
    field: Field
    tensors: dict[str, _Tensor]
    gathered: list[str]
    pools_at_argmax: bool


def _read_graph(data: memoryview) -> _Graph:
    graph = next(field for field in fields(data, 0, len(data)) if field.number == _GRAPH)
    tensors: dict[str, _Tensor] = {}
    nodes: list[tuple[str, list[str], list[str]]] = []
    for field in fields(data, graph.start, graph.stop):
        if field.number == _INITIALIZER:
            name, tensor = _read_tensor(data, field)
            tensors[name] = tensor
        elif field.number == _NODE:
            inner = list(fields(data, field.start, field.stop))
            nodes.append(
                (
                    next((text_of(data, part) for part in inner if part.number == _OP_TYPE), ""),
                    [text_of(data, part) for part in inner if part.number == _NODE_INPUT],
                    [text_of(data, part) for part in inner if part.number == _NODE_OUTPUT],
                )
            )
    ids = {"input_ids"}
    for kind, inputs, outputs in nodes:
        if kind == "Cast" and inputs[0] in ids:
            ids.add(outputs[0])
    return _Graph(
        field=graph,
        tensors=tensors,
        gathered=[inputs[0] for kind, inputs, _ in nodes if kind == "Gather"],
        pools_at_argmax=any(kind == "ArgMax" and inputs[0] in ids for kind, inputs, _ in nodes),
    )


def _open(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _damaged(path: Path, err: Exception) -> ArtifactError:
    return ArtifactError(f"{path}: expected an ONNX graph, got a damaged file ({err!r}). Export it again.")


def find_token_table(path: Path) -> TokenTable:
    """The table from which the graph gathers token embeddings.

    It is the two-dimensional initializer that a Gather reads and that is named `…token_embedding.weight`; in a graph
    that has lost the names, the one with the most rows.

    Raises:
        ArtifactError: the file is no ONNX graph, or has no such table in fp32 or fp16.
    """
    try:
        graph = _read_graph(_open(path))
    except (OSError, ValueError, IndexError, StopIteration) as err:
        raise _damaged(path, err) from err
    found = [
        (name.endswith("token_embedding.weight"), tensor.dims[0], name)
        for name in graph.gathered
        if (tensor := graph.tensors.get(name)) and len(tensor.dims) == 2 and tensor.data_type in _DTYPES
    ]
    if not found:
        raise ArtifactError(
            f"{path}: expected a table of token embeddings in fp32 or fp16, found none. "
            "Textual inversions need the text encoder in one of these precisions."
        )
    name = max(found)[2]
    tensor = graph.tensors[name]
    shape = (tensor.dims[0], tensor.dims[1])
    return TokenTable(path, name, shape, _DTYPES[tensor.data_type], graph.pools_at_argmax)


def _content(path: Path, data: memoryview, tensor: _Tensor, dtype: np.dtype[np.floating[Any]]) -> memoryview:
    """The raw bytes of a tensor, inline or from the file beside the graph."""
    size = math.prod(tensor.dims) * dtype.itemsize
    start = 0
    if tensor.raw is not None:
        content = data[tensor.raw.start : tensor.raw.stop]
    elif tensor.external and "location" in tensor.external:
        beside = (path.parent / tensor.external["location"]).resolve()
        if not beside.is_relative_to(path.parent.resolve()):
            raise ValueError(f"external data outside the folder: {beside}")
        start = int(tensor.external.get("offset", 0))
        content = _open(beside)[start : start + size]
    else:
        raise ValueError("a table held in neither raw nor external data")
    if len(content) != size:
        raise ValueError(f"{len(content)} bytes of table where {size} belong")
    return content


def read_rows(table: TokenTable, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Some rows of the table (n, width).

    Raises:
        ArtifactError: the file changed or is damaged.
    """
    try:
        data = _open(table.path)
        tensor = _read_graph(data).tensors[table.name]
        content = _content(table.path, data, tensor, table.dtype)
    except (OSError, ValueError, IndexError, KeyError, StopIteration) as err:
        raise _damaged(table.path, err) from err
    return np.frombuffer(content, dtype=table.dtype).reshape(table.shape)[rows].astype(np.float32)


def graph_with_rows(table: TokenTable, rows: NDArray[np.float32]) -> bytes:
    """The bytes of the graph with rows (n, width) added below its table. Other external data stays external.

    Raises:
        ArtifactError: the file changed or is damaged.
    """
    try:
        data = _open(table.path)
        graph = _read_graph(data)
        tensor = graph.tensors[table.name]
        old = _content(table.path, data, tensor, table.dtype)
        new = np.ascontiguousarray(rows, dtype=table.dtype)
        replaced = message(
            _INITIALIZER,
            *(varint(_DIMS << 3) + varint(size) for size in (table.shape[0] + len(new), table.shape[1])),
            varint(_DATA_TYPE << 3) + varint(tensor.data_type),
            *message(_NAME, table.name.encode()),
            *message(_RAW, old, new.tobytes()),
        )
        kept: list[bytes | memoryview] = []
        position = graph.field.start
        for field in fields(data, graph.field.start, graph.field.stop):
            is_table = field.number == _INITIALIZER and field.tag == tensor.field.tag
            if is_table or (field.number == _VALUE_INFO and _names(data, field) == table.name):
                kept += [data[position : field.tag], *(replaced if is_table else ())]
                position = field.stop
        kept.append(data[position : graph.field.stop])
        return b"".join([data[: graph.field.tag], *message(_GRAPH, *kept), data[graph.field.stop :]])
    except (OSError, ValueError, IndexError, KeyError, StopIteration) as err:
        raise _damaged(table.path, err) from err


def _names(data: memoryview, field: Field) -> str:
    """The name of a ValueInfoProto."""
    return next((text_of(data, inner) for inner in fields(data, field.start, field.stop) if inner.number == 1), "")
