"""Bring a bundle to what an export made, dropping what that leaves behind."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latentrt.runtime.manifest import Artifact, FileRecord, Manifest, record_of

from .checkpoint import COPIED, Checkpoint
from .export_plan import tool_versions
from .staging import commit


def update_bundle(
    checkpoint: Checkpoint,
    bundle: Path,
    folder: Path,
    artifacts: Sequence[Artifact],
    options: Mapping[str, Any],
    sources: Mapping[str, Mapping[str, str]],
    others: Sequence[str] = (),
) -> Manifest:
    """Move staged graphs and the checkpoint's configs into the bundle.

    One bundle is one checkpoint: graphs of other precisions that were made from other weights go, and so do
    engines whose graph was replaced by a different one. ControlNets and a TAESD of an earlier export stay as long as
    the U-Net is the same.

    Args:
        folder: where the artifacts' files were made.
        artifacts: what was exported; may be none.
        options: of the export.
        sources: hashes of the checkpoint's files by component, as the plan took them.
        others: files made in `folder` that belong to no artifact.

    Returns:
        The new manifest.
    """
    staged: dict[str, tuple[Path, FileRecord]] = {}
    for name in (*(name for artifact in artifacts for name in artifact.files), *others):
        staged[name] = folder / name, record_of(folder / name)
    for name, source in checkpoint.copied_files().items():
        copy = folder / "copied" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        staged[name] = copy, record_of(copy)

    def change(before: Manifest | None) -> Manifest:
        replaced = {(a.component, a.precision) for a in artifacts}
        present = before.artifacts if before else ()
        before_files = before.files if before else {}
        same_unet = any(a.inputs.get("source") in (None, sources["unet"]) for a in present if a.component == "unet")
        kept = [
            a
            for a in present
            if (a.component, a.precision) not in replaced
            and all(name not in staged or staged[name][1] == before_files.get(name) for name in a.files)
            and (a.inputs.get("source") in (None, sources[a.component]) if a.component in sources else same_unet)
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
        gone = {a.component for a in present} - {a.component for a in (*kept, *artifacts)} - {"unet_control"}
        files = {
            name: record
            for name, record in (before.files if before else {}).items()
            if name in wanted or (name not in owned and name.split("/")[0] not in (*COPIED, *gone))
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


def _order(artifact: Artifact) -> tuple[int, str, str]:
    """That of a run; several ControlNets by number."""
    order = ("text_encoder", "text_encoder_2", "unet", "unet_control", "controlnet", "vae_decoder", "vae_encoder")
    kind = "controlnet" if artifact.component.startswith("controlnet") else artifact.component
    return order.index(kind) if kind in order else len(order), artifact.component, artifact.precision
