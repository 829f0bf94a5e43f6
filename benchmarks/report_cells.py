"""What the tables of a report are made of, the same for the terminal, Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .cases import Case
from .results_file import Results, Row

NOTHING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
_TIME_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
_SIZE_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


@dataclass(frozen=True)
class Cell:
    """A cell of plain text.

    Attributes:
        text: what is looked for.
        notes: lines below it, in smaller type where there is one.
    """

    text: str
    notes: tuple[str, ...] = ()


EMPTY = Cell(NOTHING)


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        title: of its section.
        caption: where it ran, what all rows share and how to read the columns.
        head: names of the columns, of which all but the first `texts` hold numbers.
    """

    title: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    texts: int = 1


@dataclass(frozen=True)
class Unit:
    """Of a column's numbers."""

    name: str
    size: float

    def text(self, value: float, significant: int = 3) -> str:
        """A value without the unit's name."""
        return digits(value / self.size, significant)

    def full(self, value: float) -> str:
        """A value with the unit's name."""
        return f"{self.text(value)} {self.name}"


def time_unit(seconds: Iterable[float]) -> Unit:
    """The unit in which the smallest time still has a digit before the point."""
    return _unit(seconds, _TIME_UNITS)


def size_unit(sizes: Iterable[float]) -> Unit:
    """The unit in which the smallest size still has a digit before the point."""
    return _unit(sizes, _SIZE_UNITS)


def time_text(seconds: float) -> str:
    """A time with its unit."""
    return time_unit([seconds]).full(seconds)


def size_text(nbytes: float) -> str:
    """A size with its unit."""
    return size_unit([nbytes]).full(nbytes)


def digits(value: float, significant: int = 3) -> str:
    """A number of some significant digits, never in powers of ten."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    places = significant - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{min(max(places, 0), 9)}f}"


def ratio_text(ratio: float) -> str:
    """A ratio, with two digits behind the point where it is near 1."""
    return digits(ratio, 3 if ratio >= 1 else 2)


def interval(ends: tuple[float, float] | None, text: Callable[[float], str]) -> tuple[str, ...]:
    """The ends of an interval as a note of a cell; none where there is no interval."""
    return () if ends is None else (f"{text(ends[0])}\N{EN DASH}{text(ends[1])}",)


def distinct_rows(results: Results) -> list[Row]:
    """Measured rows without those that differ from an earlier one in size or batch alone."""
    found: dict[object, Row] = {}
    for row in measured_rows(results):
        subject = row.case.subject
        found.setdefault((subject.system, subject.precision, subject.backend, row.case.settings), row)
    return list(found.values())


def measured_rows(results: Results) -> list[Row]:
    """The rows that have timed runs."""
    return [row for row in results.rows if row.runs]


def ran_where(results: Results) -> str:
    """Where it ran, and with what weights if those mean nothing: a sentence or two that every table has."""
    devices = {row.on_gpu for row in measured_rows(results)}
    if not devices:
        where = "Nothing was measured."
    elif devices == {False}:
        where = "On the CPU; not run on a GPU."
    else:
        where = "On a GPU." if devices == {True} else "On the CPU and on a GPU, as the rows say."
    return f"{where} Random weights: timing only." if results.random_weights else where


def row_labels(results: Results) -> tuple[dict[Case, str], str]:
    """Short labels of the rows, numbered from 1, and what is left out of them because all share it.

    The backend that was asked for is left out too unless it tells rows apart: tables name what ran instead.
    """
    cases = [row.case for row in results.rows]
    parts = [(*case.parts[:1], *case.parts[2:]) for case in cases]
    if len(set(parts)) < len(parts):
        parts = [case.parts for case in cases]
    own, common = split_shared([each[1:] for each in parts])
    labels = {
        case: f"{place}: {', '.join((case.parts[0], *rest))}"
        for place, (case, rest) in enumerate(zip(cases, own, strict=True), 1)
    }
    return labels, ", ".join(common)


def split_shared(parts: Sequence[Sequence[str]]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Rows of as many parts each, into what is each row's own and what all of them share."""
    shared = [len(set(column)) == 1 for column in zip(*parts, strict=True)]
    own = [tuple(part for part, same in zip(row, shared, strict=True) if not same) for row in parts]
    return own, tuple(part for part, same in zip(parts[0] if parts else (), shared, strict=True) if same)


def framed(
    results: Results,
    title: str,
    words: str,
    head: Sequence[str],
    rows: Sequence[tuple[Row, Sequence[Cell]]],
    *,
    texts: int = 1,
) -> Table:
    """A table of rows of the results, their short labels as its first column.

    Columns that no row has anything in are left out.

    Args:
        words: for the caption, on how to read the columns.
        head: of the columns after the first.
        rows: cells of the columns after the first.
    """
    labels, common = row_labels(results)
    used = [place for place in range(len(head)) if any(cells[place] != EMPTY for _, cells in rows)]
    said = (ran_where(results), f"All rows: {common}." if common else "", words)
    return Table(
        title=title,
        caption=" ".join(part for part in said if part),
        head=("row", *(head[place] for place in used)),
        rows=tuple(
            (Cell(labels[row.case], (row.backend,) if row.backend else ()), *(cells[place] for place in used))
            for row, cells in rows
        ),
        texts=texts,
    )


def _unit(values: Iterable[float], units: Sequence[tuple[str, float]]) -> Unit:
    smallest = min((value for value in values if value > 0), default=units[0][1])
    name, size = next(((name, size) for name, size in units if smallest >= size), units[-1])
    return Unit(name, size)
