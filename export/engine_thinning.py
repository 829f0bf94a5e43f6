"""Finding the graph's weights in an engine that was built ahead of time, so that its file can do without them.

Nothing is assumed of the engine's format: a weight counts as found where every one of its bytes is there. Tried are its
layouts, halves (a gated layer's two are stored apart) and multiples by constants of the graph (the scale of attention
is folded into queries and keys), at every sixteenth byte; rows may lie apart, as those of weights that were joined.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentrt.runtime.onnx_file import DTYPES, OnnxGraph, read_graph, values_of
from latentrt.runtime.specs import Array
from latentrt.runtime.thin_engine import Bytes, Piece, pack, place_of, rows_of

# What lies elsewhere is not found and is kept as it is.
_ALIGNMENT = 16
_PHASES = range(0, _ALIGNMENT, 4)
# Smaller ones are not worth their entry in the header.
_LEAST_BYTES = 512
# A pattern in more places is no weight's: kernels repeat their instructions.
_MOST_PLACES = 64
_CHUNK = 1 << 22
_MASK = np.uint64((1 << 20) - 1)


@dataclass(frozen=True)
class _Candidate:
    """A weight as it may lie in an engine, as `Piece` states it."""

    name: str
    layout: str
    scale: float | None = None
    part: int = 0
    parts: int = 1

    def rows(self, values: Array) -> Bytes:
        """All its rows."""
        return rows_of(values, self.layout, self.scale, self.part, self.parts)

    def words(self, values: Array) -> list[int]:
        """The first eight bytes of its first rows, two at most; none of rows that are shorter than a block."""
        first = values[:, :2] if self.layout == "transposed" else values[:2] if values.ndim > 1 else values
        rows = self.rows(first)
        if rows.shape[1] < _ALIGNMENT:
            return []
        return [int(word) for word in np.ascontiguousarray(rows[:, :8]).view(np.uint64)[:, 0]]


def thin_engine(plan: memoryview, graph: Path) -> bytes:
    """The thin file of an engine.

    Args:
        plan: the serialized engine.
        graph: the .onnx file that it was built from.

    Raises:
        ArtifactError: the graph is damaged.
    """
    engine = np.frombuffer(plan, np.uint8)
    held = read_graph(graph)
    candidates = list(_candidates(held))
    words = [candidate.words(values_of(held, candidate.name)) for candidate in candidates]
    phase, places = _find_words(engine, {word for pair in words for word in pair if _tells(word)})
    body = engine[phase:]
    covered = np.zeros(len(body) // _ALIGNMENT, np.bool_)
    pieces: list[Piece] = []
    for candidate, pair in zip(candidates, words, strict=True):
        starts, *following = [places.get(word, []) for word in pair] or [[]]
        if starts:
            rows = candidate.rows(values_of(held, candidate.name))
            pieces += _pieces(body, covered, candidate, rows, starts, following[0] if following else [])
    pieces = [dataclasses.replace(piece, position=piece.position + phase) for piece in pieces]
    kept = [(start + phase, length) for start, length in _gaps(covered, len(body))]
    return pack(engine, pieces, [(0, phase), *kept] if phase else kept)


def _candidates(graph: OnnxGraph) -> Iterator[_Candidate]:
    constants = _constants(graph)
    for name, tensor in graph.tensors.items():
        if tensor.data_type not in DTYPES or not tensor.dims:
            continue
        values = values_of(graph, name)
        if values.nbytes < _LEAST_BYTES:
            continue
        yield _Candidate(name, "plain")
        if values.ndim == 4:
            yield _Candidate(name, "channels_last")
        if values.ndim == 2:
            yield _Candidate(name, "transposed")
            scales = constants if values.dtype.kind == "f" else []
            for layout, columns in (("plain", values.shape[1]), ("transposed", values.shape[0])):
                yield from (_Candidate(name, layout, scale) for scale in scales)
                if columns % 2 == 0:
                    yield from (_Candidate(name, layout, None, part, 2) for part in (0, 1))


def _constants(graph: OnnxGraph) -> list[float]:
    """The numbers that the graph multiplies by."""
    names = {name for node in graph.nodes if node.op_type == "Mul" for name in node.inputs} & graph.tensors.keys()
    single = [values_of(graph, name) for name in names if math.prod(graph.tensors[name].dims) == 1]
    return sorted({float(values.reshape(-1)[0]) for values in single if values.dtype.kind == "f"} - {0.0, 1.0})


def _tells(word: int) -> bool:
    """Whether eight bytes are more than a repetition, which would be found everywhere."""
    return len(set(word.to_bytes(8, "little"))) > 2


def _find_words(engine: Bytes, words: Iterable[int]) -> tuple[int, dict[int, list[int]]]:
    """Where words lie in an engine, at every sixteenth byte from the one on from which most of them are found.

    The weights are aligned to each other; where they begin depends on what is before them.

    Returns:
        The first byte, and the places of words that are in few, counted from there.
    """
    wanted = np.array(sorted(words), np.uint64)
    found = [(phase, _find_aligned(engine[phase:], wanted)) for phase in _PHASES]
    return max(found, key=lambda item: sum(map(len, item[1].values())))


def _find_aligned(engine: Bytes, wanted: NDArray[np.uint64]) -> dict[int, list[int]]:
    blocks = engine[: len(engine) // _ALIGNMENT * _ALIGNMENT].view(np.uint64)[::2]
    # Most blocks are none of the words, which their lower bits tell at once.
    possible = np.zeros(int(_MASK) + 1, np.bool_)
    possible[wanted & _MASK] = True
    places: dict[int, list[int]] = defaultdict(list)
    for start in range(0, len(blocks) if len(wanted) else 0, _CHUNK):
        chunk = blocks[start : start + _CHUNK]
        indices = np.flatnonzero(possible[chunk & _MASK])
        nearest = np.minimum(np.searchsorted(wanted, chunk[indices]), len(wanted) - 1)
        for index in indices[wanted[nearest] == chunk[indices]]:
            places[int(chunk[index])].append((start + int(index)) * _ALIGNMENT)
    return {word: found for word, found in places.items() if len(found) <= _MOST_PLACES}


def _pieces(
    engine: Bytes,
    covered: NDArray[np.bool_],
    candidate: _Candidate,
    rows: Bytes,
    starts: Iterable[int],
    following: Iterable[int],
) -> Iterator[Piece]:
    """The places at which all rows lie; their blocks are marked as covered.

    Args:
        covered: of each block of the engine, whether a piece holds it.
        starts: where the first row may lie.
        following: where the second may.
    """
    size = rows.shape[1]
    for position in starts:
        if covered[position // _ALIGNMENT]:
            continue
        strides = [size, *(place - position for place in following if place - position > size)]
        for stride in strides if len(rows) > 1 else [size]:
            target = place_of(engine, rows, position, stride)
            if target is not None and np.array_equal(target, rows):
                if _cover(covered, len(rows), size, position, stride):
                    yield Piece(**dataclasses.asdict(candidate), position=position, stride=stride)
                break


def _cover(covered: NDArray[np.bool_], count: int, size: int, position: int, stride: int) -> bool:
    """Mark the blocks that rows fill; False if rows that lie apart fill none."""
    first = position // _ALIGNMENT
    if stride == size:
        covered[first : first + count * size // _ALIGNMENT] = True
        return True
    if size % _ALIGNMENT or stride % _ALIGNMENT:
        return False
    for row in range(count):
        start = first + row * stride // _ALIGNMENT
        covered[start : start + size // _ALIGNMENT] = True
    return True


def _gaps(covered: NDArray[np.bool_], size: int) -> list[tuple[int, int]]:
    """Start and length, in bytes, of what is not covered."""
    edges = np.flatnonzero(np.diff(np.concatenate([[True], covered, [True]]).astype(np.int8)))
    gaps = [(int(start) * _ALIGNMENT, int(end - start) * _ALIGNMENT) for start, end in edges.reshape(-1, 2)]
    rest = size % _ALIGNMENT
    return [*gaps, (size - rest, rest)] if rest else gaps
