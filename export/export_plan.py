"""What an export has to do: which graphs the bundle already holds as exporting would make them, and why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.manifest import Artifact, Manifest, changed_inputs, check_files, key_of

from .checkpoint import Checkpoint

PRECISIONS = ("fp32", "fp16")
# Raised whenever the same checkpoint and tools would give other graphs than before.
GRAPH_REVISION = 2
_GRAPH_TOOLS = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript")
_TOOLS = (*_GRAPH_TOOLS, "latentrt", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Planned:
    """One graph asked for. `reason` says why it has to be exported; None means that the bundle's is up to date."""

    component: str
    precision: str
    inputs: Mapping[str, Any]
    key: str
    reason: str | None

    @property
    def path(self) -> str:
        """Its .onnx file, relative to the bundle."""
        return graph_path(self.component, self.precision)


def graph_path(component: str, precision: str) -> str:
    """Where a bundle keeps a graph: optimum's name for fp32, the precision before the suffix for others.

    The U-Net that takes ControlNet residuals lies beside the U-Net.
    """
    folder, stem = ("unet", "control") if component == "unet_control" else (component, "model")
    return f"{folder}/{stem}.onnx" if precision == "fp32" else f"{folder}/{stem}.{precision}.onnx"


def tool_versions(names: Sequence[str] = _TOOLS) -> dict[str, str]:
    """Installed versions by distribution; those that are not installed are left out."""
    return {name: found for name in names if (found := _installed(name)) is not None}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def plan_exports(
    checkpoint: Checkpoint,
    bundle: Path,
    manifest: Manifest | None,
    precisions: Sequence[str],
    options: Mapping[str, Any],
    *,
    force: bool,
) -> list[Planned]:
    """Every component in every precision, with the reason to export it.

    Args:
        manifest: of the bundle, None for a new one.
        options: of the export, as they enter the key.
        force: export what is up to date too.

    Raises:
        ArtifactError: a file of the checkpoint cannot be read.
    """
    hashes = {part: checkpoint.hashes(part) for part in checkpoint.parts}
    tools = {**tool_versions(_GRAPH_TOOLS), "graph_revision": str(GRAPH_REVISION)}
    planned = []
    for component, part in checkpoint.components.items():
        for precision in precisions:
            inputs = {
                "component": component,
                "precision": precision,
                "source": hashes[part],
                "options": dict(options),
                "tools": tools,
            }
            key = key_of(inputs)
            old = manifest.artifact(component, precision) if manifest else None
            reason = "forced" if force and old else _reason(bundle, manifest, old, inputs, key)
            planned.append(Planned(component, precision, inputs, key, reason))
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
