"""What `bench_int8.py` measures beside its table: predictions of noise, engines, and a run that was killed."""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from latentrt.calibrate.calibration_options import CalibrateOptions
from latentrt.calibrate.calls import Call
from latentrt.calibrate.plan import Plan
from latentrt.calibrate.plan_file import plan_key
from latentrt.calibrate.planning import plan_items, selected
from latentrt.calibrate.prediction_noise import mean_db, share_db
from latentrt.calibrate.preparing import Prepared, network_on, prepare
from latentrt.calibrate.sensitivity import measured, one_at_a_time, sensitivities
from latentrt.calibrate.solver import solve
from latentrt.calibrate.source import Source
from latentrt.export.build_options import BuildOptions
from latentrt.export.engine_jobs import build_engines

# Calls that a run has captured when it is killed.
_CAPTURED = 3
_STEP_DB = 3


def frontier(prepared: Prepared, calls: Iterable[Call], *, points: int = 10) -> dict[str, Any]:
    """Predicted and measured noise of the solver's plans, from all layers down in steps of 3 dB.

    Args:
        calls: that nothing was calibrated with.
    """
    items = plan_items(prepared.plan, prepared.layers)
    everything = solve(items, math.inf)
    choices = [solve(items, everything.noise * 10 ** (-_STEP_DB * step / 10)) for step in range(points)]
    plans = {str(index): selected(prepared.plan, choice.chosen).quants() for index, choice in enumerate(choices)}
    with network_on(prepared.source, "cpu") as network:
        found = measured(network, plans, calls)
    mixes = [
        {
            "layers": len(choice.chosen),
            "macs_int8": choice.gain,
            "predicted_db": choice.predicted_db,
            "measured_db": share_db(found.together([name])),
        }
        for name, choice in zip(plans, choices, strict=True)
    ]
    deviations = [mix["measured_db"] - mix["predicted_db"] for mix in mixes]
    return {"plans": mixes, "largest_deviation_db": max(deviations, key=abs)}


def numbers(source: Source, plans: Mapping[str, Plan], calls: Iterable[Call]) -> dict[str, Any]:
    """The noise of plans that quantize the same layers by other numbers, in simulation.

    Args:
        source: of the plans.
        plans: by name.
        calls: that nothing was calibrated with.
    """
    with network_on(source, "cpu") as network:
        found = measured(network, {name: plan.quants() for name, plan in plans.items()}, calls)
    steps = {name: found.together([name]) for name in plans}
    return {name: {"mean_db": mean_db(each), "share_db": share_db(each)} for name, each in steps.items()}


def split_alone(smoothed: Plan, plain: Plan) -> Plan:
    """A plan that smooths the inputs of conv_shortcut alone, whose two branches then have scales of their own.

    Args:
        smoothed: and `plain`: plans of the same layers.
    """
    chosen = {layer.name: layer for layer in smoothed.layers if layer.kind == "conv_shortcut"}
    groups = {layer.group for layer in chosen.values()}
    return dataclasses.replace(
        plain,
        layers=tuple(chosen.get(layer.name, layer) for layer in plain.layers),
        vectors={group: vector for group, vector in smoothed.vectors.items() if group in groups},
    )


def sensitivity(prepared: Prepared, calls: Sequence[Call], *, count: int = 40) -> dict[str, Any]:
    """The noise of layers spread over the network, estimated by one pass and measured one at a time."""
    held = prepared.plan.quants()
    names = [list(held)[index] for index in np.linspace(0, len(held) - 1, count).round().astype(int)]
    shares, seconds = [], []
    with network_on(prepared.source, "cpu") as network:
        for method in (sensitivities, one_at_a_time):
            started = time.process_time()
            shares.append(method(network, {name: held[name] for name in names}, calls).shares())
            seconds.append(round(time.process_time() - started, 1))
    estimated, exact = (np.array([each[name] for name in names]) for each in shares)
    errors = 10 * np.log10(estimated / exact)
    return {
        "layers": len(names),
        "calls": len(calls),
        "spearman": float(spearmanr(estimated, exact).statistic),
        "bias_db": float(errors.mean()),
        "deviation_db": float(errors.std()),
        "largest_error_db": float(errors[np.abs(errors).argmax()]),
        "error_of_the_sum_db": float(10 * np.log10(estimated.sum() / exact.sum())),
        "cpu_seconds": {"one pass": seconds[0], "one at a time": seconds[1]},
    }


def engine(bundle: Path, precision: str, target: str) -> dict[str, Any]:
    """An engine of the U-Net, built ahead of time by TensorRT-RTX."""
    options = BuildOptions(
        target=target,
        precision=precision,
        components=("unet",),
        flavour="tensorrt_rtx",
        cache="off",
        force=True,
    )
    (result,) = build_engines(bundle, options)
    sidecar = result.sidecar
    total = sum(sidecar.flops.values())
    return {
        "build_seconds": sidecar.build_seconds,
        "engine_bytes": sidecar.engine_bytes,
        "weight_bytes": sidecar.weight_bytes,
        "flops": {kind: round(count / total, 4) for kind, count in sidecar.flops.items()},
    }


def killed(original: Path, folder: Path, options: CalibrateOptions, command: Sequence[str]) -> dict[str, Any]:
    """Plan in two copies of a bundle; in one of them, the first run is killed while it captures.

    Args:
        original: the bundle.
        folder: for the copies; made anew.
        options: of the calibration.
        command: that prepares the bundle whose path is added to it, with the same options.
    """
    shutil.rmtree(folder, ignore_errors=True)
    whole, broken = folder / "whole.bundle", folder / "broken.bundle"
    for copy in (whole, broken):
        shutil.copytree(original, copy)
    child = subprocess.Popen([*command, str(broken)])
    captured = f"calibration/{options.component}/capture-*/*.safetensors"
    while child.poll() is None and len(list(broken.glob(captured))) < _CAPTURED:
        time.sleep(0.1)
    child.kill()
    child.wait()
    held = len(list(broken.glob(captured)))
    said: list[str] = []
    keys = [plan_key(prepare(copy, options, say=said.append).plan) for copy in (broken, whole)]
    started = time.monotonic()
    prepare(broken, options)
    return {
        "prompts_captured_when_killed": held,
        "then_said": said[0],
        "plans": keys,
        "same_plan": keys[0] == keys[1],
        "seconds_with_all_stages_kept": round(time.monotonic() - started, 2),
    }
