"""The tables of a report: precisions and layers."""

from __future__ import annotations

from html import escape

from .budget import METRICS
from .picture_metrics import Spread
from .pictures import REFERENCE
from .plan import LayerPlan, Plan
from .prediction_noise import mean_db
from .report_html import NOTHING, table
from .report_plots import short_name
from .verification import FLOOR, Measured, Verification, value_of


def precisions_table(verification: Verification) -> str:
    """Every metric of every precision, the noise floor beside what was tested."""
    measured = verification.measured
    names = list(dict.fromkeys(name for each in measured.values() for name in each.metrics))
    head = ["precision", *(METRICS[name].title for name in names), "SQNR guided", "SQNR raw", "prompt accuracy"]
    rows = []
    for precision, each in measured.items():
        role = {REFERENCE: "reference", FLOOR: "noise floor"}.get(precision, "tested")
        cells = [f"{escape(precision)}<small>{role}</small>"]
        cells += [_spread_cell(name, each.metrics.get(name)) for name in names]
        noise = each.noise
        cells += (
            [NOTHING, NOTHING] if noise is None else [f"{mean_db(noise.guided):.1f} dB", f"{mean_db(noise.raw):.1f} dB"]
        )
        rows.append([*cells, _accuracy_cell(verification, precision, each)])
    caption = (
        "Mean over the pictures, its 95 % interval (bootstrap), what all but the worst 5 % reach, and the worst. SQNR "
        "is the mean over the timesteps. The noise floor is what half precision costs without any int8."
    )
    return table(caption, head, rows, numbers=range(1, len(head)))


def _spread_cell(name: str, spread: Spread | None) -> str:
    if spread is None:
        return NOTHING
    metric = METRICS[name]
    low, high, tail, worst = (
        f"{value:.{metric.digits}f}" for value in (spread.low, spread.high, spread.tail, spread.worst)
    )
    mean = f"{spread.mean:.{metric.digits}f} {metric.unit}".rstrip()
    return f"{mean}<small>{low} to {high}</small><small>95 %: {tail}, worst: {worst}</small>"


def _accuracy_cell(verification: Verification, precision: str, measured: Measured) -> str:
    if measured.accuracy is None:
        return NOTHING
    text = f"{measured.accuracy:.1%}"
    loss = value_of(verification, precision, "accuracy")
    if precision == REFERENCE or loss is None or loss[1] is None:
        return text
    change, low, high = (f"{0.0 - 100 * value:+.1f}" for value in (loss[0], *loss[1][::-1]))
    return f"{text}<small>{change} points</small><small>{low} to {high}</small>"


def layers_table(plan: Plan) -> str:
    """Every layer: whether it is quantized, why, and what it would cost and add."""
    head = ["layer", "kind", "precision", "multiplications", "noise", "why"]
    total = sum(layer.noise or 0.0 for layer in plan.layers) or 1.0
    rows = [_layer_row(plan, layer, total) for layer in plan.layers]
    caption = "In the graph's order. Noise is the share of what all layers would add."
    return table(caption, head, rows, numbers=(3, 4))


def _layer_row(plan: Plan, layer: LayerPlan, total: float) -> list[str]:
    noise = NOTHING if layer.noise is None else f"{layer.noise / total:.2%}"
    precision = plan.precision if layer.quantized else "kept"
    name, reason = escape(short_name(layer.name)), escape(layer.reason)
    return [name, escape(layer.kind), precision, f"{layer.macs:.2%}", noise, reason]
