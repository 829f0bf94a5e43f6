"""Bring a bundle to what an export made, dropping what that leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latentrt.runtime.manifest import Artifact, FileRecord, Manifest, record_of

from .checkpoint import Checkpoint
from .checkpoint_folder import COPIED
from .export_plan import DERIVED
from .staging import commit
from .tool_versions import tool_versions


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
    engines and graphs that were made from a graph which is replaced by a different one. ControlNets and a TAESD of an
    earlier export stay as long as the U-Net is the same.

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
    for name, content in checkpoint.copied_files().items():
        copy = folder / "copied" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
        staged[name] = copy, record_of(copy)

    changes = {name: list(map(dict, part.changes)) for name, part in checkpoint.parts.items() if part.changes}

    def change(before: Manifest | None) -> Manifest:
        present = before.artifacts if before else ()
        before_files = before.files if before else {}
        records = {name: record for name, (_, record) in staged.items()}
        kept, same = _staying(present, before_files, artifacts, records, sources)
        held = {(a.component, a.precision) for a in (*kept, *same)}
        engines = tuple(e for e in (before.engines if before else ()) if (e.component, e.precision) in held)
        owned = {name for a in present for name in a.files}
        owned |= {name for e in (before.engines if before else ()) for name in (e.path, e.sidecar)}
        wanted = {name for a in (*kept, *artifacts) for name in a.files}
        wanted |= {name for e in engines for name in (e.path, e.sidecar)}
        gone = {a.component for a in present} - {a.component for a in (*kept, *artifacts)} - {"unet_control"}
        files = {
            name: record
            for name, record in before_files.items()
            if name in wanted or (name not in owned and name.split("/")[0] not in (*COPIED, *gone))
        }
        base = before or Manifest(name="", pipeline_class="", latentrt_version="")
        return dataclasses.replace(
            base,
            name=checkpoint.name,
            pipeline_class=checkpoint.pipeline_class,
            latentrt_version=version("latentrt"),
            source={
                **{name: digest for hashes in sources.values() for name, digest in hashes.items()},
                **({"changes": changes} if changes else {}),
                **({"hub": dict(checkpoint.hub)} if checkpoint.hub else {}),
            },
            tools=tool_versions(),
            options=dict(options),
            files=files,
            artifacts=tuple(sorted([*kept, *artifacts], key=_order)),
            engines=engines,
        )

    return commit(bundle, staged, change)


def _staying(
    present: Sequence[Artifact],
    before: Mapping[str, FileRecord],
    made: Sequence[Artifact],
    staged: Mapping[str, FileRecord],
    sources: Mapping[str, Mapping[str, str]],
) -> tuple[list[Artifact], list[Artifact]]:
    """Of a bundle's graphs, those that stay; and of those made, those that it held just so.

    Args:
        present: the bundle's, with the records of its files in `before`.
        made: with the records of their files in `staged`.
        sources: as for `update_bundle`.
    """
    replaced = {identity for a in made for identity in (_identity(a), _asked(a))}
    same = [a for a in made if all(before.get(name) == staged[name] for name in a.files)]
    same_unet = any(a.inputs.get("source") == sources["unet"] for a in present if a.component == "unet")
    kept: list[Artifact] = []

    def is_current(artifact: Artifact) -> bool:
        if (made_from := artifact.inputs.get("made_from")) is not None:
            files = {name: before[name] for a in kept for name in a.files} | dict(staged)
            return all(name in files and files[name].sha256 == sha256 for name, sha256 in made_from.items())
        if (base := DERIVED.get(artifact.component)) is not None:
            return any((a.component, a.precision) == (base, artifact.precision) for a in (*kept, *same))
        if artifact.component in sources:
            return bool(artifact.inputs.get("source") == sources[artifact.component])
        return same_unet

    # Those that others are made from come first.
    for artifact in sorted(present, key=lambda a: ("made_from" in a.inputs, a.component in DERIVED)):
        overwritten = any(staged.get(name, before[name]) != before[name] for name in artifact.files)
        if replaced.isdisjoint({_identity(artifact), _asked(artifact)}) and not overwritten and is_current(artifact):
            kept.append(artifact)
    return kept, same


def _asked(artifact: Artifact) -> tuple[str, str, str]:
    """As which graph it was asked for: a mixed one may stand for fp16."""
    return artifact.component, str(artifact.inputs.get("precision", artifact.precision)), artifact.target


def _identity(artifact: Artifact) -> tuple[str, str, str]:
    return artifact.component, artifact.precision, artifact.target


def _order(artifact: Artifact) -> tuple[int, str, str]:
    """That of a run; several ControlNets by number."""
    order = ("text_encoder", "text_encoder_2", "unet", "unet_control", "controlnet", "vae_decoder", "vae_encoder")
    kind = "controlnet" if artifact.component.startswith("controlnet") else artifact.component
    return order.index(kind) if kind in order else len(order), artifact.component, artifact.precision
