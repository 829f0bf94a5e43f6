"""The token-embedding table inside a text encoder's .onnx file: find it, read it, put a longer one in its place.

ONNX Runtime's own `add_initializer` does not do: a table that its optimizer has folded, as in fp16 graphs on the CPU,
keeps its old length.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ArtifactError
from .onnx_file import DTYPES, FLOAT, FLOAT16, damage_named, read_graph, rewritten, values_of


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


def find_token_table(path: Path) -> TokenTable:
    """The table from which the graph gathers token embeddings.

    It is the two-dimensional initializer that a Gather reads and that is named `…token_embedding.weight`; in a graph
    that has lost the names, the one with the most rows.

    Raises:
        ArtifactError: the file is no ONNX graph, or has no such table in fp32 or fp16.
    """
    graph = read_graph(path)
    with damage_named(path):
        gathered = [node.inputs[0] for node in graph.nodes if node.op_type == "Gather"]
        ids = {"input_ids"}
        for node in graph.nodes:
            if node.op_type == "Cast" and node.inputs[0] in ids:
                ids.add(node.outputs[0])
        pools_at_argmax = any(node.op_type == "ArgMax" and node.inputs[0] in ids for node in graph.nodes)
    found = [
        (name.endswith("token_embedding.weight"), tensor.dims[0], name)
        for name in gathered
        if (tensor := graph.tensors.get(name)) and len(tensor.dims) == 2 and tensor.data_type in (FLOAT, FLOAT16)
    ]
    if not found:
        raise ArtifactError(
            f"{path}: expected a table of token embeddings in fp32 or fp16, found none. "
            "Textual inversions need the text encoder in one of these precisions."
        )
    name = max(found)[2]
    tensor = graph.tensors[name]
    shape = (tensor.dims[0], tensor.dims[1])
    return TokenTable(path, name, shape, DTYPES[tensor.data_type], pools_at_argmax)


def read_rows(table: TokenTable, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Some rows of the table (n, width).

    Raises:
        ArtifactError: the file changed or is damaged.
    """
    values = values_of(read_graph(table.path), table.name)
    with damage_named(table.path):
        return values.reshape(table.shape)[rows].astype(np.float32)


def graph_with_rows(table: TokenTable, rows: NDArray[np.float32]) -> bytes:
    """The bytes of the graph with rows (n, width) added below its table. Other external data stays external.

    Raises:
        ArtifactError: the file changed or is damaged.
    """
    graph = read_graph(table.path)
    old = values_of(graph, table.name)
    new = np.ascontiguousarray(rows, dtype=table.dtype)
    dims = table.shape[0] + len(new), table.shape[1]
    with damage_named(table.path):
        return rewritten(graph, {table.name: (dims, [old.reshape(-1).view(np.uint8).data, new.tobytes()])})
