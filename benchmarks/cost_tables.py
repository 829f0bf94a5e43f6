"""The tables of a report that hold what speed takes: memory, the roofline; and what is missing."""

from __future__ import annotations

from collections.abc import Sequence

from .report_cells import EMPTY, Cell, Table, Unit, digits, framed, size_unit, time_unit
from .results_file import Memory, Peak, Results, Row
from .roofline import achieved_flops, bound, host_gap, intensity, share_of_peak


def memory_table(results: Results) -> Table:
    """Memory of each row's process, and on the GPU by what it is for."""
    found = [(row, row.memory) for row in results.rows if row.memory is not None]
    unit = size_unit(memory.rss_loaded for _, memory in found)
    head = (
        *(f"RSS\n{name},\n{unit.name}" for name in ("loaded", "peak")),
        *(f"VRAM\n{name},\n{unit.name}" for name in ("weights", "activation", "I/O", "context", "peak")),
    )
    words = "RSS is of the row's own process, with its model loaded and at the highest."
    reasons = {memory.vram.reason: None for _, memory in found if memory.vram.reason is not None}
    if reasons:
        words += f" VRAM is not known: {'; '.join(reasons)}."
    return framed(results, "Memory", words, head, [(row, _memory_cells(memory, unit)) for row, memory in found])


def disk_table(results: Results) -> Table:
    """Files that rows load."""
    found = [(row, row.disk) for row in results.rows if row.disk is not None and row.disk.bundle]
    unit = size_unit(disk.graphs for _, disk in found)
    return framed(
        results,
        "On disk",
        "Graphs with their weights and engines, as far as the row loads them, and the whole bundle.",
        tuple(f"{name}, {unit.name}" for name in ("graphs", "engines", "bundle")),
        [
            (row, [_size(size or None, unit) for size in (disk.graphs, disk.engines, disk.bundle)])
            for row, disk in found
        ],
    )


def roofline_table(results: Results) -> Table:
    """The work of the U-Net and of the VAE's decoder against what the device could do."""
    rows = [row for row in results.rows if row.roofline is not None]
    unit = time_unit(gap for gap in map(host_gap, rows) if gap is not None)
    head = (
        *(f"U-Net,\n{name}" for name in ("TFLOP/call", "TFLOP/s", "FLOP/byte")),
        f"host gap,\n{unit.name}",
        *(f"VAE,\n{name}" for name in ("TFLOP/s", "FLOP/byte")),
    )
    words = (
        "Work is counted in the graph, a multiplication and an addition being two; peers are told the same. Under "
        "TFLOP/s the share of the peak, under FLOP/byte (of the least that has to be moved) what limits it at best. "
        "The host gap is the time of a step in which the U-Net does not compute. "
        f"Peaks: {'; '.join(_peaks(rows))}."
    )
    return framed(results, "Roofline", words, head, [(row, _roofline_cells(row, unit)) for row in rows])


def missing_table(results: Results) -> Table:
    """Rows that were not measured, or not as it was asked for, and why."""
    rows = [row for row in results.rows if row.skipped is not None or row.notes]
    return framed(
        results,
        "Not measured, or not as asked for",
        "",
        ("measured", "why"),
        [(row, (Cell("yes" if row.skipped is None else "no"), _reasons(row))) for row in rows],
        texts=3,
    )


def _memory_cells(memory: Memory, unit: Unit) -> Sequence[Cell]:
    vram = memory.vram
    sizes = (memory.rss_loaded, memory.peak_rss, vram.weights, vram.activation, vram.io, vram.context)
    peak = _size(vram.peak, unit)
    if vram.peak_of == "gpu":
        peak = Cell(peak.text, ("whole GPU",))
    return (*(_size(size, unit) for size in sizes), peak)


def _size(size: int | None, unit: Unit) -> Cell:
    return EMPTY if size is None else Cell(unit.text(size))


def _roofline_cells(row: Row, unit: Unit) -> Sequence[Cell]:
    unet = None if row.roofline is None else row.roofline.work.get("unet")
    gap = host_gap(row)
    return (
        _figure(None if unet is None else unet.flops / 1e12),
        *_against_peak(row, "unet"),
        EMPTY if gap is None else Cell(unit.text(gap)),
        *_against_peak(row, "vae_decoder"),
    )


def _against_peak(row: Row, stage: str) -> tuple[Cell, Cell]:
    achieved, share, limit = achieved_flops(row, stage), share_of_peak(row, stage), bound(row, stage)
    return (
        _figure(None if achieved is None else achieved / 1e12, None if share is None else f"{share:.1%}"),
        _figure(intensity(row, stage), limit),
    )


def _figure(value: float | None, note: str | None = None) -> Cell:
    return EMPTY if value is None else Cell(digits(value), () if note is None else (note,))


def _peaks(rows: Sequence[Row]) -> list[str]:
    """What rows are held against, by the precisions that it is for."""
    precisions: dict[Peak, list[str]] = {}
    for row in rows:
        if row.roofline is not None:
            precisions.setdefault(row.roofline.peak, []).append(row.case.subject.precision)
    return [f"{'/'.join(dict.fromkeys(names))} {_peak_words(peak)}" for peak, names in precisions.items()]


def _peak_words(peak: Peak) -> str:
    flops = "unknown" if peak.flops is None else f"{digits(peak.flops / 1e12)} TFLOP/s"
    moved = "unknown" if peak.bandwidth is None else f"{digits(peak.bandwidth / 1e9)} GB/s"
    return f"{flops}, {moved} on {peak.device} ({peak.source})"


def _reasons(row: Row) -> Cell:
    """The first line of each: what a process wrote at its end may follow, and is in the results."""
    reasons = row.notes if row.skipped is None else (row.skipped, *row.notes)
    first, *more = (reason.partition("\n")[0] for reason in reasons)
    return Cell(first, tuple(more))
