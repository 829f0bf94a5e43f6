"""Where the commands write: results on stdout, progress and remarks on stderr, progress only on a terminal."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import UsageError


def progress_console() -> Console:
    """The console of progress bars: stderr, and silent where nobody watches."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, quiet=True)


def log(message: str) -> None:
    """A line of result for people."""
    Console(highlight=False, soft_wrap=True).print(message, markup=False)


def typed_command() -> str:
    """What was typed, by the name of the command alone, for results to say how they were made."""
    return shlex.join(["latentrt", *sys.argv[1:]])


def check_writable(name: str, file: Path) -> None:
    """Refuse a file that could not be written, before minutes are spent on it.

    Raises:
        UsageError: it is a folder, or its folder does not exist.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise UsageError(f"{name}: expected a file to write in a folder that exists, got {file}.")


def note(message: str) -> None:
    """A remark that is not the result: on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, markup=False)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, texts: int | None = None
) -> None:
    """A table on stdout, wide enough not to cut paths when it is piped.

    Args:
        texts: columns of text from the left; those after them hold numbers, which stand to the right and are not
            broken, in a frame that leaves them more room. None for text alone.
    """
    table = Table(title=title, title_justify="left", box=HEAVY_HEAD if texts is None else SIMPLE_HEAD)
    for place, column in enumerate(columns):
        if texts is None or place < texts:
            table.add_column(column, overflow="fold", min_width=10 if texts else None)
        else:
            table.add_column(column, no_wrap=True, justify="right")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)
