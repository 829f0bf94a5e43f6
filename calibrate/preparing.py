"""The stages before a choice is made: calls are captured, statistics taken, and all layers planned with their noise.

Each is kept by the content it was made from, so that an interrupted run goes on where it stopped, and one with other
options begins at the first stage that they change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentrt.export.networks import weights_at_hand
from latentrt.export.tool_versions import tool_versions
from latentrt.runtime.manifest import sha256_of
from latentrt.runtime.model_facts import read_schedules
from latentrt.runtime.precisions import CALIBRATED

from .calibration_options import CalibrateOptions, Part, captured_by, counts_for
from .capture import capture, capture_inputs
from .capture_file import Capture, open_capture
from .layer_costs import Costs, layer_costs
from .layers import Layer
from .plan import Plan
from .plan_file import load_plan, save_plan
from .planning import full_plan, with_noises
from .prompts import PromptSplit, load_prompts, split_prompts
from .requirements import check_memory, check_options, check_source
from .source import Source, open_source
from .stages import Stage, run_stage, stage_of
from .statistics import Statistics, collect, estimated_bytes
from .statistics_file import load_statistics, save_statistics

Say = Callable[[str], None]
Progress = Callable[[str, float], None]

_STATISTICS, _PLAN = "statistics.safetensors", "plan.json"
_TOOLS = ("torch", "diffusers", "numpy", "latentrt")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A network whose layers are all planned.

    Attributes:
        source: the network.
        options: of the calibration.
        split: the prompts.
        layers: of the graph, with costs for the size that is drawn.
        calibration: captured calls, that statistics were taken of.
        search: captured calls of other prompts, that noise is measured with.
        plan: that quantizes all that can be, with noises.
        stage: that keeps the plan.
    """

    source: Source
    options: CalibrateOptions
    split: PromptSplit
    layers: tuple[Layer, ...]
    calibration: Capture
    search: Capture
    plan: Plan
    stage: Stage


def prepare(
    bundle: Path,
    options: CalibrateOptions,
    *,
    say: Say = lambda _text: None,
    on_progress: Progress = lambda _text, _share: None,
) -> Prepared:
    """Capture, take statistics, and plan all layers with the noise of each.

    Raises:
        UsageError: an option cannot be taken, the bundle lacks a graph, or memory or disk are too small.
        ArtifactError: a file is missing or damaged.
        CalibrationError: numbers are not finite, or the graph is not that of its network.
        BackendError: a network failed, or PyTorch does not have the device.
    """
    check_options(options)
    source = open_source(bundle, component=options.component, loras=options.loras)
    split = prompts_for(options)
    check_source(source, options, split)
    layers = source.layers_at(width=options.settings.get("width"), height=options.settings.get("height"))
    costs = layer_costs(layers, options.times, precision=options.numbers.precision)
    captured = captured_part(source, options, split, "calibration", say=say, on_progress=on_progress)
    for text in captured.notes:
        say(text)
    statistics: Statistics | None = None
    key: str | None = None
    if options.numbers.needs_statistics:
        statistics, key = _statistics(source, options, layers, captured, say, on_progress)
    others = captured_part(source, options, split, "search", say=say, on_progress=on_progress)
    plan, stage = _plan(source, options, layers, costs, captured, others, statistics, key, say, on_progress)
    return Prepared(source, options, split, layers, captured, others, plan, stage)


def prompts_for(options: CalibrateOptions) -> PromptSplit:
    """The prompts of a calibration's parts.

    Raises:
        UsageError: there are too few, or the file cannot be read.
    """
    prompts = load_prompts(options.prompts)
    return split_prompts(prompts, options.seed, counts_for(len(prompts), options.counts))


def captured_part(
    source: Source, options: CalibrateOptions, split: PromptSplit, part: Part, *, say: Say, on_progress: Progress
) -> Capture:
    """The captured calls of a part.

    Raises: as `capture.capture`.
    """
    wanted = captured_by(options, split, part)
    inputs = capture_inputs(source, wanted, backend=options.backend)
    stage = stage_of(source.bundle.path, source.component, "capture", inputs)
    return run_stage(
        dataclasses.replace(stage, name=f"capture for {part}"),
        lambda folder: capture(source, wanted, folder, backend=options.backend, on_progress=on_progress),
        lambda folder: open_capture(folder, inputs),
        say=say,
    )


@contextmanager
def network_on(source: Source, device: str) -> Iterator[torch.nn.Module]:
    """The network with all of its weights on a device.

    Raises:
        UsageError: the memory is too small for the weights.
        ArtifactError: a weight cannot be read.
    """
    needed = 4 * sum(int(torch.Size(weight.shape).numel()) for weight in source.network.weights.values())
    check_memory(source, needed, "its weights in float32")
    with weights_at_hand(source.network, resident=True):
        yield source.wrapper.to(device)


def _statistics(
    source: Source,
    options: CalibrateOptions,
    layers: tuple[Layer, ...],
    captured: Capture,
    say: Say,
    progress: Progress,
) -> tuple[Statistics, str]:
    steps = len(read_schedules(source.bundle).own.betas)
    # What is told no timestep has but one.
    bins = options.bins if source.component == CALIBRATED[0] else 1
    wanted = {"bins": bins, "capacity": options.rows, "steps": steps, "seed": options.seed}
    stage = stage_of(
        source.bundle.path,
        source.component,
        "statistics",
        {"capture": captured.key, "options": wanted, "device": options.device, "tools": tool_versions(_TOOLS)},
    )

    def make(folder: Path) -> Statistics:
        needed = estimated_bytes(layers, bins=bins, capacity=options.rows)
        check_memory(source, needed, "the statistics")
        on_cpu = options.device == "cpu"
        with weights_at_hand(source.network, resident=not on_cpu), captured.consumed() as calls:
            wrapper = source.wrapper if on_cpu else source.wrapper.to(options.device)
            watched = _told(calls, captured.count, "statistics", progress)
            found = collect(wrapper, layers, watched, **wanted, device=options.device)
        save_statistics(found, folder / _STATISTICS)
        return found

    return run_stage(stage, make, lambda folder: load_statistics(folder / _STATISTICS), say=say), stage.key


def _plan(
    source: Source,
    options: CalibrateOptions,
    layers: tuple[Layer, ...],
    costs: Costs,
    captured: Capture,
    others: Capture,
    statistics: Statistics | None,
    statistics_key: str | None,
    say: Say,
    progress: Progress,
) -> tuple[Plan, Stage]:
    numbers = dataclasses.asdict(options.numbers)
    made: dict[str, Any] = {
        "capture": captured.key,
        "statistics": statistics_key,
        "options": numbers,
        "costs": costs.basis if options.times is None else sha256_of(options.times),
        "noise": others.key,
        "macs": [layer.macs for layer in layers],
        "device": options.device,
        "tools": tool_versions((*_TOOLS, "scipy")),
    }
    stage = stage_of(source.bundle.path, source.component, "plan", made)

    def make(folder: Path) -> Plan:
        record = {
            "options": numbers,
            "costs": costs.basis,
            # In one order, whether it was captured now or read again.
            "capture": dict(sorted(captured.inputs["options"].items())),
            "statistics": statistics
            and {"bins": statistics.bins, "rows": statistics.rows, "capacity": statistics.capacity},
        }
        progress("planning: smoothing and scales", 0.0)
        plan = full_plan(source, layers, statistics, costs, options.numbers, made=record)
        # Of prompts that no range was taken from: on those that were, nothing is clipped.
        with network_on(source, options.device) as network, others.consumed() as calls:
            watched = _told(calls, others.count, "planning: sensitivities", progress)
            plan = with_noises(plan, network, watched, options.numbers, device=options.device)
        save_plan(plan, folder / _PLAN)
        return plan

    return run_stage(stage, make, lambda folder: load_plan(folder / _PLAN), say=say), stage


def _told(calls: Iterator[Any], count: int, what: str, progress: Progress) -> Iterator[Any]:
    """Calls, with the progress of their consumer."""
    for index, call in enumerate(calls):
        progress(f"{what}: call {index + 1} of {count}", index / count)
        yield call
