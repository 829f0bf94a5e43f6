"""The plots of a report, as SVG that stands in a page and takes its colours and fonts."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from .plan import LayerPlan, Plan
from .prediction_noise import StepNoise
from .verification import FLOOR, Verification

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Share of the macs that are quantized, predicted dB, measured dB.
Frontier: TypeAlias = Sequence[tuple[float, float, float | None]]

_WIDTH = 9.0
_TOP_LAYERS = 16
# matplotlib knows no style sheets: it draws in these colours, and the page's own take their places.
_INK, _GRID, _TESTED, _KEPT, _FLOOR = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
_STYLES = {
    _INK: "currentColor",
    _GRID: "var(--line)",
    _TESTED: "var(--tested)",
    _KEPT: "var(--kept)",
    _FLOOR: "var(--floor)",
}


def noise_plot(verification: Verification, *, bound: float | None = None) -> str:
    """SQNR of predictions over the timesteps, tested and fp16.

    Args:
        bound: of the budget `sqnr`, drawn as a line.
    """

    def paint(axes: Axes) -> None:
        tested = verification.measured[verification.tested].noise
        floor = verification.measured[FLOOR].noise
        if floor is not None and verification.tested != FLOOR:
            _line(axes, floor.guided, _FLOOR, "-", f"{FLOOR}, guided")
        if tested is not None:
            _line(axes, tested.raw, _TESTED, "--", f"{verification.tested}, raw")
            _line(axes, tested.guided, _TESTED, "-", f"{verification.tested}, guided")
        if bound is not None:
            axes.axhline(bound, color=_KEPT, linewidth=1.2, linestyle=":", label=f"budget, {bound:g} dB")
        axes.invert_xaxis()
        axes.set_xlabel("timestep, in the order of sampling")
        axes.set_ylabel("SQNR in dB")
        _legend(axes)

    return _svg("noise", paint, height=3.4)


def layers_plot(plan: Plan) -> str:
    """The layers that would add most noise, and whether they are quantized."""

    def paint(axes: Axes) -> None:
        worst = noisiest(plan)[:_TOP_LAYERS][::-1]
        total = sum(layer.noise or 0.0 for layer in plan.layers)
        for quantized, colour, label in ((True, _TESTED, plan.precision), (False, _KEPT, "kept")):
            chosen = [(row, layer) for row, layer in enumerate(worst) if layer.quantized == quantized]
            if not chosen:
                continue
            heights = [100 * (layer.noise or 0.0) / total for _, layer in chosen]
            axes.barh([row for row, _ in chosen], heights, color=colour, height=0.7, label=label)
        axes.set_yticks(range(len(worst)), [short_name(layer.name) for layer in worst])
        axes.set_xlabel("share of the noise that all layers would add, in %")
        _rows_of(axes)
        _legend(axes)

    return _svg("layers", paint, height=0.9 + 0.26 * min(_TOP_LAYERS, len(plan.layers)))


def kinds_plot(plan: Plan) -> str:
    """Noise and cost of the layers by what they are in the network."""
    shares = kind_shares(plan)

    def paint(axes: Axes) -> None:
        rows = range(len(shares))
        noise = [100 * share for _, share, _ in shares[::-1]]
        macs = [100 * share for _, _, share in shares[::-1]]
        axes.barh([row + 0.19 for row in rows], noise, color=_TESTED, height=0.36, label="noise, if quantized")
        axes.barh([row - 0.19 for row in rows], macs, color=_FLOOR, height=0.36, label="multiplications")
        axes.set_yticks(rows, [kind for kind, _, _ in shares[::-1]])
        axes.set_xlabel("share of all layers, in %")
        _rows_of(axes)
        _legend(axes)

    return _svg("kinds", paint, height=0.9 + 0.36 * len(shares))


def frontier_plot(frontier: Frontier, chosen: tuple[float, float, float | None], kind: str) -> str:
    """The mixes of a solver: share of the macs that is quantized against the ratio of the guided prediction."""

    def paint(axes: Axes) -> None:
        mixes = sorted(frontier, key=lambda mix: mix[:2])
        shares = [100 * share for share, _, _ in mixes]
        axes.plot(shares, [predicted for _, predicted, _ in mixes], color=_FLOOR, marker=".", label="predicted")
        measured = {100 * share: value for share, _, value in mixes if value is not None}
        if measured:
            x, y = list(measured.keys()), list(measured.values())
            axes.scatter(x, y, color=_KEPT, marker="D", s=26, zorder=3, label="measured")
        share, predicted, value = chosen
        height = predicted if value is None else value
        axes.scatter([100 * share], [height], color=_TESTED, s=90, zorder=4, label="chosen plan")
        axes.set_xlabel(f"share of the multiplications in {kind}, in %")
        axes.set_ylabel("SQNR of the guided\nprediction in dB")
        _legend(axes)

    return _svg("frontier", paint, height=3.4)


def noisiest(plan: Plan) -> list[LayerPlan]:
    """Layers whose noise was measured, the noisiest first."""
    return sorted((layer for layer in plan.layers if layer.noise), key=lambda layer: -(layer.noise or 0.0))


def kind_shares(plan: Plan) -> list[tuple[str, float, float]]:
    """Kind, share of the noise that all layers would add, and share of the macs; the noisiest kind first."""
    total = sum(layer.noise or 0.0 for layer in plan.layers) or 1.0
    sums: dict[str, tuple[float, float]] = {}
    for layer in plan.layers:
        noise, macs = sums.get(layer.kind, (0.0, 0.0))
        sums[layer.kind] = noise + (layer.noise or 0.0) / total, macs + layer.macs
    return sorted(((kind, *shares) for kind, shares in sums.items()), key=lambda item: -item[1])


def short_name(layer: str) -> str:
    """A layer's name without what all names share."""
    return layer.removeprefix("unet.").removesuffix(".weight")


def _line(axes: Axes, steps: Sequence[StepNoise], colour: str, style: str, label: str) -> None:
    x, y = [step.timestep for step in steps], [step.sqnr_db for step in steps]
    axes.plot(x, y, color=colour, linestyle=style, marker=".", label=label)


def _rows_of(axes: Axes) -> None:
    axes.grid(axis="y", visible=False)
    axes.margins(y=0.01)


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, labelcolor=_INK, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)


def _svg(name: str, paint: Callable[[Axes], None], *, height: float) -> str:
    """A plot as an <svg> element, the same bytes for the same data, its ids made of the name."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # matplotlib types every key by itself.
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _GRID,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": _GRID,
        "xtick.color": _INK,
        "ytick.color": _INK,
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
