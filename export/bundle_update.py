"""Bring a bundle to what an export made, dropping what that leaves behind."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latentrt.runtime.bundle import COMPONENTS
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
) -> Manifest:
    """Move staged graphs and the checkpoint's configs into the bundle.

    One bundle is one checkpoint: graphs of other precisions that were made from other weights go, and so do
    engines whose graph was replaced by a different one.

    Args:
        folder: where the artifacts' files were made.
        artifacts: what was exported; may be none.
        options: of the export.
        sources: hashes of the checkpoint's files by component, as the plan took them.

    Returns:
        The new manifest.
    """
    staged: dict[str, tuple[Path, FileRecord]] = {}
    for artifact in artifacts:
        for name in artifact.files:
            staged[name] = folder / name, record_of(folder / name)
    for name, source in checkpoint.copied_files().items():
        copy = folder / "copied" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        staged[name] = copy, record_of(copy)

    def change(before: Manifest | None) -> Manifest:
        replaced = {(a.component, a.precision) for a in artifacts}
        kept = [
            a
            for a in (before.artifacts if before else ())
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
            if name in wanted or (name not in owned and name.split("/")[0] not in COPIED)
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
