"""Plots as SVG that stands in a report's page and takes its colours and fonts."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib knows no style sheets: it draws in these colours, and those of report.css take their places.
INK, GRID, TESTED, KEPT, NEUTRAL = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
# Of data that have no such part, in their order.
SERIES = ("#101112", "#131415", "#161718", "#191a1b", "#1c1d1e", "#1f2021", "#222324")
_STYLES = {
    INK: "currentColor",
    GRID: "var(--line)",
    TESTED: "var(--tested)",
    KEPT: "var(--kept)",
    NEUTRAL: "var(--floor)",
    **{colour: f"var(--series-{place})" for place, colour in enumerate(SERIES, 1)},
}
_WIDTH = 9.0


def draw(name: str, paint: Callable[[Axes], None], *, height: float) -> str:
    """A plot as an <svg> element: the same bytes for the same data.

    Args:
        name: of the plot, which its ids begin with: no two plots of a page share it.
        paint: draws into the axes.
        height: in inches, of a width of nine.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # matplotlib types every key by itself.
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": INK,
        "text.parse_math": False,
        "axes.labelcolor": INK,
        "axes.edgecolor": GRID,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        paint(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for colour, own in _STYLES.items():
        text = text.replace(colour, own)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text)
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)


def legend(axes: Axes, *, columns: int = 4) -> None:
    """Names of what is drawn, above the axes."""
    axes.legend(
        frameon=False,
        labelcolor=INK,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        handlelength=1.4,
        columnspacing=1.2,
    )


def lay_rows(axes: Axes) -> None:
    """Set axes up for rows that lie one above the other."""
    axes.grid(axis="y", visible=False)
    axes.margins(y=0.01)
