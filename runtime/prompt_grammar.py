"""Attention grammar of AUTOMATIC1111's web UI: `(more)`, `[less]`, `(this much:1.3)`, `BREAK`, escaped brackets.

Every text parses. What is no grammar there is text here: `[x:1.3]`, a closing bracket that nothing opened, and also the
word BREAK inside an emphasised group, which the web UI reads as a word of negative weight.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

_ROUND = 1.1
_SQUARE = 1 / 1.1

# An escape, a weight with its bracket, a bracket or colon, or a run of anything else.
_TOKEN = re.compile(r"\\[()\[\]\\]|\\|:\s*([+-]?[.\d]+)\s*\)|[()\[\]:]|[^\\()\[\]:]+")
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(frozen=True)
class Piece:
    """A run of text with one weight. `is_break` marks a chunk border; its text is empty and its weight 1."""

    text: str
    weight: float = 1.0
    is_break: bool = False


def _number(text: str | None) -> float | None:
    """The weight that a text spells, None where it spells no finite number (`.`, `1.2.3`)."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _scan(text: str) -> tuple[list[str], list[float], list[tuple[int, int, float]]]:
    """Texts, their first weights (-1 marks BREAK), and groups: from which text to which, times what.

    Groups come in the order in which they close, so that weights are multiplied, and rounded, from the inside out.
    """
    texts: list[str] = []
    weights: list[float] = []
    groups: list[tuple[int, int, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def add(value: str, weight: float = 1.0) -> None:
        texts.append(value)
        weights.append(weight)

    def close(bracket: str, multiplier: float) -> None:
        groups.append((opened[bracket].pop(), len(texts), multiplier))

    for match in _TOKEN.finditer(text):
        token = match.group()
        number = _number(match.group(1))
        if token[0] == "\\":
            add(token[1:])
        elif token in opened:
            opened[token].append(len(texts))
        elif number is not None and opened["("]:
            close("(", number)
        elif token == ")" and opened["("]:
            close("(", _ROUND)
        elif token == "]" and opened["["]:
            close("[", _SQUARE)
        elif token[0] == ":" and token[-1] == ")" and number is None and opened["("]:
            add(token[:-1])
            close("(", _ROUND)
        else:
            parts = _BREAK.split(token)
            for index, part in enumerate(parts):
                if index:
                    add("BREAK", -1.0)
                    part = part.lstrip()
                add(part.rstrip() if index + 1 < len(parts) else part)
    groups += [(start, len(texts), _ROUND) for start in opened["("]]
    groups += [(start, len(texts), _SQUARE) for start in opened["["]]
    return texts, weights, groups


def parse_attention(text: str) -> tuple[Piece, ...]:
    r"""Split a prompt into pieces of equal weight, the grammar removed. Never raises; at least one piece.

    `(x)` multiplies by 1.1, `[x]` divides by it, `(x:1.3)` multiplies by 1.3; groups nest, and an unclosed one lasts to
    the end. `\(`, `\)`, `\[`, `\]` and `\\` are the characters themselves. BREAK as a whole word is a border.
    """
    texts, firsts, groups = _scan(text)
    weights = np.array(firsts, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for start, stop, multiplier in groups:
            weights[start:stop] *= multiplier
    merged: list[tuple[list[str], float]] = []
    for value, weight in zip(texts, weights.tolist(), strict=True):
        if merged and merged[-1][1] == weight:
            merged[-1][0].append(value)
        else:
            merged.append(([value], weight))
    joined = [("".join(values), weight) for values, weight in merged] or [("", 1.0)]
    return tuple(
        Piece("", is_break=True) if (value, weight) == ("BREAK", -1.0) else Piece(value, weight)
        for value, weight in joined
    )
