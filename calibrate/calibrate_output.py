"""What `latentrt calibrate` prints, and the page that it writes."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from latentrt.runtime.console import log, note, print_table, typed_command
from latentrt.runtime.precisions import CALIBRATED

from .adopt import Adopted
from .budget import METRICS, decibels
from .calibration import Calibrated
from .plan import Plan
from .planning import quantized_share
from .prediction_noise import mean_db
from .verification import Measured, Verification, value_of

NOT_ON_A_GPU = "measured with ONNX Runtime on the CPU; not run on a GPU"
# Noises of two networks add: each held its budget, both together may not.
BY_ITSELF = (
    "{component} was measured beside networks in fp32. A run in {precision} draws with it and the U-Net in "
    "{precision}: calibrate the U-Net after it, which is then verified with it"
)
_PICTURES = ("psnr", "ssim", "flip", "lpips")


def tell(bundle: Path, result: Calibrated, report: Path | None, *, as_json: bool) -> None:
    """What came of a calibration, on stdout."""
    plan, verification = result.plan, result.verification
    share = quantized_share(plan)
    quantized = sum(layer.quantized for layer in plan.layers)
    if as_json:
        content: dict[str, Any] = {
            "bundle": str(bundle),
            "component": plan.component,
            "precision": plan.precision,
            "met": result.met,
            "budgets": [
                {"budget": str(each.budget), "value": each.value, "interval": each.interval, "floor": each.floor}
                for each in result.outcomes
            ],
            "quantized_layers": quantized,
            "layers": len(plan.layers),
            "macs_share": share,
            "costs": plan.made.get("costs"),
            "figures": figures_of(verification),
            "trials": [
                {
                    "layers": len(trial.choice.chosen),
                    "predicted_db": trial.choice.predicted_db,
                    "gain": trial.choice.gain,
                    **trial.values,
                }
                for trial in result.trials
            ],
            "graphs": [result.applied.half.path, result.applied.full.path],
            "plan": str(result.applied.plan),
            "report": None if report is None else str(report),
            "backend": verification.measured[verification.tested].backend,
            "note": note_of(verification),
        }
        print(json.dumps(content))
        return
    print_table(
        f"{plan.component} against fp32, {len(verification.prompts)} held-out prompts",
        ("precision", "PSNR", "SSIM", "FLIP", "LPIPS", "SQNR, guided", "prompt accuracy"),
        _figure_rows(verification),
    )
    log(f"{plan.precision}: {quantized} of {len(plan.layers)} layers, {share:.1%} of the multiplications")
    for outcome in result.outcomes:
        log(str(outcome))
    log(f"graphs: {result.applied.half.path} for TensorRT, {result.applied.full.path} for ONNX Runtime")
    log(f"plan: {result.applied.plan}")
    if report is not None:
        log(f"report: {report}")
    if text := note_of(verification):
        note(text)


def tell_sensitivities(plan: Plan, *, as_json: bool) -> None:
    """The noise of every layer, the noisiest first."""
    layers = sorted((layer for layer in plan.layers if layer.noise is not None), key=lambda layer: -(layer.noise or 0))
    total = sum(layer.noise or 0.0 for layer in layers)
    if as_json:
        rows = [
            {"name": each.name, "kind": each.kind, "noise": each.noise, "macs": each.macs, "gain": each.gain}
            for each in layers
        ]
        print(json.dumps({"component": plan.component, "layers": rows, "noise": total}))
        return
    print_table(
        f"noise of the guided prediction, {len(layers)} layers",
        ("layer", "kind", "SQNR alone", "of all noise", "of all MACs"),
        [
            (
                each.name,
                each.kind,
                f"{decibels(1.0, each.noise or 0.0):.1f} dB",
                f"{(each.noise or 0.0) / total:.2%}",
                f"{each.macs:.2%}",
            )
            for each in layers
        ],
    )
    log(f"all together: {decibels(1.0, total):.1f} dB")


def tell_adopted(bundle: Path, adopted: Adopted, *, as_json: bool) -> None:
    """A graph that was made elsewhere and is the bundle's now."""
    artifact, placement = adopted.artifact, adopted.placement
    if as_json:
        content = {
            "bundle": str(bundle),
            "component": artifact.component,
            "precision": artifact.precision,
            "path": artifact.path,
            "parity": dict(artifact.parity),
        }
        print(json.dumps(content))
        return
    log(f"{artifact.component} {artifact.precision}: {bundle / artifact.path}")
    for text in placement.warnings:
        note(text)


def write_page(path: Path, bundle: Path, result: Calibrated) -> None:
    """The report of a calibration.

    Raises:
        ArtifactError: a picture is missing.
        OSError: the file cannot be written.
    """
    from .report import Report, write_report

    write_report(
        path,
        Report(
            title=bundle.name,
            plan=result.plan,
            verification=result.verification,
            frontier=result.frontier,
            pictures=result.folder,
            command=typed_command(),
            date=datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        ),
    )


def note_of(verification: Verification) -> str:
    """What is not known of a verification's figures; empty if nothing is."""
    notes = [] if verification.on_gpu else [NOT_ON_A_GPU]
    if verification.component != CALIBRATED[0]:
        notes.append(BY_ITSELF.format(component=verification.component, precision=verification.tested))
    return "; ".join(notes)


def figures_of(verification: Verification) -> dict[str, dict[str, float]]:
    """What was measured of each precision but the reference, by metric."""
    metrics = (*_PICTURES, "sqnr", "accuracy")
    found = {}
    for precision in list(verification.measured)[1:]:
        values = {metric: value_of(verification, precision, metric) for metric in metrics}
        found[precision] = {metric: value[0] for metric, value in values.items() if value is not None}
    return found


def _figure_rows(verification: Verification) -> list[tuple[str, ...]]:
    return [(name, *_cells(measured)) for name, measured in verification.measured.items()]


def _cells(measured: Measured) -> tuple[str, ...]:
    pictures = tuple(
        f"{measured.metrics[name].mean:.{METRICS[name].digits}f}" if name in measured.metrics else ""
        for name in _PICTURES
    )
    noise = "" if measured.noise is None else f"{mean_db(measured.noise.guided):.1f} dB"
    return (*pictures, noise, "" if measured.accuracy is None else f"{measured.accuracy:.1%}")
