"""Checkpoint to bundle: export, convert, compare with PyTorch, and only then move into place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from latentrt.runtime.components import PICTURES
from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.latent_preview import LATENT_RGB_FILE
from latentrt.runtime.manifest import MANIFEST, Artifact, Manifest, load_manifest
from latentrt.runtime.prompt_keys import CACHED, PROMPT

from .bundle_update import update_bundle
from .checkpoint import Checkpoint, open_checkpoint
from .export_plan import PRECISIONS, Built, Planned, Report, made_for, plan_exports
from .finished import resumed_folder
from .opset import checked_opset
from .staging import check_bundle_path
from .trace_cache import default_cache

CHECKS = ("auto", "full", "quick", "none")


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
    source: Path | Checkpoint,
    bundle: Path,
    *,
    precisions: Sequence[str] = ("fp32", "fp16"),
    opset: int | None = None,
    uint8_vae: bool = False,
    prompt_keys: bool = False,
    check: str = "auto",
    cache: Path | None = None,
    force: bool = False,
    report: Report = lambda message, share: None,
) -> list[Exported]:
    """Export a checkpoint into a bundle.

    Every graph is compared with PyTorch, in ONNX Runtime, on inputs of a real sampling run, before any file of the
    bundle changes. Graphs whose weights, configs, options and tools are those of the manifest are kept. Weights are
    read, converted and written one at a time. What a run that failed had finished is taken over by the next.

    Args:
        source: the checkpoint, or its path.
        bundle: the folder to make or to add to.
        precisions: of fp32, fp16, mixed and bf16. Where fp16 would overflow, the graph becomes a mixed one.
        opset: of the default ONNX domain; None for the one both backends like best.
        uint8_vae: also make the VAE decoder that gives uint8 pictures.
        prompt_keys: also make the U-Net in two graphs, one for what depends on the prompt alone.
        check: `full` samples a few pictures and asks for other sizes and longer texts besides; `quick` asks for one
            step of one small picture; `auto` is `quick` for large networks whose graph passed `full` before with
            other weights; `none` compares nothing, and takes only what passed `full` before with other weights.
        cache: folder of traced graphs; None for the user's.
        force: export again what is up to date.
        report: called with a line on what begins, and the share of the work done.

    Returns:
        A line for every component and precision asked for.

    Raises:
        UsageError: unknown precision or opset, too little disk or memory, or a bundle path that is something else.
        ArtifactError, ConfigError: the checkpoint is damaged or not supported.
        ExportError: a component cannot be exported or does not match its model; the bundle is as it was.
    """
    precisions = _checked_precisions(precisions)
    if check not in CHECKS:
        raise UsageError(f"check: expected one of {', '.join(CHECKS)}, got {check!r}.")
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    path = checkpoint.path.resolve()
    if bundle.resolve() == path or path in bundle.resolve().parents:
        raise UsageError(f"{bundle}: expected a folder outside the checkpoint. Choose another path with -o.")
    check_bundle_path(bundle)
    options = {"opset": checked_opset(opset)}
    report(f"reading {checkpoint.name}", 0.0)
    manifest = load_manifest(bundle) if (bundle / MANIFEST).exists() else None
    derived = [*([PROMPT, CACHED] if prompt_keys else []), *([PICTURES] if uint8_vae else [])]
    planned = plan_exports(
        checkpoint, bundle, manifest, precisions, options, derived=derived, compared=check != "none", force=force
    )
    with resumed_folder(bundle, planned) as folder:
        built: Built = {}
        others: list[str] = []
        if any(plan.reason for plan in planned):
            # Here and not above: torch and diffusers take seconds to import.
            from .export_run import Order, make_graphs

            order = Order(
                checkpoint=checkpoint,
                bundle=bundle,
                manifest=manifest,
                planned=planned,
                folder=folder,
                opset=options["opset"],
                check=check,
                cache=cache or default_cache(),
                report=report,
            )
            built = make_graphs(order)
            others.append(LATENT_RGB_FILE)
        report("moving the graphs into place", 1.0)
        # The plan's hashes: reading gigabytes of weights again would tell nothing new.
        sources = {plan.component: plan.inputs["source"] for plan in planned}
        artifacts = [artifact for artifact, _ in built.values()]
        final = update_bundle(checkpoint, bundle, folder, artifacts, options, sources, others)
    return [_line(bundle, final, plan, built.get((plan.component, plan.precision))) for plan in planned]


def _checked_precisions(precisions: Sequence[str]) -> list[str]:
    for precision in precisions or [""]:
        if precision not in PRECISIONS:
            raise UsageError(
                f"precision: expected one or more of {', '.join(PRECISIONS)}, got {precision!r}. "
                "int8 is made from an exported bundle by: latentrt calibrate"
            )
    if {"fp16", "mixed"} <= {*precisions}:
        raise UsageError(
            "precision: expected fp16 or mixed, got both. fp16 makes a mixed graph of a component that would overflow."
        )
    return [precision for precision in PRECISIONS if precision in precisions]


def _line(bundle: Path, manifest: Manifest, plan: Planned, built: tuple[Artifact, float] | None) -> Exported:
    artifact = made_for(manifest, plan.component, plan.precision)
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
