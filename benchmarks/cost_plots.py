"""The plots of a benchmark's report that show what speed takes and costs: memory, the roofline, quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from latentrt.calibrate.report_svg import KEPT, NEUTRAL, SERIES, TESTED, draw, legend

from .bench_plots import lane_height, name_lanes, take_logarithms
from .cases import OURS
from .pareto import ParetoTable
from .report_cells import distinct_rows, row_labels, size_unit, time_unit
from .results_file import Peak, Results, Row
from .roofline import achieved_flops, intensity
from .speed_tables import STAGE_TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = ("-", "--", ":", "-.")
_MARKERS = "osD^v"
_SHAPES = {"unet": "o", "vae_decoder": "s"}


def pareto_plot(results: Results, table: ParetoTable) -> str:
    """Speed against a price, points by the numbers of their rows: filled on the front, hollow if another is better."""
    unit = time_unit(point.seconds for group in table.groups for point in group.points)

    def paint(axes: Axes) -> None:
        for place, group in enumerate(table.groups):
            colour, marker = SERIES[place % len(SERIES)], _MARKERS[place % len(_MARKERS)]
            front = [(point.seconds / unit.size, point.quality) for point in group.front]
            axes.plot(*zip(*front, strict=True), color=colour, linewidth=1, drawstyle="steps-post")
            for point in group.points:
                at = point.seconds / unit.size, point.quality
                fill = colour if point.on_front else "none"
                axes.plot(*([each] for each in at), marker, color=colour, markerfacecolor=fill, markersize=7)
                axes.annotate(str(point.row + 1), at, (7, 4), textcoords="offset points", fontsize=9)
            axes.plot([], [], f"{marker}-", color=colour, label=group.title)
        axes.margins(x=0.06, y=0.12)
        axes.set_xlabel(f"median for each picture, in {unit.name}")
        axes.set_ylabel(table.title)
        legend(axes, columns=1 if len(table.groups) < 4 else 2)

    return draw(f"pareto-{table.price.replace('_', '-')}", paint, height=3.6 + 0.2 * min(len(table.groups), 4))


def memory_plot(results: Results) -> str:
    """Memory of every row's process, loaded and at its peak."""
    found = [(row, row.memory) for row in results.rows if row.memory is not None]
    unit = size_unit(memory.rss_loaded for _, memory in found)

    def paint(axes: Axes) -> None:
        loaded = [memory.rss_loaded / unit.size for _, memory in found]
        peaks = [memory.peak_rss / unit.size for _, memory in found]
        axes.barh([lane - 0.19 for lane in range(len(found))], loaded, color=NEUTRAL, height=0.36, label="RSS loaded")
        axes.barh([lane + 0.19 for lane in range(len(found))], peaks, color=TESTED, height=0.36, label="RSS peak")
        name_lanes(axes, results, [row for row, _ in found])
        axes.set_xlabel(unit.name)
        legend(axes)

    return draw("memory", paint, height=lane_height(found))


def vram_plot(results: Results) -> str:
    """Memory on the GPU by what it is for, and its peak."""
    found = [(row, row.memory.vram) for row in results.rows if row.memory is not None and row.memory.vram.peak]
    unit = size_unit(vram.peak or 0 for _, vram in found)

    def paint(axes: Axes) -> None:
        ends = [0.0] * len(found)
        for name, colour in zip(("weights", "activation", "io", "context"), SERIES, strict=False):
            sizes = [(getattr(vram, name) or 0) / unit.size for _, vram in found]
            label = "I/O" if name == "io" else name
            axes.barh(range(len(found)), sizes, left=ends, height=0.6, color=colour, label=label)
            ends = [end + size for end, size in zip(ends, sizes, strict=True)]
        peaks = [(vram.peak or 0) / unit.size for _, vram in found]
        axes.plot(peaks, range(len(found)), "D", color=KEPT, markersize=6, label="peak")
        name_lanes(axes, results, [row for row, _ in found])
        axes.set_xlabel(unit.name)
        legend(axes, columns=5)

    return draw("vram", paint, height=lane_height(found))


def latents_plot(results: Results) -> str:
    """How far the latents of `moving_rows` are from the reference's after every step."""
    from matplotlib.ticker import MaxNLocator

    labels, _ = row_labels(results)
    found = moving_rows(results)

    def paint(axes: Axes) -> None:
        for place, (row, distances) in enumerate(found):
            colour, line = SERIES[place % len(SERIES)], _LINES[place % len(_LINES)]
            shown = [(step, value) for step, value in enumerate(distances, 1) if value > 0]
            label = labels[row.case]
            axes.plot(*zip(*shown, strict=True), color=colour, linestyle=line, marker=".", label=label)
        take_logarithms(axes, "y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        axes.set_ylabel("relative L2 distance")
        legend(axes, columns=2)

    return draw("latents", paint, height=3.2 + 0.11 * len(found))


def moving_rows(results: Results) -> list[tuple[Row, Sequence[float]]]:
    """Rows whose latents leave the reference's, and how far after each step; of several batches or sizes the first."""
    rows = distinct_rows(results)
    return [(row, row.quality.latent_l2) for row in rows if row.quality is not None and any(row.quality.latent_l2)]


def roofline_plot(results: Results) -> str:
    """Operations a second that the U-Net and the VAE's decoder reached, under the ceilings of their devices."""
    ceilings: dict[Peak, list[Row]] = {}
    for row in results.rows:
        if row.roofline is not None:
            ceilings.setdefault(row.roofline.peak, []).append(row)

    def paint(axes: Axes) -> None:
        reached = [
            (place, row, stage, work, flops / 1e12)
            for place, under in enumerate(ceilings.values())
            for row in under
            for stage in ("unet", "vae_decoder")
            if (work := intensity(row, stage)) and (flops := achieved_flops(row, stage))
        ]
        far = max((work for *_, work, _ in reached), default=100.0)
        near = min((work for *_, work, _ in reached), default=1.0)
        for place, (peak, under) in enumerate(ceilings.items()):
            _ceiling(axes, peak, under, near / 4, far * 4, SERIES[place % len(SERIES)])
        for place, row, stage, work, flops in reached:
            colour = SERIES[place % len(SERIES)]
            fill = colour if row.case.subject.system == OURS else "none"
            axes.plot([work], [flops], _SHAPES[stage], color=colour, markerfacecolor=fill, markersize=6)
            if stage == "unet":
                number = str(results.rows.index(row) + 1)
                axes.annotate(number, (work, flops), (6, 3), textcoords="offset points", fontsize=8)
        for stage, marker in _SHAPES.items():
            axes.plot([], [], marker, color=NEUTRAL, label=STAGE_TITLES[stage])
        axes.plot([], [], "o", color=NEUTRAL, markerfacecolor="none", label="peers are hollow")
        take_logarithms(axes, "x", "y")
        axes.set_xlabel("operations for each byte that has to be moved")
        axes.set_ylabel("TFLOP/s")
        legend(axes, columns=3)

    return draw("roofline", paint, height=4.2)


def _ceiling(axes: Axes, peak: Peak, rows: Sequence[Row], near: float, far: float, colour: str) -> None:
    """What a device could do at most at each intensity: first its bandwidth decides, then its arithmetic."""
    if peak.flops is None:
        return
    top = peak.flops / 1e12
    precisions = "/".join(dict.fromkeys(row.case.subject.precision for row in rows))
    label = f"{precisions}, {peak.device}"
    if peak.bandwidth is None:
        axes.plot([near, far], [top, top], color=colour, linewidth=1.4, label=label)
        return
    knee = peak.flops / peak.bandwidth
    near, far = min(near, knee / 4), max(far, knee * 4)
    axes.plot([near, knee, far], [top * near / knee, top, top], color=colour, linewidth=1.4, label=label)
