from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import contents, edited, failing, hidden, watch_builds
from tiny import COMPONENTS

from latentrt.export import graph_files, staging
from latentrt.export.export_plan import Planned
from latentrt.export.exporter import export_checkpoint
from latentrt.export.finished import NOTES, finished, note_finished, resumed_folder, unfinished_folders
from latentrt.runtime.errors import ExportError
from latentrt.runtime.manifest import Artifact

ALL = [(component, precision) for component in COMPONENTS for precision in ("fp32", "fp16")]


@pytest.fixture
def interrupt(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Export into a bundle, failing at the fourth graph."""

    def run(bundle: Path, error: BaseException, *, checkpoint: Path = tiny_checkpoint, force: bool = False) -> None:
        with monkeypatch.context() as patch:
            watch_builds(patch, fail_at=3, error=error)
            with pytest.raises(type(error)):
                export_checkpoint(checkpoint, bundle, force=force)

    return run


@pytest.mark.parametrize(("error", "existing"), [(KeyboardInterrupt(), False), (ExportError("no"), True)])
def test_a_failed_export_leaves_nothing_in_the_bundle_and_the_next_goes_on(
    error: BaseException,
    existing: bool,
    interrupt: Callable[..., None],
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "x.bundle"
    if existing:
        shutil.copytree(tiny_bundle, target)
    interrupt(target, error, force=existing)
    assert target.exists() == existing
    assert contents(target) == (contents(tiny_bundle) if existing else {})
    (kept,) = unfinished_folders(target)
    assert {path.stem for path in (kept / NOTES).iterdir()} == {"text_encoder.fp32", "text_encoder.fp16", "unet.fp32"}
    made = watch_builds(monkeypatch)
    lines = export_checkpoint(tiny_checkpoint, target, force=existing)
    assert made == ALL[3:]
    assert {line.status for line in lines} == {"exported"}
    assert [line.seconds == 0 for line in lines] == [True] * 3 + [False] * 5
    assert contents(target) == contents(tiny_bundle)
    assert hidden(target) == []


def test_a_graph_of_another_checkpoint_is_made_again(
    interrupt: Callable[..., None],
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raised(bias: torch.Tensor) -> torch.Tensor:
        return bias + 0.1

    target, file = tmp_path / "x.bundle", "unet/diffusion_pytorch_model.safetensors"
    other = edited(tiny_checkpoint, tmp_path / "tiny", "conv_in.bias", raised, file=file)
    interrupt(target, KeyboardInterrupt(), checkpoint=other)
    made = watch_builds(monkeypatch)
    export_checkpoint(tiny_checkpoint, target)
    assert made == ALL[2:]
    assert contents(target) == contents(tiny_bundle)
    assert hidden(target) == []


# Dies when the third graph is finished.
KILLED = """
import os, pathlib, signal, sys
from latentrt.export import export_run
from latentrt.export.exporter import export_checkpoint
checkpoint, bundle = map(pathlib.Path, sys.argv[1:])
made, note = [], export_run.note_finished
def dying(*args):
    note(*args)
    made.append(args)
    if len(made) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
export_run.note_finished = dying
export_checkpoint(checkpoint, bundle)
"""


def test_after_a_kill_the_next_export_goes_on(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "x.bundle"
    command = [sys.executable, "-c", KILLED, str(tiny_checkpoint), str(target)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    (name,) = hidden(target)
    assert name.startswith(staging.PREFIX)
    assert [path.name for path in target.iterdir() if path.name != ".lock"] == [name]
    made = watch_builds(monkeypatch)
    export_checkpoint(tiny_checkpoint, target)
    assert made == ALL[3:]
    assert contents(target) == contents(tiny_bundle)
    assert hidden(target) == []


def test_a_disk_that_is_full_in_the_middle_of_a_graph(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, written = tmp_path / "x.bundle", []
    save = graph_files._save

    def full(model: Any, path: Path) -> None:
        written.append(path)
        save(model, path)
        if len(written) == 4:
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(graph_files, "_save", full)
        with pytest.raises(OSError, match="No space left"):
            export_checkpoint(tiny_checkpoint, target)
    assert not target.exists()
    made = watch_builds(monkeypatch)
    export_checkpoint(tiny_checkpoint, target)
    assert made == ALL[3:]
    assert contents(target) == contents(tiny_bundle)
    assert hidden(target) == []


@pytest.mark.parametrize("where", ["update_bundle", "Order"])
def test_what_is_finished_survives_a_failure_outside_of_the_graphs(
    where: str,
    interrupt: Callable[..., None],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "x.bundle"
    interrupt(target, KeyboardInterrupt())
    place = "latentrt.export.exporter" if where == "update_bundle" else "latentrt.export.export_run"
    monkeypatch.setattr(f"{place}.{where}", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tiny_checkpoint, target)
    (kept,) = unfinished_folders(target)
    assert len(list((kept / NOTES).iterdir())) == (8 if where == "update_bundle" else 3)


PLAN = Planned("unet", "fp32", {"precision": "fp32"}, "a" * 64, "new")
GRAPH = Artifact("unet", "fp32", "unet/model.onnx", ("unet/model.onnx",), 20, PLAN.key, PLAN.inputs, {"rms": 0.1}, 5)


def write_finished(folder: Path, plan: Planned = PLAN, data: bytes = b"graph") -> None:
    (folder / "unet").mkdir(parents=True)
    (folder / "unet/model.onnx").write_bytes(data)
    note_finished(folder, plan, GRAPH)


def test_a_note_gives_the_artifact_back(tmp_path: Path) -> None:
    write_finished(tmp_path)
    assert finished(tmp_path, [PLAN]) == {("unet", "fp32"): (GRAPH, 0.0)}


@pytest.mark.parametrize("damage", ["another key", "truncated", "missing", "garbage", "no note", "a list"])
def test_a_graph_that_is_not_whole_is_not_taken(damage: str, tmp_path: Path) -> None:
    write_finished(tmp_path)
    graph, note = tmp_path / "unet/model.onnx", tmp_path / NOTES / "unet.fp32.json"
    plan = Planned("unet", "fp32", PLAN.inputs, "b" * 64, "new") if damage == "another key" else PLAN
    if damage == "truncated":
        graph.write_bytes(b"grap")
    if damage == "missing":
        graph.unlink()
    if damage == "garbage":
        note.write_bytes(b"\xff{")
    if damage == "no note":
        note.unlink()
    if damage == "a list":
        note.write_text("[]")
    assert finished(tmp_path, [plan]) == {}


def test_of_two_failed_exports_each_graph_keeps_its_own_note(tmp_path: Path) -> None:
    """Files of one name and size, of two checkpoints."""
    target = tmp_path / "[1] x.bundle"
    other = Planned("unet", "fp32", PLAN.inputs, "b" * 64, "new")
    write_finished(tmp_path / f".{target.name}.unfinished-1", other, b"other")
    write_finished(tmp_path / f".{target.name}.unfinished-2", PLAN, b"graph")
    with resumed_folder(target, [PLAN]) as folder:
        assert finished(folder, [PLAN])
        assert (folder / "unet/model.onnx").read_bytes() == b"graph"
        assert hidden(target) == [folder.name]
    assert hidden(target) == []


def test_an_error_while_keeping_does_not_hide_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        with resumed_folder(tmp_path / "x.bundle", [PLAN]) as folder:
            write_finished(folder)
            monkeypatch.setattr(Path, "mkdir", failing(OSError(errno.ENOSPC, "No space left on device")))
            raise ExportError("the first")

    with pytest.raises(ExportError, match="the first"):
        fail()


def test_a_bundle_that_is_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.bundle"
    target.mkdir()
    monkeypatch.chdir(target)
    with suppress(KeyboardInterrupt), resumed_folder(Path(), [PLAN]) as folder:
        write_finished(folder)
        raise KeyboardInterrupt
    assert [path.parent for path in unfinished_folders(Path())] == [tmp_path]
    assert hidden(target)[0].startswith(".x.bundle.unfinished-")
