"""What changed between two benchmarks of the same command, and whether anything became worse.

Every figure is held as a cost, of which less is better. It is worse where all of its interval lies beyond the threshold
and a test finds a difference, for as many rows as there are; the same where all of it lies within the threshold; and
else unclear, which more runs decide. A figure without an interval goes by its value and the test, one number by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from latentrt.calibrate.report_html import plain
from latentrt.runtime.errors import UsageError

from .cases import Case
from .changes import Change, price_changes, size_changes, time_changes, with_verdicts
from .results_file import Results, Row

# What a machine's facts must share for times and memory to say something about a program. Of GPUs it is the names.
_HARDWARE = ("architecture", "cpu", "cores", "gpus")
# Facts that may differ, and would be an explanation.
_SOFTWARE = ("platform", "python", "driver", "cuda", "cpu_governor")
# Files that a warning names.
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class RowChange:
    """The figures that a row has in both benchmarks; the median of its times comes first."""

    case: Case
    changes: tuple[Change, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two benchmarks beside each other.

    Attributes:
        threshold: relative change that counts.
        warnings: what else differs between them.
        comparable: whether the machines are alike. If not, times and memory are shown and not judged.
        rows: measured in both.
        broken: rows that were measured before and were skipped after, by label, with the reason.
        only_before: labels of the rows that were measured before and were not asked for after.
        only_after: labels of the rows that were measured after alone.
    """

    threshold: float
    warnings: tuple[str, ...]
    comparable: bool
    rows: tuple[RowChange, ...]
    broken: Mapping[str, str]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        """Whether a figure is worse, or a row cannot be measured any more on a machine that is alike."""
        worse = any(change.verdict == "worse" for row in self.rows for change in row.changes)
        return worse or (self.comparable and bool(self.broken))


def compare(before: Results, after: Results, *, threshold: float) -> Comparison:
    """Hold two benchmarks against each other, row by row.

    Args:
        before: of the program as it was.
        after: as it is.
        threshold: relative change that counts, such as 0.05. Two processes of one program may well differ by a percent
            or two, and their runs be sure of it: a threshold below that finds changes where nobody made any.

    Raises:
        UsageError: the threshold is not above 0, or the benchmarks have no row in common or are of different families
            of models.
    """
    if not 0 < threshold < float("inf"):
        raise UsageError(f"threshold: expected a share above 0, such as 0.05, got {threshold:g}.")
    family, other = (results.model.get("family") for results in (before, after))
    if family != other:
        raise UsageError(f"results: expected two of one family of models, got {family} and {other}.")
    hardware = list(_differing(_hardware(before), _hardware(after)))
    pictures = list(_differing(_drawn(before), _drawn(after)))
    old = {row.case: row for row in before.rows if row.runs}
    new = {row.case: row for row in after.rows}
    both = [case for case, row in new.items() if case in old and row.runs]
    broken = {case.label: row.skipped or "no timed run" for case, row in new.items() if case in old and not row.runs}
    if not (both or broken):
        raise UsageError("results: expected rows in common, got none. Measure both with the same options.")
    changes = [list(_changes(old[case], new[case], judged=not hardware, priced=not pictures)) for case in both]
    rows = zip(both, with_verdicts(changes, threshold), strict=True)
    return Comparison(
        threshold=threshold,
        warnings=(
            *(f"other hardware, so that times and memory cannot be judged: {each}" for each in hardware),
            *(f"other pictures, so that quality cannot be compared: {each}" for each in pictures),
            *_differing(_surroundings(before), _surroundings(after)),
            *_other_files(before, after),
            *_other_backends((old[case], new[case]) for case in both),
        ),
        comparable=not hardware,
        rows=tuple(RowChange(case=case, changes=tuple(judged)) for case, judged in rows),
        broken=broken,
        only_before=tuple(case.label for case in old if case not in new),
        only_after=tuple(case.label for case, row in new.items() if case not in old and row.runs),
    )


def _changes(before: Row, after: Row, *, judged: bool, priced: bool) -> Iterator[Change]:
    machine = (*time_changes(before, after), *size_changes(before, after))
    yield from machine if judged else (replace(change, judged=False) for change in machine)
    if priced and before.quality is not None and after.quality is not None:
        yield from price_changes(before.quality, after.quality)


def _hardware(results: Results) -> dict[str, Any]:
    facts = {name: results.machine.get(name) for name in _HARDWARE}
    return facts | {"gpus": [gpu.get("name") for gpu in results.machine.get("gpus") or ()]}


def _drawn(results: Results) -> dict[str, Any]:
    return {"prompts": results.prompts, "seed": results.seed, "reference": results.reference}


def _surroundings(results: Results) -> dict[str, Any]:
    """What may differ between two benchmarks that are compared, and is what a change may come from."""
    return {
        "latentrt": results.latentrt,
        "model": results.model.get("name"),
        **{name: results.machine.get(name) for name in _SOFTWARE},
        "rows took turns run by run": results.interleaved,
        "random weights": results.random_weights,
        **{f"package {name}": version for name, version in results.packages.items()},
    }


def _other_files(before: Results, after: Results) -> Iterator[str]:
    """That the bundle is another, in one line."""
    one, other = (results.model.get("files", {}) for results in (before, after))
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"files of the bundle differ: {', '.join(names[:_NAMED])}{more}"


def _other_backends(rows: Iterable[tuple[Row, Row]]) -> Iterator[str]:
    for before, after in rows:
        for what in ("backend", "precisions"):
            one, other = getattr(before, what), getattr(after, what)
            if one != other:
                yield f"{before.case.label}: {what} {plain(one)} before, {plain(other)} after"


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys((*before, *after)):
        one, other = before.get(name), after.get(name)
        if one != other:
            said = ["unknown" if value is None else plain(value) for value in (one, other)]
            yield f"{name}: {said[0]} before, {said[1]} after"
