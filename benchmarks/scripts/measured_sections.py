"""Sections of a document that are made from files of results, and what their tables are written with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.benchmarks.report_cells import digits
from latentrt.benchmarks.results_file import Results, load_results
from latentrt.runtime.errors import ArtifactError


@dataclass(frozen=True)
class Kept:
    """The folder of the results, and how a document's links reach it."""

    folder: Path
    prefix: str

    def link(self, *names: str) -> str:
        """Links to files."""
        return ", ".join(f"[{name}]({self.prefix}{name})" for name in names)

    def results(self, name: str) -> Results:
        """A results file of `latentrt bench`."""
        return load_results(self.folder / name)

    def report(self, name: str) -> Any:
        """A results file of another script."""
        return json.loads((self.folder / name).read_text())


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a document.

    Attributes:
        files: that it is made from.
        command: that makes them.
        write: the Markdown, given the folder.
    """

    title: str
    files: tuple[str, ...]
    command: str
    write: Callable[[Kept], str]

    def text(self, kept: Kept) -> str:
        """The section, or that it was not measured yet.

        Raises:
            ArtifactError: a file is there and does not hold what the section shows.
        """
        missing = [name for name in self.files if not (kept.folder / name).exists()]
        if missing:
            return f"**{self.title}**: not measured yet: no {', '.join(missing)}. `{self.command}` makes it."
        try:
            return f"**{self.title}** (`{self.command}`; {kept.link(*self.files)}). {self.write(kept)}"
        except (KeyError, ValueError, StopIteration) as err:
            raise ArtifactError(
                f"{', '.join(self.files)}: expected results of `{self.command}`, got others: {err!r}. Measure again."
            ) from err


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown, all columns but the first to the right."""
    marks = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, marks, *rows))


def seconds(value: float) -> str:
    """In s or ms, three digits."""
    return f"{digits(value, 3)} s" if value >= 1 else f"{digits(value * 1e3, 3)} ms"


def percent(share: float) -> str:
    """With one digit behind the point."""
    return f"{100 * share:.1f} %"
