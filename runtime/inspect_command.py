"""`latentrt inspect`: what a bundle holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .manifest import Artifact, Manifest, load_manifest


def megabytes(manifest: Manifest, names: tuple[str, ...]) -> float:
    """Size of some files of a bundle in 10^6 bytes."""
    return sum(manifest.files[name].size for name in names) / 1e6


def _parity(artifact_parity: Any) -> str:
    worst = artifact_parity.get("worst_relative_l2") if hasattr(artifact_parity, "get") else None
    return f"{worst:.1e}" if isinstance(worst, float) else "not recorded"


def _runtime(artifact: Artifact) -> str:
    return f"onnxruntime {artifact.target.upper()}" if artifact.target else "every runtime"


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="The whole manifest as JSON.")] = False,
) -> int:
    """Show a bundle's graphs and engines: precision, size, parity with the model, targets.

    Example: latentrt inspect shapes.bundle
    """
    from .console import log, print_table

    manifest = load_manifest(bundle)
    if as_json:
        print(json.dumps(dataclasses.asdict(manifest), indent=1, default=str))
        return 0
    log(f"{bundle}: {manifest.pipeline_class} {manifest.name!r}, made by latentrt {manifest.latentrt_version}")
    print_table(
        "graphs",
        ["component", "precision", "for", "opset", "parameters", "MB", "relative L2", "file"],
        [
            (a.component, a.precision, _runtime(a), a.opset, f"{a.parameters:,}", f"{megabytes(manifest, a.files):.1f}",
             _parity(a.parity), a.path)
            for a in manifest.artifacts
        ],
    )  # fmt: skip
    if manifest.engines:
        print_table(
            "engines",
            ["component", "precision", "flavour", "targets", "MB", "file"],
            [
                (
                    e.component,
                    e.precision,
                    e.flavour,
                    " ".join(e.targets),
                    f"{megabytes(manifest, (e.path,)):.1f}",
                    e.path,
                )
                for e in manifest.engines
            ],
        )
    return 0
