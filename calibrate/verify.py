"""Verify a quantized network: draw held-out prompts in every precision, and measure how far pictures have moved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from latentrt.export.tool_versions import TOOLS, tool_versions
from latentrt.runtime.components import Components
from latentrt.runtime.machine import core_count, cpu_features, platform_tag
from latentrt.runtime.manifest import key_of, sha256_of

from .budget import Budget, check_measurable
from .calls import Call
from .judge import load_judge, verdicts
from .picture_metrics import BUILT_IN, Doubles, PictureMetric, spread
from .pictures import REFERENCE, Drawing, Progress, draw, read_keyed, read_pictures, write_keyed
from .prediction_noise import PredictionNoise, prediction_noise
from .verification import FLOOR, Measured, Verification, measured_of

_FIGURES = "measured.json"
_METRIC_TOOLS = ("latentrt", "flip-evaluator", "scipy", "torch")


def verify_plan(
    drawing: Drawing,
    folder: Path,
    *,
    budgets: Sequence[Budget],
    plan: str,
    component: str = "unet",
    tested: str = "int8",
    judge: str | None = None,
    lpips: Path | None = None,
    calls: Iterable[Call] = (),
    calls_key: str | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> Verification:
    """Draw and measure fp32, fp16 and the tested precision.

    What is done already is taken from the folder: pictures one by one, figures by precision. Of each precision the
    latest pictures are kept; those of an earlier plan are removed.

    Args:
        drawing: what to draw.
        folder: for pictures and figures, a folder for each precision; made if it is missing.
        budgets: to hold; the other metrics are measured as well.
        plan: key of the plan, for the record.
        component: that is quantized.
        tested: precision of the quantized network.
        judge: `FILE.py:function`, as `judge.load_judge` takes it.
        lpips: a file as `lpips.open_lpips` takes it.
        calls: held-out calls of the component, for the noise of its predictions; taken once at most.
        calls_key: their content key; None if there are none.
        on_progress: told what is being done, how much of it is, and of how much; of 0 where that is not known.

    Raises:
        UsageError: a budget cannot be measured, the bundle lacks a precision, or a setting does not fit it.
        ArtifactError: a file is missing, damaged or changed.
        BackendError: a network failed, or a picture is not finite or black.
        CalibrationError: a prediction is NaN or infinite, or the judge failed.
    """
    check_measurable(budgets, judge=judge is not None, lpips=lpips is not None, calls=calls_key is not None)
    metrics, means = dict(BUILT_IN), _means(judge, lpips, calls_key, component)
    if lpips is not None:
        from .lpips import open_lpips

        metrics["lpips"] = open_lpips(lpips)
    shows = load_judge(judge) if judge is not None else None
    precisions = tuple(dict.fromkeys((REFERENCE, FLOOR, tested)))
    drawn = {
        precision: draw(drawing, precision, folder / precision, on_progress=on_progress) for precision in precisions
    }
    keys = {
        precision: key_of({**means, "pictures": [drawing.key(REFERENCE), drawing.key(precision)]})
        for precision in precisions
    }
    figures = {precision: read_keyed(folder / precision / _FIGURES, keys[precision]) for precision in precisions}
    missing = [precision for precision in precisions if figures[precision] is None]
    moved = [precision for precision in missing if precision != REFERENCE]
    noise = _noise(drawing, component, moved, calls, on_progress) if moved and calls_key is not None else {}
    count = len(drawing.prompts)
    for precision in missing:
        values = _distances(folder, precision, count, metrics, on_progress) if precision in moved else {}
        pictures = read_pictures(folder / precision, count)
        found = Measured(
            precisions=drawn[precision].precisions,
            backend=drawn[precision].backend,
            pictures=precision,
            metrics={name: spread(name, each) for name, each in values.items()},
            verdicts=verdicts(shows, drawing.prompts, pictures) if shows is not None else None,
            noise=noise.get(precision),
        )
        figures[precision] = asdict(found)
        write_keyed(folder / precision / _FIGURES, keys[precision], figures[precision])
    return Verification(
        component=component,
        plan=plan,
        tested=tested,
        prompts=drawing.prompts,
        seed=drawing.seed,
        settings=dict(drawing.settings),
        loras=drawing.lora_notes,
        judge=judge,
        budgets=tuple(budgets),
        measured={precision: measured_of(figures[precision]) for precision in precisions},
        machine=_machine(),
    )


def _means(judge: str | None, lpips: Path | None, calls_key: str | None, component: str) -> dict[str, Any]:
    """What decides about figures besides the pictures."""
    return {
        "judge": None if judge is None else [judge, sha256_of(Path(judge.rpartition(":")[0]))],
        "lpips": None if lpips is None else sha256_of(lpips),
        "calls": calls_key,
        "component": component,
        "tools": tool_versions(_METRIC_TOOLS),
    }


def _distances(
    folder: Path, precision: str, count: int, metrics: Mapping[str, PictureMetric], on_progress: Progress
) -> dict[str, Doubles]:
    """Each metric of each picture against the reference's, (count,)."""
    values: dict[str, list[float]] = {name: [] for name in metrics}
    pairs = zip(read_pictures(folder / REFERENCE, count), read_pictures(folder / precision, count), strict=True)
    for index, (wanted, got) in enumerate(pairs):
        on_progress(f"compare {precision}", index, count)
        for name, metric in metrics.items():
            values[name].append(float(metric(wanted[None], got[None])[0]))
    on_progress(f"compare {precision}", count, count)
    return {name: np.array(each) for name, each in values.items()}


def _noise(
    drawing: Drawing, component: str, precisions: Sequence[str], calls: Iterable[Call], on_progress: Progress
) -> dict[str, PredictionNoise]:
    """The noise of the component's predictions in each precision, from one pass over the calls."""

    def counted() -> Iterator[Call]:
        for index, call in enumerate(calls):
            on_progress("predict", index, 0)
            yield call

    with contextlib.ExitStack() as stack:
        sessions = {}
        for name in (REFERENCE, *precisions):
            if drawing.component == component:
                sessions[name] = drawing.session(component, name)
                stack.callback(sessions[name].close)
                continue
            components = Components.open(
                drawing.bundle, name, backend=drawing.backend, verify=True, loras=drawing.loras
            )
            stack.callback(components.close)
            sessions[name] = components[component]
        return prediction_noise(counted(), sessions[REFERENCE], {name: sessions[name] for name in precisions})


def _machine() -> dict[str, Any]:
    """What decides about figures and times on this machine, for the record."""
    try:
        features: tuple[str, ...] = cpu_features()
    except OSError:
        features = ()
    return {
        "platform": platform_tag(),
        "cores": core_count(),
        "features": list(features),
        "tools": tool_versions((*TOOLS, "flip-evaluator", "scipy")),
    }
