"""Checkpoint to bundle: export, convert, compare with PyTorch, and only then move into place."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.latent_preview import LATENT_RGB_FILE
from latentrt.runtime.manifest import MANIFEST, Artifact, Manifest, load_manifest

from .bundle_update import update_bundle
from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint_weights import load_extras, load_pipeline
from .export_plan import PRECISIONS, Planned, graph_path, plan_exports
from .latent_colours import fit_colours
from .opset import checked_opset
from .staging import check_bundle_path, staging_folder

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


def export_checkpoint(
    path: Path,
    bundle: Path,
    *,
    precisions: Sequence[str] = PRECISIONS,
    opset: int | None = None,
    force: bool = False,
    controlnets: Sequence[Path] = (),
    taesd: Path | None = None,
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
        controlnets: folders of ControlNets to add to those that the checkpoint holds.
        taesd: the folder of an `AutoencoderTiny` for previews.
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
    checkpoint = open_checkpoint(path, controlnets=controlnets, taesd=taesd)
    if bundle.resolve() == path.resolve() or path.resolve() in bundle.resolve().parents:
        raise UsageError(f"{bundle}: expected a folder outside the checkpoint. Choose another path with -o.")
    check_bundle_path(bundle)
    options = {"opset": checked_opset(opset)}
    report(f"reading {path.name}")
    manifest = load_manifest(bundle) if (bundle / MANIFEST).exists() else None
    planned = plan_exports(checkpoint, bundle, manifest, precisions, options, force=force)
    with staging_folder(bundle) as folder:
        built: dict[tuple[str, str], tuple[Artifact, float]] = {}
        others: list[str] = []
        if any(plan.reason for plan in planned):
            others.append(LATENT_RGB_FILE)
            built = _build(checkpoint, bundle, manifest, planned, options, folder, report)
        report("moving the graphs into place")
        # The plan's hashes: reading gigabytes of weights again would tell nothing new.
        sources = {plan.component: plan.inputs["source"] for plan in planned}
        artifacts = [artifact for artifact, _ in built.values()]
        final = update_bundle(checkpoint, bundle, folder, artifacts, options, sources, others)
    return [_line(bundle, final, plan, built.get((plan.component, plan.precision))) for plan in planned]


def _build(
    checkpoint: Checkpoint,
    bundle: Path,
    manifest: Manifest | None,
    planned: Sequence[Planned],
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
    extras = load_extras(checkpoint)
    cases = capture_cases(pipeline, extras)
    (folder / LATENT_RGB_FILE).parent.mkdir(parents=True, exist_ok=True)
    (folder / LATENT_RGB_FILE).write_text(fit_colours(pipeline.vae).to_json())
    components = components_of(pipeline, extras)
    built: dict[tuple[str, str], tuple[Artifact, float]] = {}
    for name in checkpoint.components:
        plans = {plan.precision: plan for plan in planned if plan.component == name and plan.reason}
        if not plans:
            continue
        graph = folder / graph_path(name, "fp32")
        holders: dict[str, Path] = {}
        if name == "unet_control":
            _borrow_current(bundle, folder, manifest, planned, "unet")
            paths = {precision: folder / graph_path("unet", precision) for precision in PRECISIONS}
            holders = {precision: path for precision, path in paths.items() if path.exists()}
        if "fp32" not in _borrow_current(bundle, folder, manifest, planned, name):
            report(f"{name}: exporting")
            started = time.perf_counter()
            parity = build_fp32(
                components[name], graph, cases[name], opset=options["opset"], holder=holders.get("fp32")
            )
            if "fp32" in plans:
                artifact = _artifact(plans["fp32"], folder, parity, options, components[name].parameters)
                built[name, "fp32"] = artifact, time.perf_counter() - started
        if "fp16" in plans:
            report(f"{name}: converting to fp16")
            started = time.perf_counter()
            parity = build_fp16(name, graph, folder / graph_path(name, "fp16"), cases[name], holder=holders.get("fp16"))
            artifact = _artifact(plans["fp16"], folder, parity, options, components[name].parameters)
            built[name, "fp16"] = artifact, time.perf_counter() - started
    return built


def _borrow_current(
    bundle: Path, folder: Path, manifest: Manifest | None, planned: Sequence[Planned], component: str
) -> list[str]:
    """Put the bundle's up-to-date graphs of a component into the staging folder; returns their precisions."""
    current = []
    for plan in planned:
        old = manifest.artifact(component, plan.precision) if manifest else None
        if plan.component == component and plan.reason is None and old is not None:
            _borrow(bundle, folder, old)
            current.append(plan.precision)
    return current


def _borrow(bundle: Path, folder: Path, artifact: Artifact) -> None:
    """Copy one of the bundle's own graphs to where those that are made from it look for it.

    A link would do, but onnx-ir refuses external data with several hard links.
    """
    for name in artifact.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / name, folder / name)


def _artifact(
    plan: Planned, folder: Path, parity: Mapping[str, Any], options: Mapping[str, Any], parameters: int
) -> Artifact:
    from .shared_weights import files_of

    files = [str(path.relative_to(folder)) for path in files_of(folder / plan.path)]
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


def _line(bundle: Path, manifest: Manifest, plan: Planned, built: tuple[Artifact, float] | None) -> Exported:
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
