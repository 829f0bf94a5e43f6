"""Where the commands write: results on stdout, progress and remarks on stderr, progress only on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def progress_console() -> Console:
    """The console of progress bars: stderr, and silent where nobody watches."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, quiet=True)


def log(message: str) -> None:
    """A line of result for people."""
    Console(highlight=False, soft_wrap=True).print(message, markup=False)


def note(message: str) -> None:
    """A remark that is not the result: on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout, wide enough not to cut paths when it is piped."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)
