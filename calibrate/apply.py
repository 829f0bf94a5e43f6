"""Apply a plan to a bundle: both quantized graphs, proven by running, and the plan itself, put in together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.export.export_plan import graph_path
from latentrt.export.ort_targets import target_path
from latentrt.export.staging import staging_folder
from latentrt.export.tool_versions import tool_versions
from latentrt.runtime.errors import CalibrationError, UsageError
from latentrt.runtime.lora_weights import lora_notes
from latentrt.runtime.manifest import Artifact, Manifest, changed_inputs, key_of, load_manifest, problem_of

from .plan import Plan
from .plan_checks import check_plan
from .plan_file import arrays_path, plan_key, save_plan
from .quantized_artifacts import put_in
from .quantized_graphs import Feeds, write_graphs
from .source import PRECISION, Source

# Raised whenever the same plan would give other graphs than before.
REVISION = 1
# ONNX Runtime's graph; the plain one is TensorRT's.
CPU = "cpu"
_TOOLS = ("onnx-ir", "numpy")
# Of a plan's file, and of what else than weights lies in a graph, at most.
_SPARE_BYTES = 20e6


@dataclass(frozen=True)
class Applied:
    """The graphs of a plan in a bundle.

    Attributes:
        half: float16-typed, for TensorRT.
        full: float32-typed, for ONNX Runtime.
        plan: its file in the bundle.
        reason: why they were made: "new", "forced", a file that was damaged or edited, or the inputs that changed;
            empty if they are up to date and were not.
    """

    half: Artifact
    full: Artifact
    plan: Path
    reason: str


def plan_path(component: str, precision: str) -> str:
    """Where a bundle keeps a plan: `unet/int8.plan.json`."""
    return f"{component}/{precision}.plan.json"


def apply_plan(
    source: Source,
    plan: Plan,
    *,
    cases: Mapping[str, Feeds] | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda message: None,
) -> Applied:
    """Write a plan's two graphs into the bundle of its network, where they are not up to date.

    Both are run before any file of the bundle changes. Weights are read and written one at a time.

    Args:
        source: the network, with the LoRAs that the plan is for.
        plan: checked here against the graph; it may have been edited.
        cases: inputs to run the graphs on, such as captured calls, by a name for the record; noise by default.
        force: make again what is up to date.
        report: called with a line on what begins.

    Raises:
        CalibrationError: the plan is for another graph, quantizes nothing, or float16 does not hold the result.
        UsageError: the disk is too small.
        ArtifactError: the bundle is damaged, or was exported anew meanwhile.
    """
    path = source.bundle.path
    check_plan(plan, source.layers, source.files, lora_notes(source.loras))
    if plan.component != source.component:
        raise CalibrationError(f"plan: expected one for {source.component}, got one for {plan.component}.")
    if not plan.quants():
        raise CalibrationError(
            f"{plan.component}: expected a plan with quantized layers, got none. Ask for less quality, or keep the "
            "network in fp16."
        )
    manifest = load_manifest(path)
    keep = kept_tensors(manifest, plan.component)
    inputs = {target: _inputs(source, plan, keep, target) for target in (CPU, "")}
    reason = "forced" if force else _reason(path, manifest, plan, inputs)
    if reason:
        _check_disk(path, source)
        report(f"{plan.component}: {plan.precision}")
        with staging_folder(path) as folder:
            artifacts = _make(source, plan, keep, inputs, folder, cases)
            files = save_plan(plan, folder / plan_path(plan.component, plan.precision))
            report("moving the graphs into place")
            put_in(path, folder, artifacts, [file.relative_to(folder).as_posix() for file in files])
        manifest = load_manifest(path)
    half, full = (manifest.artifact(plan.component, plan.precision, target) for target in ("", CPU))
    if half is None or full is None:
        raise CalibrationError(f"{path}: another process changed {plan.component} meanwhile. Run the command again.")
    return Applied(half, full, path / plan_path(plan.component, plan.precision), reason)


def kept_tensors(manifest: Manifest, component: str) -> tuple[str, ...]:
    """The tensors that the export found to be too large for float16; none where the bundle has a plain fp16 graph."""
    mixed = manifest.artifact(component, "mixed")
    if mixed is None or manifest.artifact(component, "fp16") is not None:
        return ()
    return tuple(mixed.parity.get("kept", ()))


def _inputs(source: Source, plan: Plan, keep: tuple[str, ...], target: str) -> dict[str, Any]:
    """What a graph is made from, for its key."""
    return {
        "component": plan.component,
        "precision": plan.precision,
        "target": target,
        "made_from": dict(source.files),
        "plan": plan_key(plan),
        "loras": lora_notes(source.loras),
        "float32": [] if target else list(keep),
        "tools": {**tool_versions(_TOOLS), "revision": str(REVISION)},
    }


def _reason(bundle: Path, manifest: Manifest, plan: Plan, inputs: Mapping[str, Mapping[str, Any]]) -> str:
    path = Path(plan_path(plan.component, plan.precision))
    others = [path.as_posix(), arrays_path(path).as_posix()]
    for target, wanted in inputs.items():
        held = manifest.artifact(plan.component, plan.precision, target)
        if held is None:
            return "new"
        if held.key != key_of(wanted):
            return "changed: " + ", ".join(changed_inputs(held.inputs, wanted))
        problems = (problem_of(bundle, manifest, name) for name in (*held.files, *others))
        if problem := next(filter(None, problems), None):
            return problem
    return ""


def _check_disk(bundle: Path, source: Source) -> None:
    """Refuse to start what cannot end: at most, both graphs hold every weight as it was, in four bytes and in two."""
    held = sum((bundle / name).stat().st_size for name in source.files)
    needed, free = 1.5 * held + _SPARE_BYTES, shutil.disk_usage(bundle).free
    if not needed <= free:
        raise UsageError(
            f"{bundle}: expected {needed / 1e9:.1f} GB of free disk for the quantized graphs, got {free / 1e9:.1f} GB. "
            "Free some."
        )


def _make(
    source: Source,
    plan: Plan,
    keep: tuple[str, ...],
    inputs: Mapping[str, Mapping[str, Any]],
    folder: Path,
    cases: Mapping[str, Feeds] | None,
) -> list[Artifact]:
    plain = graph_path(plan.component, PRECISION)
    names = {CPU: target_path(plain, plan.precision, CPU), "": graph_path(plan.component, plan.precision)}
    written = write_graphs(source, plan, [folder / name for name in names.values()], cases=cases, keep=keep)
    base = load_manifest(source.bundle.path).artifact(plan.component, PRECISION)
    assert base is not None
    return [
        Artifact(
            component=plan.component,
            precision=plan.precision,
            path=names[target],
            files=tuple(file.relative_to(folder).as_posix() for file in graph.files),
            opset=base.opset,
            key=key_of(inputs[target]),
            inputs=inputs[target],
            parity=graph.parity,
            parameters=base.parameters,
            target=target,
        )
        for target, graph in zip(names, written, strict=True)
    ]
