"""The tables of a report that hold times: latency, stages, cold start."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from .differences import Ratio
from .peer_ratios import base_row, bases, speed_up
from .report_cells import (
    EMPTY,
    NOTHING,
    TIMES,
    Cell,
    Table,
    Unit,
    digits,
    framed,
    interval,
    measured_rows,
    ratio_text,
    size_unit,
    time_unit,
)
from .results_file import STAGES, Results, Row
from .timings import summarize

OTHER = "other"
STAGE_TITLES = {
    "tokenize": "tokenize",
    "text_encoder": "text",
    "unet": "U-Net",
    "sampler": "sampler",
    "vae_decoder": "VAE",
    "encode": "PNG",
    OTHER: OTHER,
}


def latency_table(results: Results) -> Table:
    """End to end, by row: percentiles and throughput."""
    rows = measured_rows(results)
    unit = time_unit(summarize(row.seconds).p50 for row in rows)
    head = ("on", "runs", *(f"{name},\n{unit.name}" for name in ("p50", "p90", "p99", "mean")), "images/s", "it/s")
    words = (
        "End to end, from prompts to PNG files in memory. Under p50 the 95 % interval of the median, under the mean "
        "the standard deviation; p90 needs 10 runs, p99 100. A row is settled when the interval's half width is within "
        f"{results.confidence:.1%} of the median. images/s from p50, it/s the steps a second of the sampling loop."
    )
    return framed(results, "Latency", words, head, [(row, _latency_cells(results, row, unit)) for row in rows])


def ratios_table(results: Results) -> Table:
    """How many times as fast each row is as those of other systems that draw the same."""
    systems = bases(results)
    words = (
        "With 95 % intervals; above 1 the row is the faster one. Rows are held against the system's fastest row of the "
        f"same size, batch and settings, or against the first one of latentrt where it is alone. {_turns(results)}"
    )
    return framed(
        results,
        "Times as fast",
        words,
        tuple(f"as {system}" for system in systems),
        [
            (row, [_ratio_to(results, row, base_row(results, row, system)) for system in systems])
            for row in measured_rows(results)
        ],
    )


def stages_table(results: Results) -> Table:
    """Where the time goes: the median of each stage and its share of all runs' time; calls of the U-Net."""
    rows = measured_rows(results)
    unit = time_unit(call for row in rows for run in row.runs for call in run.calls)
    call = (f"a call,\n{unit.name}", f"on the GPU,\n{unit.name}")
    words = (
        f"Medians in {unit.name}, under them the share of the time of all runs; what no stage has is {OTHER}. "
        "A call is one of the U-Net: its median, under it p90."
    )
    if any(run.gpu_calls for row in rows for run in row.runs):
        words += " Times on the GPU are by CUDA events."
    head = (*(STAGE_TITLES[name] for name in (*STAGES, OTHER)), *call)
    return framed(results, "Stages", words, head, [(row, _stage_cells(row, unit)) for row in rows])


def stage_shares(row: Row) -> dict[str, float]:
    """Shares of the time of a row's runs by stage, in their order; those that no run has are left out."""
    total = sum(row.seconds)
    return {name: sum(times) / total for name, times in _stage_times(row).items() if times}


def cold_table(results: Results) -> Table:
    """Fresh processes up to their first picture, and the first run beside later ones."""
    rows = [row for row in results.rows if row.cold or (row.warm_up and row.runs)]
    starts = [start for row in rows for start in row.cold]
    unit = time_unit([start.process for start in starts] or [row.warm_up[0] for row in rows])
    size = size_unit(start.peak_rss for start in starts)
    head = ("starts", *(f"{name},\n{unit.name}" for name in ("process", "imports", "load", "picture")))
    words = (
        "Fresh processes, from the start of the interpreter to their first picture: medians, and the range of the "
        "whole. First run is that of the process that was timed afterwards, under it how many times its median run."
    )
    return framed(
        results,
        "Cold start",
        words,
        (*head, f"peak RSS,\n{size.name}", f"first run,\n{unit.name}"),
        [(row, _cold_cells(row, unit, size)) for row in rows],
    )


def _turns(results: Results) -> str:
    if results.interleaved:
        return "Rows took turns run by run, so that drift of the machine cancels."
    return "Rows took turns by blocks, each loaded anew, so that fast drift of the machine does not cancel."


def _latency_cells(results: Results, row: Row, unit: Unit) -> Sequence[Cell]:
    summary = summarize(row.seconds)
    spread = () if summary.std is None else (f"± {unit.text(summary.std)}",)
    return (
        _device(results, row),
        Cell(str(summary.count), ("settled" if row.settled else "unsettled",)),
        Cell(unit.text(summary.p50, 4), interval(summary.interval, lambda end: unit.text(end, 4))),
        _percentile(summary.p90, unit),
        _percentile(summary.p99, unit),
        Cell(unit.text(summary.mean, 4), spread),
        Cell(digits(row.case.subject.batch / summary.p50)),
        _steps_a_second(row),
    )


def _percentile(value: float | None, unit: Unit) -> Cell:
    return EMPTY if value is None else Cell(unit.text(value, 4))


def _device(results: Results, row: Row) -> Cell:
    """What the caption says of all rows is not said of each."""
    if len({each.on_gpu for each in measured_rows(results)}) == 1:
        return EMPTY
    return Cell("GPU" if row.on_gpu else "CPU")


def _steps_a_second(row: Row) -> Cell:
    times = [run.stages["unet"] + run.stages.get("sampler", 0.0) for run in row.runs if "unet" in run.stages]
    return Cell(digits(row.case.settings.steps / median(times))) if times else EMPTY


def _ratio_cell(ratio: Ratio) -> Cell:
    return Cell(ratio_text(ratio.value), interval(ratio.interval, ratio_text) or ("too few runs",))


def _ratio_to(results: Results, row: Row, base: Row | None) -> Cell:
    if base is None:
        return EMPTY
    return Cell("1", ("the base",)) if base is row else _ratio_cell(speed_up(results, row, base))


def _stage_times(row: Row) -> dict[str, list[float]]:
    times = {name: [run.stages[name] for run in row.runs if name in run.stages] for name in STAGES}
    times[OTHER] = [run.seconds - sum(run.stages.values()) for run in row.runs if run.stages]
    return times


def _stage_cells(row: Row, unit: Unit) -> Sequence[Cell]:
    shares = stage_shares(row)
    stages = [
        Cell(unit.text(median(times)), (f"{shares[name]:.1%}",)) if times else EMPTY
        for name, times in _stage_times(row).items()
    ]
    on_gpu = [call for run in row.runs for call in run.gpu_calls or ()]
    return (*stages, _calls_cell([call for run in row.runs for call in run.calls], unit), _calls_cell(on_gpu, unit))


def _calls_cell(calls: Sequence[float], unit: Unit) -> Cell:
    if not calls:
        return EMPTY
    summary = summarize(calls)
    return Cell(unit.text(summary.p50), (NOTHING if summary.p90 is None else f"p90 {unit.text(summary.p90)}",))


def _cold_cells(row: Row, unit: Unit, size: Unit) -> Sequence[Cell]:
    starts = row.cold
    later = median(row.seconds) if row.runs else None
    first = EMPTY
    if row.warm_up:
        longer = () if later is None else (f"{digits(row.warm_up[0] / later)} {TIMES}",)
        first = Cell(unit.text(row.warm_up[0]), longer)
    return (
        Cell(str(len(starts))) if starts else EMPTY,
        _range([start.process for start in starts], unit),
        *(_middle([getattr(start, part) for start in starts], unit) for part in ("imports", "load", "first")),
        _middle([start.peak_rss for start in starts], size),
        first,
    )


def _range(values: Sequence[float], unit: Unit) -> Cell:
    ends = (min(values), max(values)) if len(values) > 1 else None
    return Cell(_middle(values, unit).text, interval(ends, unit.text))


def _middle(values: Sequence[float], unit: Unit) -> Cell:
    return Cell(unit.text(median(values))) if values else EMPTY
