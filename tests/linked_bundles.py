"""Copies of bundles that take no time, for tests that change a file or two."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx

from latentrt.runtime.manifest import load_manifest, record_of, save_manifest


def linked(bundle: Path, folder: Path) -> Path:
    """A copy whose files must not be written into, but may be replaced."""
    return Path(shutil.copytree(bundle, folder, copy_function=os.link))


def edit_graph(bundle: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    """Change the U-Net's graph as another export would: the manifest knows."""
    path = bundle / "unet" / "model.onnx"
    model = onnx.load(path)
    edit(model)
    path.unlink()
    onnx.save(model, path)
    manifest = load_manifest(bundle)
    (bundle / "manifest.json").unlink()
    save_manifest(bundle, dataclasses.replace(manifest, files={**manifest.files, "unet/model.onnx": record_of(path)}))
