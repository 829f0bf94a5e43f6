"""What a comparison of two benchmarks comes to, in sentences and cells."""

from __future__ import annotations

from collections.abc import Mapping

from .changes import Change, Kind, Verdict
from .compare import Comparison
from .report_cells import NOTHING, digits, interval, size_unit, time_unit

HEAD = ("row", "figure", "before", "after", "change", "95 % interval", "p", "verdict")
_ORDER: tuple[Verdict, ...] = ("worse", "better", "same", "unclear")
_VERDICTS: Mapping[Kind, Mapping[Verdict, str]] = {
    "time": {"better": "faster", "worse": "slower"},
    "size": {"better": "smaller", "worse": "larger"},
    "quality": {},
}


def comparison_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Cells below HEAD: a line for each figure. Of a PSNR the change is that of the error's power, by picture."""
    return [
        ("" if place else row.case.label, *_cells(change))
        for row in comparison.rows
        for place, change in enumerate(row.changes)
    ]


def comparison_sentences(comparison: Comparison) -> list[str]:
    """What the comparison comes to, one thing each: the verdict first, then warnings and rows without partners."""
    return [
        _heading(comparison),
        *(f"Note: {warning}." for warning in comparison.warnings),
        *(f"Cannot be measured any more: {label}: {reason}" for label, reason in comparison.broken.items()),
        *(f"Measured before only: {label}." for label in comparison.only_before),
        *(f"Measured after only: {label}." for label in comparison.only_after),
    ]


def _heading(comparison: Comparison) -> str:
    changes = [change for row in comparison.rows for change in row.changes]
    counts = {verdict: [change.verdict for change in changes].count(verdict) for verdict in _ORDER}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    if not said:
        return "Nothing could be judged."
    rows = "1 row" if len(comparison.rows) == 1 else f"{len(comparison.rows)} rows"
    return f"{said} of {sum(counts.values())} figures in {rows}, at a threshold of {comparison.threshold:.3g}."


def _cells(change: Change) -> tuple[str, ...]:
    before, after = _values(change)
    return (
        change.what,
        before,
        after,
        f"{change.ratio - 1:+.1%}",
        "".join(interval(change.interval, lambda end: f"{end - 1:+.1%}")) or NOTHING,
        NOTHING if change.p is None else f"{change.p:.2g}",
        NOTHING if change.verdict is None else _VERDICTS[change.kind].get(change.verdict, change.verdict),
    )


def _values(change: Change) -> tuple[str, str]:
    values = (change.before, change.after)
    if change.kind == "quality":
        suffix = " dB" if change.what == "PSNR" else ""
        return digits(values[0]) + suffix, digits(values[1]) + suffix
    unit = (time_unit if change.kind == "time" else size_unit)(values)
    return f"{unit.text(values[0])} {unit.name}", f"{unit.text(values[1])} {unit.name}"
