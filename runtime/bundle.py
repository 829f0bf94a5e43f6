"""Opening a bundle: which graphs it holds, and the configs the runtime reads.

Also opens a folder that `optimum-cli export onnx` wrote: the same layout without a manifest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ArtifactError, UsageError
from .manifest import MANIFEST, Manifest, check_files, load_manifest
from .precisions import how_to_make, rank, usable_precisions

TEXT_TO_IMAGE = ("text_encoder", "unet", "vae_decoder")
COMPONENTS = (*TEXT_TO_IMAGE, "vae_encoder")
# What a text-to-image run may need; an SDXL refiner has no text_encoder, other families no text_encoder_2.
DRAWING = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `manifest` is None for a folder written by optimum, whose files cannot be verified."""

    path: Path
    manifest: Manifest | None

    def graph(self, component: str, precision: str, target: str = "") -> Path:
        """The .onnx file of a component, its size and presence checked.

        Args:
            target: of `Artifact`; by default the graph that every runtime takes.

        Raises:
            UsageError: the bundle does not hold the component in that precision.
            ArtifactError: a file of it is missing or truncated.
        """
        if self.manifest is None:
            path = self.path / component / "model.onnx"
            if not path.exists():
                raise ArtifactError(f"{path}: expected an ONNX graph, found none. Export the checkpoint again.")
            return path
        artifact = self.manifest.artifact(component, precision, target)
        if artifact is None:
            held = [a.precision for a in self.manifest.artifacts if a.component == component and not a.target]
            raise UsageError(
                f"{self.path}: expected {component} in {precision}, found {held or 'none'}. "
                f"Run: {how_to_make(self.path, component, precision)}"
            )
        check_files(self.path, self.manifest, artifact.files, hashes=False)
        return self.path / artifact.path

    def components(self) -> tuple[str, ...]:
        """The components it holds in any precision, in the order of the manifest."""
        if self.manifest is None:
            return tuple(sorted(path.parent.name for path in self.path.glob("*/model.onnx")))
        return tuple(dict.fromkeys(artifact.component for artifact in self.manifest.artifacts))

    def held(self, component: str) -> list[str]:
        """The precisions of a component, best first."""
        if self.manifest is None:
            return ["unknown"] if component in self.components() else []
        found = {a.precision for a in self.manifest.artifacts if a.component == component and not a.target}
        return sorted(found, key=rank)

    def precision_of(self, component: str, precision: str) -> str | None:
        """The precision in which a component takes part in a run of that precision; None if it has no part in one.

        See `precisions.usable_precisions`: mixed where fp16 would overflow, half precision beside a quantized U-Net.
        """
        held = self.held(component)
        return next((name for name in usable_precisions(component, precision) if name in held), None)

    def precisions(self) -> list[str]:
        """The precisions in which every component of a text-to-image run is present, best first."""
        present = self.components()
        text = [name for name in DRAWING[:2] if name in present] or ["text_encoder"]
        needed = (*text, "unet", "vae_decoder")
        found = {precision for component in needed for precision in self.held(component)}
        whole = [precision for precision in found if all(self.precision_of(name, precision) for name in needed)]
        return sorted(whole, key=rank)

    def config(self, name: str) -> dict[str, Any]:
        """A JSON config of the bundle, such as `unet/config.json`.

        Raises:
            ArtifactError: it is missing, damaged, or not what the manifest says.
        """
        return read_config(self.path / name)

    def check(self, names: Sequence[str] | None = None) -> None:
        """Compare files with the manifest's hashes (all of them by default).

        Raises:
            ArtifactError: names the first file that differs.
        """
        if self.manifest is not None:
            check_files(self.path, self.manifest, sorted(self.manifest.files) if names is None else names)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ArtifactError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as err:
        raise ArtifactError(f"{path}: expected a config file, found none. Export the checkpoint again.") from err
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path}: expected JSON, got {err}. Export the checkpoint again.") from err
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


def open_bundle(path: Path) -> Bundle:
    """Open a bundle, or a folder that optimum wrote.

    Raises:
        ArtifactError: the folder is missing, is no bundle, or its manifest is damaged or of a newer format.
    """
    if not path.is_dir():
        raise ArtifactError(
            f"{path}: expected a bundle folder, found {'a file' if path.exists() else 'nothing'}. "
            "Make one with: latentrt export CHECKPOINT -o BUNDLE"
        )
    if not (path / MANIFEST).exists() and (path / "unet" / "model.onnx").exists():
        return Bundle(path=path, manifest=None)
    return Bundle(path=path, manifest=load_manifest(path))


def pipeline_files(bundle: Bundle, precision: str, components: Sequence[str], target: str = "") -> list[str]:
    """The files that running these components in a precision reads: graphs, tokenizer and configs."""
    if bundle.manifest is None:
        return []
    artifacts = [a for c in components if (a := bundle.manifest.artifact(c, precision, target)) is not None]
    shared = [name for name in bundle.manifest.files if name.endswith(("config.json", "index.json"))]
    tokenizer = [name for name in bundle.manifest.files if name.startswith("tokenizer")]
    return sorted({name for a in artifacts for name in a.files} | set(shared) | set(tokenizer))
