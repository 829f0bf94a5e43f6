"""Prompts of any length as rows of token ids that a CLIP text encoder reads, each token with its weight.

Chunks, BREAK and the comma rule are those of AUTOMATIC1111's web UI: 75 tokens a row, each row framed by BOS and EOS;
where a row is full and a comma stands among its last 20 tokens, what follows the comma moves to the next row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .prompt_grammar import Piece, parse_attention
from .tokenizer import ClipTokenizer

COMMA_BACKTRACK = 20

Words = Mapping[tuple[int, ...], tuple[int, ...]]
"""Textual inversions: from the token ids of a word as it is written to the ids of its vectors."""


@dataclass(frozen=True, eq=False)
class TextChunk:
    """One row for the text encoder.

    Attributes:
        input_ids: (77,) int64: BOS, up to 75 tokens, EOS, padding.
        weights: (77,) float32; 1 for BOS, EOS and padding.
    """

    input_ids: NDArray[np.int64]
    weights: NDArray[np.float32]


def _spans(ids: Sequence[int], words: Words) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Token ids one at a time, each with the ids to write for it; several where a word of `words` starts, its longest.

    The first of each pair is the token that was written, which decides whether it is a comma.
    """
    by_first: dict[int, list[tuple[int, ...]]] = {}
    for pattern in sorted(words, key=len, reverse=True):
        by_first.setdefault(pattern[0], []).append(pattern)
    position = 0
    while position < len(ids):
        token = ids[position]
        patterns = by_first.get(token, ())
        found = next((p for p in patterns if tuple(ids[position : position + len(p)]) == p), None)
        yield token, (token,) if found is None else words[found]
        position += len(found or (token,))


class _Rows:
    """Rows being filled."""

    def __init__(self, tokenizer: ClipTokenizer, backtrack: int) -> None:
        self.rows: list[list[tuple[int, float]]] = []
        self._row: list[tuple[int, float]] = []
        self._comma = -1
        self._tokenizer = tokenizer
        self._backtrack = backtrack

    def border(self) -> None:
        """Close the row, also an empty one."""
        self.rows.append(self._row)
        self._row = []
        self._comma = -1

    def add(self, token: int, ids: Sequence[int], weight: float) -> None:
        """Add the ids of one token, together in one row where they fit into one."""
        room = self._tokenizer.room
        if token == self._tokenizer.comma:
            self._comma = len(self._row)
        elif len(self._row) == room and self._comma >= 0 and room - self._comma <= self._backtrack:
            moved = self._row[self._comma + 1 :]
            del self._row[self._comma + 1 :]
            self.border()
            self._row = moved
        if len(self._row) == room:
            self.border()
        if len(self._row) + len(ids) > room >= len(ids):
            self.border()
        for index in ids:
            if len(self._row) == room:
                self.border()
            self._row.append((index, weight))

    def finish(self) -> list[list[tuple[int, float]]]:
        """All rows, at least one; a border at the very end opens none."""
        if self._row or not self.rows:
            self.border()
        return self.rows


def chunk_prompt(
    text: str,
    tokenizer: ClipTokenizer,
    *,
    words: Words | None = None,
    attention: bool = True,
    backtrack: int = COMMA_BACKTRACK,
) -> tuple[TextChunk, ...]:
    """Rows of a prompt; the empty prompt has one.

    Each piece of equal weight is tokenized by itself, as the web UI does. The vectors of a textual inversion stay in
    one row.

    Args:
        words: textual inversions besides those of the tokenizer's added tokens.
        attention: read brackets and BREAK as grammar; False takes every character as text.
        backtrack: how many tokens before the end of a row a comma may stand and still end it; 0 switches it off.
    """
    known = {**tokenizer.multi_vector_words, **(words or {})}
    rows = _Rows(tokenizer, backtrack)
    for piece in parse_attention(text) if attention else (Piece(text),):
        if piece.is_break:
            rows.border()
            continue
        for token, ids in _spans(tokenizer.encode(piece.text), known):
            rows.add(token, ids, piece.weight)
    return tuple(_framed(row, tokenizer) for row in rows.finish())


def _framed(row: Sequence[tuple[int, float]], tokenizer: ClipTokenizer) -> TextChunk:
    ids = np.full(tokenizer.length, tokenizer.pad, dtype=np.int64)
    weights = np.ones(tokenizer.length, dtype=np.float32)
    ids[: len(row) + 2] = [tokenizer.bos, *(index for index, _ in row), tokenizer.eos]
    with np.errstate(over="ignore"):  # a weight beyond float32 becomes infinite, which the encoder refuses by name
        weights[1 : len(row) + 1] = [weight for _, weight in row]
    return TextChunk(input_ids=ids, weights=weights)
