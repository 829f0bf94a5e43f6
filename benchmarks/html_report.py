"""A benchmark's report: one HTML page that needs nothing else, neither scripts nor a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from statistics import fmean, median
from typing import TypeAlias

from latentrt.calibrate.report_html import document, facts, listed, plot, table, tiles
from latentrt.runtime.manifest import write_atomic

from .bench_plots import latency_plot, stages_plot, turns_plot
from .cases import OURS
from .cost_plots import latents_plot, memory_plot, moving_rows, pareto_plot, roofline_plot, vram_plot
from .peer_ratios import verdicts
from .picture_pairs import pictures_section
from .quality_tables import measured_prices
from .report_cells import Cell, Table, digits, measured_rows, ran_where, row_labels, size_text, time_text
from .report_tables import all_tables
from .report_words import a_picture, heading, making, row_name, sentences
from .results_file import Results
from .speed_tables import stage_shares

# Title of the section that a plot belongs to, what the plot says, and the plot.
_Drawn: TypeAlias = tuple[str, str, str]


def write_html(path: Path, results: Results, folder: Path) -> None:
    """Write the report's page.

    Args:
        folder: of the results' file, which the pictures' names start from.

    Raises:
        ArtifactError: a picture is missing or damaged.
        OSError: the disk is full or the folder not writable.
    """
    write_atomic(path, page(results, folder).encode())


def page(results: Results, folder: Path) -> str:
    """The report as an HTML page; `folder` is where the names of pictures start from.

    Raises:
        ArtifactError: a picture is missing or damaged.
    """
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    plots = _plots(results)
    sections = [_section(each, plots.get(each.title, ())) for each in all_tables(results)]
    parts = (_headline(results), *sections, pictures_section(results, folder), _making(results))
    body = "\n".join(part for part in parts if part)
    return document(heading(results), body, style=style)


def _headline(results: Results) -> str:
    said = listed(escape(sentence) for sentence in sentences(results))
    # The colour of good news is for what was shown.
    first = next(verdicts(results), None)
    shown = first is not None and first.ratio.interval is not None and first.ratio.interval[0] > 1
    return (
        f'<p class="soft">latentrt bench, {escape(results.date)}</p>\n<h1>{escape(heading(results))}</h1>\n'
        f'<p class="where">{escape(ran_where(results))}</p>\n'
        f'<div class="verdict{"" if shown else " open"}">\n{said}\n</div>\n{_tiles(results)}'
    )


def _tiles(results: Results) -> str:
    """The fastest row of latentrt in figures."""
    own = [row for row in measured_rows(results) if row.case.subject.system == OURS]
    if not own:
        return ""
    best = min(own, key=a_picture)
    figures = {
        f"images/s of the fastest, {row_name(best)} batch {best.case.subject.batch}": digits(1 / a_picture(best)),
        "a picture of it": time_text(a_picture(best)),
    }
    if best.cold:
        figures["its cold start"] = time_text(median(start.process for start in best.cold))
    if best.memory is not None:
        figures["its peak RSS"] = size_text(best.memory.peak_rss)
        if best.memory.vram.peak is not None:
            figures["its peak VRAM"] = size_text(best.memory.vram.peak)
    if best.quality is not None and best.quality.psnr:
        figures["its mean PSNR"] = f"{fmean(best.quality.psnr):.1f} dB"
    return tiles(figures)


def _section(each: Table, plots: tuple[str, ...]) -> str:
    cells = [[_html(cell) for cell in row] for row in each.rows]
    drawn = table(each.caption, each.head, cells, numbers=range(each.texts, len(each.head)))
    return "\n".join((f"<h2>{escape(each.title)}</h2>", *plots, drawn))


def _html(cell: Cell) -> str:
    return escape(cell.text) + "".join(f"<small>{escape(note)}</small>" for note in cell.notes)


def _plots(results: Results) -> Mapping[str, tuple[str, ...]]:
    """The plots by the titles of the tables that they stand above."""
    found: dict[str, tuple[str, ...]] = {}
    for title, words, svg in (*_time_plots(results), *_cost_plots(results), *_quality_plots(results)):
        found[title] = (*found.get(title, ()), plot(svg, f"{words} {ran_where(results)}"))
    return found


def _time_plots(results: Results) -> Iterator[_Drawn]:
    rows = measured_rows(results)
    if not rows:
        return
    labels, _ = row_labels(results)
    words = (
        "Every run as a point, from the top of its lane, the first, to the bottom, the last; lines are medians, behind "
        "them their 95 % intervals. The quickest for each picture is row "
        f"{labels[min(rows, key=a_picture).case]}."
    )
    yield "Latency", words, latency_plot(results)
    words = (
        "The same runs in the order in which they were made, as distances from their rows' medians. A drift of the "
        "machine would be a slope that all rows share."
    )
    yield "Latency", words, turns_plot(results)
    shares = {row.case: stage_shares(row).get("unet", 0.0) for row in rows if stage_shares(row)}
    if shares:
        most = max(shares, key=lambda case: shares[case])
        words = f"The U-Net takes at most {shares[most]:.1%} of a run, in row {labels[most]}."
        yield "Stages", words, stages_plot(results)


def _cost_plots(results: Results) -> Iterator[_Drawn]:
    memories = [row.memory for row in results.rows if row.memory is not None]
    if memories:
        words = "Resident memory of each row's process, loaded and at its peak."
        yield "Memory", words, memory_plot(results)
    if any(memory.vram.peak for memory in memories):
        words = "Memory on the GPU by what it is for, as far as it is known, and its peak."
        yield "Memory", words, vram_plot(results)
    if any(row.roofline is not None for row in results.rows):
        words = (
            "Lines are what the device could do at most: on the slope its memory limits, on the level its arithmetic. "
            "Points are the U-Net and the VAE's decoder of each row, in the colour of their precision's line."
        )
        yield "Roofline", words, roofline_plot(results)


def _quality_plots(results: Results) -> Iterator[_Drawn]:
    if moving_rows(results):
        words = (
            "How far the latents are from the reference's after each step; of rows that differ in size or batch alone, "
            "the first. Rows that equal the reference to the bit have no line."
        )
        yield "Quality", words, latents_plot(results)
    for each in measured_prices(results):
        front = sum(len(group.front) for group in each.groups)
        total = sum(len(group.points) for group in each.groups)
        words = (
            f"{each.title} against time: {front} of {total} rows are on the front. Points have the numbers of their "
            "rows; hollow ones are beaten by another row of their group."
        )
        yield "Speed against its price", words, pareto_plot(results, each)


def _making(results: Results) -> str:
    return f"<h2>How it was made</h2>\n<pre>{escape(results.command)}</pre>\n{facts(making(results))}"
