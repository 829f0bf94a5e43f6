"""Checkpoint to bundle: export, convert, compare with PyTorch, and only then move into place."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from latentrt.runtime.bundle import COMPONENTS
from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.manifest import (
    MANIFEST,
    Artifact,
    FileRecord,
    Manifest,
    changed_inputs,
    check_files,
    key_of,
    load_manifest,
    record_of,
)

from .checkpoint import Checkpoint, load_pipeline, open_checkpoint
from .opset import checked_opset
from .staging import check_bundle_path, commit, staging_folder

PRECISIONS = ("fp32", "fp16")
# Raised whenever the same checkpoint and tools would give other graphs than before.
GRAPH_REVISION = 1
_GRAPH_TOOLS = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript")
_TOOLS = (*_GRAPH_TOOLS, "latentrt", "onnxruntime", "numpy")
_FOLDER = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae", "vae_encoder": "vae"}

Report = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """One line of an export's summary.

    Attributes:
        status: "exported" or "up to date".
        reason: why it was exported: "new", "forced", a damaged file, or the inputs that changed.
        size: bytes of its files.
        seconds: spent on exporting and comparing.
    """

    artifact: Artifact
    status: str
    reason: str
    size: int
    nodes: int
    seconds: float


@dataclass(frozen=True)
class _Planned:
    component: str
    precision: str
    inputs: Mapping[str, Any]
    key: str
    reason: str | None

    @property
    def path(self) -> str:
        return graph_path(self.component, self.precision)


def graph_path(component: str, precision: str) -> str:
    """Where a bundle keeps a graph: optimum's name for fp32, the precision before the suffix for others."""
    return f"{component}/model.onnx" if precision == "fp32" else f"{component}/model.{precision}.onnx"


def tool_versions(names: Sequence[str] = _TOOLS) -> dict[str, str]:
    """Installed versions by distribution; those that are not installed are left out."""
    return {name: found for name in names if (found := _installed(name)) is not None}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def export_checkpoint(
    path: Path,
    bundle: Path,
    *,
    precisions: Sequence[str] = PRECISIONS,
    opset: int | None = None,
    force: bool = False,
    report: Report = lambda message: None,
) -> list[Exported]:
    """Export a diffusers checkpoint into a bundle.

    Every graph is compared with PyTorch, in ONNX Runtime, on inputs of a real sampling run, before any file of the
    bundle changes. Graphs whose weights, configs, options and tools are those of the manifest are kept.

    Args:
        path: the checkpoint.
        bundle: the folder to make or to add to.
        precisions: of fp32 and fp16.
        opset: of the default ONNX domain; None for the one both backends like best.
        force: export again what is up to date.
        report: called with a line on what begins.

    Returns:
        A line for every component and precision asked for.

    Raises:
        UsageError: unknown precision or opset, or a bundle path that is something else.
        ArtifactError, ConfigError: the checkpoint is damaged or not supported.
        ExportError: a component cannot be exported or does not match its model; the bundle is as it was.
    """
    for precision in precisions or [""]:
        if precision not in PRECISIONS:
            raise UsageError(
                f"precision: expected one or more of {', '.join(PRECISIONS)}, got {precision!r}. "
                "int8 is made from an exported bundle by: latentrt calibrate"
            )
    precisions = [precision for precision in PRECISIONS if precision in precisions]
    checkpoint = open_checkpoint(path)
    if bundle.resolve() == path.resolve() or path.resolve() in bundle.resolve().parents:
        raise UsageError(f"{bundle}: expected a folder outside the checkpoint. Choose another path with -o.")
    check_bundle_path(bundle)
    options = {"opset": checked_opset(opset)}
    report(f"reading {path.name}")
    manifest = load_manifest(bundle) if (bundle / MANIFEST).exists() else None
    planned = _plan(checkpoint, bundle, manifest, precisions, options, force=force)
    with staging_folder(bundle) as folder:
        built: dict[tuple[str, str], tuple[Artifact, float]] = {}
        if any(plan.reason for plan in planned):
            built = _build(checkpoint, bundle, manifest, planned, options, folder, report)
        report("moving the graphs into place")
        final = _commit(checkpoint, bundle, folder, [artifact for artifact, _ in built.values()], options)
    return [_line(bundle, final, plan, built.get((plan.component, plan.precision))) for plan in planned]


def _plan(
    checkpoint: Checkpoint,
    bundle: Path,
    manifest: Manifest | None,
    precisions: Sequence[str],
    options: Mapping[str, Any],
    *,
    force: bool,
) -> list[_Planned]:
    hashes = {folder: checkpoint.hashes(folder) for folder in set(_FOLDER.values())}
    tools = {**tool_versions(_GRAPH_TOOLS), "graph_revision": str(GRAPH_REVISION)}
    planned = []
    for component in COMPONENTS:
        for precision in precisions:
            inputs = {
                "component": component,
                "precision": precision,
                "source": hashes[_FOLDER[component]],
                "options": dict(options),
                "tools": tools,
            }
            key = key_of(inputs)
            old = manifest.artifact(component, precision) if manifest else None
            reason = "forced" if force and old else _reason(bundle, manifest, old, inputs, key)
            planned.append(_Planned(component, precision, inputs, key, reason))
    return planned


def _reason(
    bundle: Path, manifest: Manifest | None, old: Artifact | None, inputs: Mapping[str, Any], key: str
) -> str | None:
    """Why a graph has to be exported, or None if the bundle's is what exporting would give."""
    if manifest is None or old is None:
        return "new"
    if old.key != key:
        return "changed: " + ", ".join(changed_inputs(old.inputs, inputs))
    try:
        check_files(bundle, manifest, old.files)
    except ArtifactError as err:
        return str(err)
    return None


def _build(
    checkpoint: Checkpoint,
    bundle: Path,
    manifest: Manifest | None,
    planned: Sequence[_Planned],
    options: Mapping[str, Any],
    folder: Path,
    report: Report,
) -> dict[tuple[str, str], tuple[Artifact, float]]:
    # Here and not above: torch and diffusers take seconds to import.
    from .graph_builder import build_fp16, build_fp32, components_of
    from .real_inputs import capture_cases

    report("loading the weights")
    pipeline = load_pipeline(checkpoint)
    report("sampling with PyTorch for real inputs")
    cases = capture_cases(pipeline)
    components = components_of(pipeline)
    built: dict[tuple[str, str], tuple[Artifact, float]] = {}
    for name in COMPONENTS:
        plans = {plan.precision: plan for plan in planned if plan.component == name and plan.reason}
        if not plans:
            continue
        graph = folder / graph_path(name, "fp32")
        old = manifest.artifact(name, "fp32") if manifest else None
        fp32 = next((plan for plan in planned if (plan.component, plan.precision) == (name, "fp32")), None)
        if fp32 is not None and fp32.reason is None and old is not None:
            _borrow(bundle, folder, old)
        else:
            report(f"{name}: exporting")
            started = time.perf_counter()
            parity = build_fp32(components[name], graph, cases[name], opset=options["opset"])
            if "fp32" in plans:
                artifact = _artifact(plans["fp32"], folder, parity, options, components[name].parameters)
                built[name, "fp32"] = artifact, time.perf_counter() - started
        if "fp16" in plans:
            report(f"{name}: converting to fp16")
            started = time.perf_counter()
            parity = build_fp16(name, graph, folder / graph_path(name, "fp16"), cases[name])
            artifact = _artifact(plans["fp16"], folder, parity, options, components[name].parameters)
            built[name, "fp16"] = artifact, time.perf_counter() - started
    return built


def _borrow(bundle: Path, folder: Path, artifact: Artifact) -> None:
    """Put the bundle's own fp32 graph where the fp16 conversion looks for it."""
    for name in artifact.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(bundle / name, folder / name)
        except OSError:
            shutil.copyfile(bundle / name, folder / name)


def _artifact(
    plan: _Planned, folder: Path, parity: Mapping[str, Any], options: Mapping[str, Any], parameters: int
) -> Artifact:
    files = [plan.path, *([f"{plan.path}_data"] if (folder / f"{plan.path}_data").exists() else [])]
    return Artifact(
        component=plan.component,
        precision=plan.precision,
        path=plan.path,
        files=tuple(files),
        opset=options["opset"],
        key=plan.key,
        inputs=plan.inputs,
        parity=parity,
        parameters=parameters,
    )


def _commit(
    checkpoint: Checkpoint, bundle: Path, folder: Path, artifacts: Sequence[Artifact], options: Mapping[str, Any]
) -> Manifest:
    staged: dict[str, tuple[Path, FileRecord]] = {}
    for artifact in artifacts:
        for name in artifact.files:
            staged[name] = folder / name, record_of(folder / name)
    for name, source in checkpoint.copied_files().items():
        copy = folder / "copied" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        staged[name] = copy, record_of(copy)
    sources = {component: checkpoint.hashes(folder_name) for component, folder_name in _FOLDER.items()}

    def change(before: Manifest | None) -> Manifest:
        replaced = {(a.component, a.precision) for a in artifacts}
        kept = [
            a
            for a in (before.artifacts if before else ())
            # Another precision of other weights: one bundle is one checkpoint.
            if (a.component, a.precision) not in replaced and a.inputs.get("source") in (None, sources[a.component])
        ]
        held = {(a.component, a.precision) for a in kept}
        same = {
            (a.component, a.precision)
            for a in artifacts
            if before and all(before.files.get(name) == staged[name][1] for name in a.files)
        }
        engines = tuple(e for e in (before.engines if before else ()) if (e.component, e.precision) in held | same)
        owned = {name for a in (before.artifacts if before else ()) for name in a.files}
        owned |= {name for e in (before.engines if before else ()) for name in (e.path, e.sidecar)}
        wanted = {name for a in (*kept, *artifacts) for name in a.files}
        wanted |= {name for e in engines for name in (e.path, e.sidecar)}
        files = {
            name: record
            for name, record in (before.files if before else {}).items()
            if name in wanted or (name not in owned and name.split("/")[0] not in ("tokenizer", "scheduler"))
        }
        base = before or Manifest(name="", pipeline_class="", latentrt_version="")
        return dataclasses.replace(
            base,
            name=checkpoint.path.resolve().name,
            pipeline_class=checkpoint.pipeline_class,
            latentrt_version=version("latentrt"),
            source={name: digest for hashes in sources.values() for name, digest in hashes.items()},
            tools=tool_versions(),
            options=dict(options),
            files=files,
            artifacts=tuple(sorted([*kept, *artifacts], key=_order)),
            engines=engines,
        )

    return commit(bundle, staged, change)


def _order(artifact: Artifact) -> tuple[int, str]:
    known = artifact.component in COMPONENTS
    return COMPONENTS.index(artifact.component) if known else len(COMPONENTS), artifact.precision


def _line(bundle: Path, manifest: Manifest, plan: _Planned, built: tuple[Artifact, float] | None) -> Exported:
    import onnx_ir as ir

    artifact = manifest.artifact(plan.component, plan.precision)
    if artifact is None:
        raise ArtifactError(f"{bundle}: another export changed {plan.component} meanwhile. Run the same command again.")
    return Exported(
        artifact=artifact,
        status="exported" if built else "up to date",
        reason=plan.reason or "",
        size=sum(manifest.files[name].size for name in artifact.files),
        nodes=len(ir.load(bundle / artifact.path).graph),
        seconds=built[1] if built else 0.0,
    )
