"""The plots of a benchmark's report that show times: all runs, their order, their stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from latentrt.calibrate.report_svg import GRID, INK, NEUTRAL, SERIES, draw, lay_rows, legend

from .cases import OURS, PEERS
from .report_cells import digits, measured_rows, row_labels, time_unit
from .results_file import STAGES, Results, Row
from .speed_tables import OTHER, STAGE_TITLES, stage_shares
from .timings import summarize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LANE = 0.42
# Systems by colour and by marker, for those who do not tell the colours apart.
_LOOKS = dict(zip((OURS, *PEERS), zip(SERIES, "osD^", strict=False), strict=False))
# Largest over smallest time above which a linear axis would press the small ones together.
_WIDE = 12.0


def latency_plot(results: Results) -> str:
    """Every run of every row, for each picture: from the top of its lane, the first run, to the bottom, the last."""
    rows = measured_rows(results)
    times = [[seconds / row.case.subject.batch for seconds in row.seconds] for row in rows]
    unit = time_unit(summarize(each).p50 for each in times)

    def paint(axes: Axes) -> None:
        for lane, (row, each) in enumerate(zip(rows, times, strict=True)):
            colour, marker = _LOOKS[row.case.subject.system]
            summary = summarize(each)
            if summary.interval is not None:
                low, high = (end / unit.size for end in summary.interval)
                axes.barh([lane], [high - low], left=[low], height=0.8, color=NEUTRAL, alpha=0.4, zorder=1)
            axes.vlines([summary.p50 / unit.size], lane - 0.4, lane + 0.4, color=INK, linewidth=1.6, zorder=3)
            heights = [lane - 0.34 + 0.68 * place / max(1, len(each) - 1) for place in range(len(each))]
            x = [seconds / unit.size for seconds in each]
            label = row.case.subject.system
            axes.plot(x, heights, marker, color=colour, markersize=3, alpha=0.7, zorder=2, label=label)
        # An interval may begin at the leftmost point, which would lie on the edge.
        axes.use_sticky_edges = False
        name_lanes(axes, results, rows)
        if max(map(max, times)) > _WIDE * min(map(min, times)):
            take_logarithms(axes, "x")
        axes.set_xlabel(f"for each picture, in {unit.name}")
        _legend_once(axes)

    return draw("latency", paint, height=lane_height(rows))


def turns_plot(results: Results) -> str:
    """Every run in the order of the benchmark, as its distance from its row's median."""
    rows = measured_rows(results)

    def paint(axes: Axes) -> None:
        axes.axhline(0, color=GRID)
        for row in rows:
            colour, marker = _LOOKS[row.case.subject.system]
            middle = summarize(row.seconds).p50
            y = [100 * (run.seconds / middle - 1) for run in row.runs]
            label = row.case.subject.system
            axes.plot([run.turn for run in row.runs], y, marker, color=colour, markersize=3, alpha=0.7, label=label)
        axes.set_xlabel("turn")
        axes.set_ylabel("from the row's median, in %")
        _legend_once(axes)

    return draw("turns", paint, height=2.9)


def stages_plot(results: Results) -> str:
    """Where the median run's time goes, for each picture."""
    rows = [row for row in measured_rows(results) if stage_shares(row)]
    lengths = [summarize(row.seconds).p50 / row.case.subject.batch for row in rows]
    unit = time_unit(lengths)

    def paint(axes: Axes) -> None:
        ends = [0.0] * len(rows)
        shares = [stage_shares(row) for row in rows]
        for name, colour in zip((*STAGES, OTHER), SERIES, strict=True):
            widths = [
                max(0.0, share.get(name, 0.0)) * length / unit.size
                for share, length in zip(shares, lengths, strict=True)
            ]
            axes.barh(range(len(rows)), widths, left=ends, height=0.7, color=colour, label=STAGE_TITLES[name])
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        name_lanes(axes, results, rows)
        axes.set_xlabel(f"for each picture, in {unit.name}")
        legend(axes, columns=len(STAGES) + 1)

    return draw("stages", paint, height=lane_height(rows))


def lane_height(rows: Sequence[object]) -> float:
    """Inches of a plot with a lane for each row."""
    return 1.1 + _LANE * len(rows)


def name_lanes(axes: Axes, results: Results, rows: Sequence[Row]) -> None:
    """Name the lanes of a plot, the first row at the top."""
    labels, _ = row_labels(results)
    axes.set_yticks(range(len(rows)), [labels[row.case] for row in rows])
    axes.invert_yaxis()
    lay_rows(axes)


def take_logarithms(axes: Axes, *names: str) -> None:
    """Make the axes `x` or `y` logarithmic, with plain numbers beside them, enough of them within a decade too."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: digits(value, 1))
        axis.set_minor_formatter(NullFormatter())


def _legend_once(axes: Axes) -> None:
    """A legend in which what several rows share stands once."""
    handles, labels = axes.get_legend_handles_labels()
    seen: set[str] = set()
    for handle, label in zip(handles, labels, strict=True):
        if label in seen:
            handle.set_label("_nolegend_")
        seen.add(label)
    legend(axes)
