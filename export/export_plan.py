"""What an export has to do: which graphs the bundle already holds as exporting would make them, and why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.manifest import Artifact, Manifest, changed_inputs, check_files, key_of

from .checkpoint import Checkpoint
from .tool_versions import GRAPH_REVISION, GRAPH_TOOLS, tool_versions

PRECISIONS = ("fp32", "fp16", "mixed", "bf16")
# What begins, and the share of the work that is done.
Report = Callable[[str, float], None]
# By component and the precision that was asked for: what was made, and the seconds that it took.
Built = dict[tuple[str, str], tuple[Artifact, float]]
# Component -> the component that it is made from, for those that are asked for.
DERIVED: Mapping[str, str] = {"unet_prompt": "unet", "unet_cached": "unet", "vae_decoder_uint8": "vae_decoder"}
# Components that lie in the folder of another, and their files' names there.
_BESIDE = {
    "unet_control": ("unet", "control"),
    "unet_prompt": ("unet", "prompt"),
    "unet_cached": ("unet", "cached"),
    "vae_decoder_uint8": ("vae_decoder", "uint8"),
}


@dataclass(frozen=True)
class Planned:
    """One graph asked for. `reason` says why it has to be exported; None means that the bundle's is up to date."""

    component: str
    precision: str
    inputs: Mapping[str, Any]
    key: str
    reason: str | None


def graph_path(component: str, precision: str) -> str:
    """Where a bundle keeps a graph: optimum's name for fp32, the precision before the suffix for others.

    Those that are the U-Net's or the decoder's network with other inputs or outputs lie beside it.
    """
    folder, stem = _BESIDE.get(component, (component, "model"))
    return f"{folder}/{stem}.onnx" if precision == "fp32" else f"{folder}/{stem}.{precision}.onnx"


def plan_exports(
    checkpoint: Checkpoint,
    bundle: Path,
    manifest: Manifest | None,
    precisions: Sequence[str],
    options: Mapping[str, Any],
    *,
    derived: Sequence[str] = (),
    compared: bool = True,
    force: bool,
) -> list[Planned]:
    """Every component in every precision, with the reason to export it.

    Args:
        manifest: of the bundle, None for a new one.
        options: of the export, as they enter the key.
        derived: of DERIVED, which of them to make.
        compared: a graph that was never compared with PyTorch has to be exported again.
        force: export what is up to date too.

    Raises:
        ArtifactError: a file of the checkpoint cannot be read.
    """
    hashes = checkpoint.hashes()
    tools = {**tool_versions(GRAPH_TOOLS), "graph_revision": str(GRAPH_REVISION)}
    planned = []
    parts = checkpoint.components
    parts |= {component: parts[DERIVED[component]] for component in derived}
    for component, part in parts.items():
        for precision in precisions:
            inputs = {
                "component": component,
                "precision": precision,
                "source": hashes[part],
                "options": dict(options),
                "tools": tools,
            }
            key = key_of(inputs)
            old = made_for(manifest, component, precision)
            reason = "forced" if force and old else _reason(bundle, manifest, old, inputs, key)
            if reason is None and compared and not is_compared(old):
                reason = "not compared yet"
            planned.append(Planned(component, precision, inputs, key, reason))
    return planned


def made_for(manifest: Manifest | None, component: str, precision: str) -> Artifact | None:
    """The bundle's graph for a precision that was asked for: for fp16 also the mixed one that was made instead."""
    if manifest is None:
        return None
    found = manifest.artifact(component, precision)
    if found is None and precision == "fp16":
        mixed = manifest.artifact(component, "mixed")
        return mixed if mixed is not None and mixed.inputs.get("precision") == "fp16" else None
    return found


def is_compared(artifact: Artifact | None) -> bool:
    """Whether a graph was compared with PyTorch when it was made."""
    return artifact is not None and artifact.parity.get("check") != "none"


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
