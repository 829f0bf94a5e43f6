"""The plots of a calibration's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from .plan import LayerPlan, Plan
from .prediction_noise import StepNoise
from .report_svg import KEPT, NEUTRAL, TESTED, draw, lay_rows, legend
from .verification import FLOOR, Verification

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Share of the macs that are quantized, predicted dB, measured dB.
Frontier: TypeAlias = Sequence[tuple[float, float, float | None]]

_TOP_LAYERS = 16


def noise_plot(verification: Verification, *, bound: float | None = None) -> str:
    """SQNR of predictions over the timesteps, tested and fp16.

    Args:
        bound: of the budget `sqnr`, drawn as a line.
    """

    def paint(axes: Axes) -> None:
        tested = verification.measured[verification.tested].noise
        floor = verification.measured[FLOOR].noise
        if floor is not None and verification.tested != FLOOR:
            _line(axes, floor.guided, NEUTRAL, "-", f"{FLOOR}, guided")
        if tested is not None:
            _line(axes, tested.raw, TESTED, "--", f"{verification.tested}, raw")
            _line(axes, tested.guided, TESTED, "-", f"{verification.tested}, guided")
        if bound is not None:
            axes.axhline(bound, color=KEPT, linewidth=1.2, linestyle=":", label=f"budget, {bound:g} dB")
        axes.invert_xaxis()
        axes.set_xlabel("timestep, in the order of sampling")
        axes.set_ylabel("SQNR in dB")
        legend(axes)

    return draw("noise", paint, height=3.4)


def layers_plot(plan: Plan) -> str:
    """The layers that would add most noise, and whether they are quantized."""

    def paint(axes: Axes) -> None:
        worst = noisiest(plan)[:_TOP_LAYERS][::-1]
        total = sum(layer.noise or 0.0 for layer in plan.layers)
        for quantized, colour, label in ((True, TESTED, plan.precision), (False, KEPT, "kept")):
            chosen = [(row, layer) for row, layer in enumerate(worst) if layer.quantized == quantized]
            if not chosen:
                continue
            heights = [100 * (layer.noise or 0.0) / total for _, layer in chosen]
            axes.barh([row for row, _ in chosen], heights, color=colour, height=0.7, label=label)
        axes.set_yticks(range(len(worst)), [short_name(layer.name) for layer in worst])
        axes.set_xlabel("share of the noise that all layers would add, in %")
        lay_rows(axes)
        legend(axes)

    return draw("layers", paint, height=0.9 + 0.26 * min(_TOP_LAYERS, len(plan.layers)))


def kinds_plot(plan: Plan) -> str:
    """Noise and cost of the layers by what they are in the network."""
    shares = kind_shares(plan)

    def paint(axes: Axes) -> None:
        rows = range(len(shares))
        noise = [100 * share for _, share, _ in shares[::-1]]
        macs = [100 * share for _, _, share in shares[::-1]]
        axes.barh([row + 0.19 for row in rows], noise, color=TESTED, height=0.36, label="noise, if quantized")
        axes.barh([row - 0.19 for row in rows], macs, color=NEUTRAL, height=0.36, label="multiplications")
        axes.set_yticks(rows, [kind for kind, _, _ in shares[::-1]])
        axes.set_xlabel("share of all layers, in %")
        lay_rows(axes)
        legend(axes)

    return draw("kinds", paint, height=0.9 + 0.36 * len(shares))


def frontier_plot(frontier: Frontier, chosen: tuple[float, float, float | None], kind: str) -> str:
    """The mixes of a solver: share of the macs that is quantized against the ratio of the guided prediction."""

    def paint(axes: Axes) -> None:
        mixes = sorted(frontier, key=lambda mix: mix[:2])
        shares = [100 * share for share, _, _ in mixes]
        axes.plot(shares, [predicted for _, predicted, _ in mixes], color=NEUTRAL, marker=".", label="predicted")
        measured = {100 * share: value for share, _, value in mixes if value is not None}
        if measured:
            x, y = list(measured.keys()), list(measured.values())
            axes.scatter(x, y, color=KEPT, marker="D", s=26, zorder=3, label="measured")
        share, predicted, value = chosen
        height = predicted if value is None else value
        axes.scatter([100 * share], [height], color=TESTED, s=90, zorder=4, label="chosen plan")
        axes.set_xlabel(f"share of the multiplications in {kind}, in %")
        axes.set_ylabel("SQNR of the guided\nprediction in dB")
        legend(axes)

    return draw("frontier", paint, height=3.4)


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
