"""A benchmark's results in the terminal."""

from __future__ import annotations

from rich.console import Console

from latentrt.runtime.console import print_table

from .report_cells import Cell, ran_where
from .report_tables import all_tables
from .report_words import heading, sentences
from .results_file import Results


def print_results(results: Results) -> None:
    """Print what was measured to stdout: what it comes to, and every table."""
    _say(f"{heading(results)}. {ran_where(results)}", *sentences(results))
    for table in all_tables(results):
        _say("", f"{table.title}. {table.caption}")
        print_table("", table.head, [[_text(cell) for cell in row] for row in table.rows], texts=table.texts)


def _say(*paragraphs: str) -> None:
    """Paragraphs, broken between words where somebody reads them and not at all where a program does."""
    console = Console(highlight=False)
    for text in paragraphs:
        console.print(text, markup=False, soft_wrap=not console.is_terminal)


def _text(cell: Cell) -> str:
    return "\n".join((cell.text, *cell.notes))
