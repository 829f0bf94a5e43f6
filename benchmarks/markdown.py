"""A benchmark's results as Markdown, with tables as GitHub has them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from latentrt.runtime.manifest import write_atomic

from .report_cells import Cell, Table, ran_where
from .report_tables import all_tables
from .report_words import heading, making, sentences
from .results_file import Results

# What begins markup, or ends a table's cell.
_SPECIAL = re.compile(r"([\\`*_\[\]<>&|#~$])")


def write_markdown(path: Path, results: Results) -> None:
    """Write the results as Markdown.

    Raises:
        OSError: the disk is full or the folder not writable.
    """
    write_atomic(path, markdown(results).encode())


def markdown(results: Results) -> str:
    """The results as Markdown: what they come to, every table, and how they were made."""
    said = "\n".join(f"- {_escaped(sentence)}" for sentence in sentences(results))
    made = "\n".join(f"- {_escaped(name)}: {_escaped(text)}" for name, text in making(results).items())
    blocks = (
        f"# {_escaped(heading(results))}",
        _escaped(ran_where(results)),
        said,
        *(_table(table) for table in all_tables(results)),
        "## How it was made",
        _fenced(results.command),
        made,
    )
    return "\n\n".join(block for block in blocks if block) + "\n"


def _table(table: Table) -> str:
    marks = ["---" if column < table.texts else "---:" for column in range(len(table.head))]
    lines = [[_escaped(name) for name in table.head], marks, *([_cell(cell) for cell in row] for row in table.rows)]
    drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {_escaped(table.title)}\n\n{_escaped(table.caption)}\n\n{drawn}"


def _cell(cell: Cell) -> str:
    return "<br>".join(_escaped(text) for text in (cell.text, *cell.notes))


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    """A block of code with a fence longer than any in it."""
    runs: Sequence[str] = re.findall("`+", text)
    fence = "`" * max(3, 1 + max(map(len, runs), default=0))
    return f"{fence}\n{text}\n{fence}"
