"""`latentrt verify`: recompute the hashes of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .errors import ArtifactError
from .manifest import load_manifest, problem_of


def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Recompute every hash of a bundle and compare it with the manifest.

    Example: latentrt verify shapes.bundle
    """
    from rich.progress import track

    from .console import log, progress_console

    manifest = load_manifest(bundle)
    names = sorted(manifest.files)
    problems = [
        problem
        for name in track(names, "hashing", console=progress_console(), transient=True)
        if (problem := problem_of(bundle, manifest, name))
    ]
    if as_json:
        print(json.dumps({"bundle": str(bundle), "files": len(names), "problems": problems, "ok": not problems}))
        return 1 if problems else 0
    if problems:
        raise ArtifactError("\n".join(problems))
    log(f"{bundle}: {len(names)} files are what the manifest says.")
    return 0
