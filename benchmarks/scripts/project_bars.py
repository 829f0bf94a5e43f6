"""What the project holds itself to, and what its results say of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from latentrt.benchmarks.cases import OURS, System
from latentrt.benchmarks.differences import Ratio
from latentrt.benchmarks.peer_ratios import speed_up
from latentrt.benchmarks.results_file import Results, Row, load_results

EAGER, COLD, OVERHEAD = 1.3, 5.0, 0.01
END_TO_END, FULL_SIZE, SAMPLERS = "end-to-end-cpu.json", "full-size-cpu.json", "samplers-cpu.json"


@dataclass(frozen=True)
class Bar:
    """A bound, and what was measured.

    Attributes:
        met: None if nothing was measured, for the reason that `found` states.
    """

    what: str
    found: str
    met: bool | None

    @property
    def line(self) -> str:
        """For people."""
        return f"{ {True: 'met', False: 'MISSED', None: 'not measured'}[self.met] }: {self.what}: {self.found}"


def bars_of(folder: Path) -> list[Bar]:
    """The bars of a 2-core CPU against the results in a folder; a file that is missing leaves its bars unmeasured.

    Raises:
        ArtifactError: a file is there and holds no results.
    """
    bars: list[Bar] = []
    for name, what in ((END_TO_END, "the shapes model"), (FULL_SIZE, "SD 1.5's width")):
        results = load_results(folder / name) if (folder / name).exists() else None
        missing = f"no {name}"
        bars.append(faster(results, "diffusers", f"{what}: at least {EAGER:g} times as fast as diffusers", missing))
        bars.append(no_slower(results, "optimum", f"{what}: no slower than optimum at fp32", missing))
        if name == END_TO_END:
            bars.append(cold_start(results, missing))
        bars.append(overhead(results, f"{what}: measuring takes less than {OVERHEAD:.0%}", missing))
    return [*bars, samplers(folder / SAMPLERS)]


def faster(results: Results | None, system: System, what: str, missing: str) -> Bar:
    """Whether the whole interval of the ratio, or the ratio where it has none, is at the bound or above."""
    return _ratio_bar(results, system, what, missing, lambda low, high: low >= EAGER)


def no_slower(results: Results | None, system: System, what: str, missing: str) -> Bar:
    """Whether the ratio's interval reaches 1: systems that cannot be told apart are no slower than each other."""
    return _ratio_bar(results, system, what, missing, lambda low, high: high >= 1)


def cold_start(results: Results | None, missing: str) -> Bar:
    """Medians of fresh processes, from their start to the first picture."""
    what = f"the shapes model: cold start to the first picture {COLD:g} times as fast as diffusers"
    found = _pair(results, "diffusers", missing)
    if isinstance(found, str):
        return Bar(what, found, None)
    _, ours, theirs = found
    if not (ours.cold and theirs.cold):
        return Bar(what, "no cold starts in it", None)
    mine, other = (statistics.median(start.process for start in row.cold) for row in (ours, theirs))
    return Bar(what, f"{other:.2f} s to {mine:.2f} s, {other / mine:.2f} times", other / mine >= COLD)


def overhead(results: Results | None, what: str, missing: str) -> Bar:
    """Share of a run that measuring took: by count, unless timed runs are longer beyond what chance does."""
    if results is None or results.overhead is None:
        return Bar(what, missing if results is None else "its overhead was not measured", None)
    found = results.overhead
    if found.interval is not None and not found.interval[0] < OVERHEAD:
        return Bar(what, str(found), False)
    if found.counted is not None:
        return Bar(what, str(found), found.counted < OVERHEAD)
    told = found.interval is not None and found.interval[1] < OVERHEAD
    return Bar(what, str(found) if told else f"cannot be told: {found}", True if told else None)


def samplers(file: Path) -> Bar:
    """Whether each sampler's arithmetic is as much faster than its diffusers scheduler's as its own bar wants."""
    what = "samplers: each above its own bar"
    if not file.exists():
        return Bar(what, f"no {file.name}", None)
    rows = json.loads(file.read_text())["rows"]
    below = [f"{row['sampler']} {row['ratio']:g} of {row['bar']:g}" for row in rows if not row["ratio"] >= row["bar"]]
    return Bar(what, ", ".join(below) or f"all {len(rows)}", bool(rows) and not below)


def row_of(results: Results, system: System, precision: str = "fp32") -> Row | None:
    """The first row of a system that was measured."""
    rows = (row for row in results.rows if row.case.subject.system == system and row.runs)
    return next((row for row in rows if row.case.subject.precision == precision), None)


def ratio_text(ratio: Ratio) -> str:
    """Such as `1.42 (1.39 to 1.45)`."""
    value = f"{ratio.value:.2f}"
    return value if ratio.interval is None else f"{value} ({ratio.interval[0]:.2f} to {ratio.interval[1]:.2f})"


def _ratio_bar(
    results: Results | None, system: System, what: str, missing: str, holds: Callable[[float, float], bool]
) -> Bar:
    found = _pair(results, system, missing)
    if isinstance(found, str):
        return Bar(what, found, None)
    ratio = speed_up(*found)
    return Bar(what, f"{ratio_text(ratio)} times", holds(*(ratio.interval or (ratio.value, ratio.value))))


def _pair(results: Results | None, system: System, missing: str) -> tuple[Results, Row, Row] | str:
    """Our fp32 row and another system's, or why there are none."""
    if results is None:
        return missing
    rows = [row_of(results, each) for each in (OURS, system)]
    if rows[0] is not None and rows[1] is not None:
        return results, rows[0], rows[1]
    skipped = [row.skipped for row in results.rows if row.skipped and row.case.subject.system in (OURS, system)]
    return skipped[0] if skipped else f"no row of {system} in fp32"
