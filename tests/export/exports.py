"""What tests of exports share: checkpoints with an edited weight, bundles' bytes, exports that fail or are counted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.export import export_run
from latentrt.export.graph_builder import build_graph

VAE = "vae/diffusion_pytorch_model.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, locks apart."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def hidden(bundle: Path) -> list[str]:
    """What exports leave for the next one, in the bundle and beside it."""
    return sorted(path.name for path in (*bundle.parent.glob(".*"), *bundle.glob(".*")) if path.name != ".lock")


def edited(
    checkpoint: Path, copy: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], *, file: str = VAE
) -> Path:
    """A copy of a checkpoint with one tensor changed."""
    shutil.copytree(checkpoint, copy)
    weights = load_file(copy / file)
    weights[name] = change(weights[name])
    save_file(weights, copy / file, metadata={"format": "pt"})
    return copy


def failing(error: BaseException) -> Callable[..., NoReturn]:
    """A function that raises."""

    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise error

    return fail


def watch_builds(
    patch: pytest.MonkeyPatch, *, fail_at: int | None = None, error: BaseException | None = None
) -> list[tuple[str, str]]:
    """Component and precision of every graph that is made from now on.

    Args:
        fail_at: the index of the graph that `error` is raised for.
    """
    made: list[tuple[str, str]] = []
    build = build_graph

    def watched(component: Any, *args: Any, precision: str, **options: Any) -> Any:
        if error is not None and len(made) == fail_at:
            raise error
        made.append((component.spec.name, precision))
        return build(component, *args, precision=precision, **options)

    patch.setattr(export_run, "build_graph", watched)
    return made
