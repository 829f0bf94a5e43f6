"""Engine files without the weights that their graph holds: how one is written down, and how it is made whole again.

An engine that was built ahead of time holds the graph's weights as they are, or laid out anew: channels last, side by
side with those of neighbours, multiplied by a constant of the graph. A thin file holds everything else, and for each
of those weights its name, its layout and its place. What comes out is the engine byte for byte, which its SHA-256
proves; neither TensorRT nor a GPU takes part.

    8 bytes    b"LATRTHIN"
    8 bytes    length of the header, little endian
    header     JSON: `bytes` and `sha256` of the whole engine, `kept`: (start, length) of what follows, `pieces`
    the rest   the bytes of `kept`, joined and compressed with zlib
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import ArtifactError
from .onnx_file import read_graph, values_of
from .specs import Array

MAGIC = b"LATRTHIN"
_START = len(MAGIC) + 8
_AGAIN = "Run: latentrt build BUNDLE --strip"
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Piece:
    """Where a weight of the graph lies in an engine.

    Attributes:
        name: of the initializer.
        layout: `plain`, `transposed` (of a matrix) or `channels_last` (of a convolution's kernel).
        scale: what all its values are multiplied by, in its own type; None for 1.
        part, parts: which of so many equal slices of its columns this is.
        position: of its first row in the engine, in bytes.
        stride: from one row to the next, in bytes.
    """

    name: str
    layout: str
    scale: float | None
    part: int
    parts: int
    position: int
    stride: int


def rows_of(values: Array, layout: str, scale: float | None, part: int, parts: int) -> Bytes:
    """A weight as the rows of bytes that an engine holds: (rows, bytes of a row)."""
    if layout == "transposed":
        matrix = values.T
    else:
        ordered = np.moveaxis(values, 1, -1) if layout == "channels_last" else values
        matrix = ordered.reshape(len(values) if values.ndim > 1 else 1, -1)
    width = matrix.shape[1] // parts
    matrix = matrix[:, part * width : (part + 1) * width]
    if scale is not None:
        matrix = np.multiply(matrix, scale, dtype=matrix.dtype)
    rows: Bytes = np.ascontiguousarray(matrix).view(np.uint8)
    return rows


def place_of(engine: Bytes, rows: Bytes, position: int, stride: int) -> Bytes | None:
    """The bytes of an engine where rows would lie, as a view of their shape; None if they would not lie within."""
    count, size = rows.shape
    if not (position >= 0 and stride >= size and position + (count - 1) * stride + size <= len(engine)):
        return None
    view: Bytes = np.lib.stride_tricks.as_strided(engine[position:], rows.shape, (stride, 1))
    return view


def pack(engine: Bytes, pieces: Sequence[Piece], kept: Sequence[tuple[int, int]]) -> bytes:
    """The thin file of an engine.

    Args:
        pieces: that lie in it.
        kept: start and length of everything that no piece covers.
    """
    header = json.dumps(
        {
            "bytes": len(engine),
            "sha256": hashlib.sha256(engine.data).hexdigest(),
            "kept": kept,
            "pieces": [dataclasses.astuple(piece) for piece in pieces],
        }
    ).encode()
    rest = zlib.compress(b"".join(bytes(engine[start : start + length]) for start, length in kept), 6)
    return MAGIC + len(header).to_bytes(8, "little") + header + rest


def is_thin(content: memoryview) -> bool:
    """Whether a file is a thin one."""
    return bytes(content[: len(MAGIC)]) == MAGIC


def restore_engine(content: memoryview, graph: Path) -> memoryview:
    """The whole engine.

    Args:
        content: of a thin file.
        graph: the .onnx file that the engine was built from.

    Raises:
        ArtifactError: the file is damaged, or the graph is damaged or another one.
    """
    held = read_graph(graph)
    try:
        if not is_thin(content):
            raise ValueError("another file")
        end = _START + int.from_bytes(content[len(MAGIC) : _START], "little")
        header = json.loads(bytes(content[_START:end]))
        engine = np.zeros(header["bytes"], np.uint8)
        rest = np.frombuffer(zlib.decompress(content[end:]), np.uint8)
        taken = 0
        for start, length in header["kept"]:
            engine[start : start + length] = rest[taken : taken + length]
            taken += length
        for piece in (Piece(*fields) for fields in header["pieces"]):
            rows = rows_of(values_of(held, piece.name), piece.layout, piece.scale, piece.part, piece.parts)
            target = place_of(engine, rows, piece.position, piece.stride)
            if target is None:
                raise ValueError(f"{piece.name} lies outside the engine")
            target[...] = rows
        wanted = header["sha256"]
    except (KeyError, TypeError, ValueError, ArithmeticError, MemoryError, zlib.error) as err:
        raise ArtifactError(f"{graph.parent.name}: expected an engine without weights, got {err!r}. {_AGAIN}") from err
    found = hashlib.sha256(engine.data).hexdigest()
    if found != wanted:
        raise ArtifactError(
            f"{graph}: expected the weights that the engine was built from, got others: the engine's SHA-256 would be "
            f"{found[:12]}, not {wanted[:12]}. {_AGAIN}"
        )
    return engine.data
