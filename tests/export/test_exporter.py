from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.torch import load_file, save_file
from tiny import COMPONENTS

from latentrt.export import export_plan, exporter, graph_builder, staging
from latentrt.export.exporter import export_checkpoint
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.errors import ArtifactError, ExportError, UsageError
from latentrt.runtime.manifest import EngineRecord, load_manifest, record_of, save_manifest, update_manifest

VAE = "vae/diffusion_pytorch_model.safetensors"
Install = Callable[..., None]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny.bundle"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit_weight(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint with one value of the VAE's decoder changed."""
    copy = Path(shutil.copytree(checkpoint, tmp_path / "edited"))
    weights = load_file(copy / VAE)
    weights["decoder.conv_in.bias"] += 0.5
    save_file(weights, copy / VAE, metadata={"format": "pt"})
    return copy


def add_to(model: ir.Model, name: str, amount: float) -> None:
    """Add to the first value of the weight whose name ends so; to all of a bias."""
    weight = next(v for v in model.graph.initializers.values() if v.name and v.name.endswith(name))
    assert weight.const_value is not None
    array = weight.const_value.numpy().copy()
    array[... if array.ndim == 1 else (0,) * array.ndim] += amount
    weight.const_value = ir.tensor(array, name=weight.name)


def test_a_bundle_holds_everything_and_every_file_is_in_its_manifest(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    manifest = load_manifest(tiny_bundle)
    assert [(a.component, a.precision) for a in manifest.artifacts] == [
        (component, precision) for component in COMPONENTS for precision in ("fp16", "fp32")
    ]
    assert {name for name in contents(tiny_bundle) if name not in (".lock", "manifest.json")} == set(manifest.files)
    open_bundle(tiny_bundle).check()
    for name in ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "unet/config.json"):
        assert (tiny_bundle / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    assert (tiny_bundle / "vae_decoder/config.json").read_bytes() == (tiny_checkpoint / "vae/config.json").read_bytes()
    assert manifest.source["unet/config.json"] == record_of(tiny_checkpoint / "unet/config.json").sha256
    assert {"torch", "diffusers", "onnxruntime", "latentrt"} <= manifest.tools.keys()
    json.loads((tiny_bundle / "manifest.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def test_the_manifest_records_parity_within_the_bounds(tiny_bundle: Path) -> None:
    for artifact in load_manifest(tiny_bundle).artifacts:
        cases = {name: figures for name, figures in artifact.parity.items() if isinstance(figures, dict)}
        assert len(cases) >= 2
        assert all(figures.keys() == {"max_abs", "relative_l2", "psnr_db"} for figures in cases.values())
        worst = artifact.parity["worst_relative_l2"]
        assert worst == max(figures["relative_l2"] for figures in cases.values())
        assert 0 < worst <= (1e-5 if artifact.precision == "fp32" else 5e-3)
        assert artifact.parameters > 10_000
        if artifact.precision == "fp16":
            nearest = [item["max_abs"] for item in artifact.parity["nearest_overflow"]]
            assert len(nearest) == 3
            assert nearest == sorted(nearest, reverse=True)


def test_an_unchanged_checkpoint_is_up_to_date_and_torch_is_not_asked(
    bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "load_pipeline", lambda checkpoint: pytest.fail("loaded"))
    before = contents(bundle)
    lines = export_checkpoint(tiny_checkpoint, bundle)
    assert {line.status for line in lines} == {"up to date"}
    assert len(lines) == 8
    assert contents(bundle) == before


def test_a_changed_weight_exports_its_component_again_and_says_so(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path, exports_from_bundle: Install
) -> None:
    def follow(name: str, model: ir.Model) -> None:
        if name == "vae_decoder":
            add_to(model, "decoder.conv_in.bias", 0.5)

    exports_from_bundle(follow)
    edited = edit_weight(tiny_checkpoint, tmp_path)
    before = load_manifest(bundle)
    lines = export_checkpoint(edited, bundle, precisions=["fp32"])
    status = {line.artifact.component: (line.status, line.reason) for line in lines}
    assert status["unet"] == ("up to date", "")
    assert status["vae_decoder"] == ("exported", f"changed: source.{VAE}")
    after = load_manifest(bundle)
    assert after.files["vae_decoder/model.onnx"] != before.files["vae_decoder/model.onnx"]
    # The fp16 graphs are of the old weights: a bundle is one checkpoint.
    assert after.artifact("vae_decoder", "fp16") is None
    assert not (bundle / "vae_decoder/model.fp16.onnx").exists()
    assert after.artifact("unet", "fp16") == before.artifact("unet", "fp16")
    open_bundle(bundle).check()


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        ("tool", "changed: tools.torch"),
        ("damage", "expected"),
        ("force", "forced"),
        ("opset", "changed: options.opset"),
    ],
)
def test_other_causes_are_named_too(
    cause: str,
    reason: str,
    bundle: Path,
    tiny_checkpoint: Path,
    exports_from_bundle: Install,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exports_from_bundle()
    expected = {"fp32"} if cause != "damage" else set()
    if cause == "tool":
        real = export_plan.tool_versions
        monkeypatch.setattr(export_plan, "tool_versions", lambda *names: {**real(*names), "torch": "99"})
    if cause == "damage":
        graph = bundle / "unet/model.onnx"
        graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    lines = export_checkpoint(
        tiny_checkpoint, bundle, precisions=["fp32"], force=cause == "force", opset=18 if cause == "opset" else None
    )
    exported = [line for line in lines if line.status == "exported"]
    assert len(exported) == (4 if expected else 1)
    assert all(reason in line.reason for line in exported)
    open_bundle(bundle).check()


def test_a_wrong_weight_in_a_graph_fails_and_leaves_the_bundle_as_it_was(
    bundle: Path, tiny_checkpoint: Path, exports_from_bundle: Install
) -> None:
    def mutate(name: str, model: ir.Model) -> None:
        if name == "unet":
            add_to(model, "conv_in.weight", 0.1)

    exports_from_bundle(mutate)
    before = contents(bundle)
    with pytest.raises(ExportError, match=r"unet fp32: expected out_sample within relative L2 0.0001.*timestep"):
        export_checkpoint(tiny_checkpoint, bundle, force=True)
    assert contents(bundle) == before


def test_a_nan_in_a_graph_fails(bundle: Path, tiny_checkpoint: Path, exports_from_bundle: Install) -> None:
    def poison(name: str, model: ir.Model) -> None:
        if name == "text_encoder":
            add_to(model, "fc2.bias", np.nan)

    exports_from_bundle(poison)
    with pytest.raises(ExportError, match=r"text_encoder fp32.*NaN"):
        export_checkpoint(tiny_checkpoint, bundle, force=True)


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_or_ctrl_c_leaves_no_trace(
    error: BaseException,
    existing: bool,
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    exports_from_bundle: Install,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exports_from_bundle()
    monkeypatch.setattr(graph_builder, "save_onnx", failing(error))
    target = tmp_path / "made" / "x.bundle"
    if existing:
        shutil.copytree(tiny_bundle, target)
    before = contents(tmp_path)
    with pytest.raises(type(error)):
        export_checkpoint(tiny_checkpoint, target, force=True)
    assert contents(tmp_path) == before
    assert target.exists() == existing
    assert not list(target.glob(f"{staging.PREFIX}*"))


def test_no_permission_is_the_systems_error_and_nothing_is_made(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write anywhere, so the system's answer is played.
    monkeypatch.setattr(os, "mkdir", failing(PermissionError(errno.EACCES, "Permission denied", str(tmp_path))))
    with pytest.raises(PermissionError):
        export_checkpoint(tiny_checkpoint, tmp_path / "x.bundle")


@pytest.mark.parametrize("what", ["a file", "other files", "the checkpoint", "inside the checkpoint"])
def test_a_bundle_path_that_is_something_else_is_refused(what: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "x"
    if what == "a file":
        target.write_text("mine")
    elif what == "other files":
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
    else:
        target = tiny_checkpoint / ("sub" if what.startswith("inside") else "")
    with pytest.raises(UsageError, match="expected a"):
        export_checkpoint(tiny_checkpoint, target)


@pytest.mark.parametrize("precisions", [["int8"], ["fp32", "half"], []])
def test_an_unknown_precision_is_a_usage_error(precisions: list[str], tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fp32, fp16"):
        export_checkpoint(tiny_checkpoint, tmp_path / "x", precisions=precisions)
    assert not (tmp_path / "x").exists()


def test_a_damaged_checkpoint_leaves_the_bundle_alone(bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    (copy / VAE).write_bytes((copy / VAE).read_bytes()[:1000])
    before = contents(bundle)
    with pytest.raises(ArtifactError, match="truncated"):
        export_checkpoint(copy, bundle, force=True)
    assert contents(bundle) == before


@pytest.mark.parametrize("graph_changes", [True, False])
def test_an_engine_of_a_replaced_graph_goes_with_it(
    graph_changes: bool, bundle: Path, tiny_checkpoint: Path, exports_from_bundle: Install
) -> None:
    for name in ("unet/engines/a.engine", "unet/engines/a.json"):
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_bytes(b"engine")
    record = EngineRecord(
        "unet", "fp32", "unet/engines/a.engine", "unet/engines/a.json", "k", "tensorrt_rtx", ("sm89",)
    )
    files = {name: record_of(bundle / name) for name in (record.path, record.sidecar)}
    update_manifest(bundle, lambda m: dataclasses.replace(m, files={**m.files, **files}, engines=(record,)))

    def rename(name: str, model: ir.Model) -> None:
        model.graph.name = "another" if graph_changes else model.graph.name

    exports_from_bundle(rename)
    export_checkpoint(tiny_checkpoint, bundle, precisions=["fp32"], force=True)
    assert (load_manifest(bundle).engines == ()) == graph_changes
    assert (bundle / record.path).exists() != graph_changes
    open_bundle(bundle).check()


# Runs an export with the shared bundle's graphs in place of torch.onnx's; "kill" dies while files are being moved.
SCRIPT = """
import os, pathlib, signal, sys
import onnx_ir as ir
from latentrt.export import graph_builder, staging
from latentrt.export.exporter import export_checkpoint
checkpoint, graphs, bundle, mode = sys.argv[1:]
def load(component, *, opset):
    model = ir.load(pathlib.Path(graphs) / component.spec.name / "model.onnx")
    model.graph.name = "again"
    return model
graph_builder.to_onnx = load
if mode == "kill":
    moves, replace = [], os.replace
    def dying(source, target):
        if staging.PREFIX in str(source):
            moves.append(target)
            if len(moves) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    staging.os.replace = dying
lines = export_checkpoint(pathlib.Path(checkpoint), pathlib.Path(bundle), precisions=["fp32"], force=True)
print(len(lines))
"""


def start(checkpoint: Path, graphs: Path, bundle: Path, mode: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCRIPT, str(checkpoint), str(graphs), str(bundle), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


@pytest.mark.parametrize("existing", [True, False])
def test_kill_while_moving_leaves_a_manifest_that_tells_the_truth_and_the_next_run_repairs(
    existing: bool,
    tiny_bundle: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    exports_from_bundle: Install,
) -> None:
    target = tmp_path / "x.bundle"
    if existing:
        shutil.copytree(tiny_bundle, target)
    process = start(tiny_checkpoint, tiny_bundle, target, "kill")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(target.glob(f"{staging.PREFIX}*"))
    left = load_manifest(target)
    open_bundle(target).check()
    assert left.artifact("unet", "fp32") is None
    exports_from_bundle()
    export_checkpoint(tiny_checkpoint, target, precisions=["fp32"])
    open_bundle(target).check()
    assert len([a for a in load_manifest(target).artifacts if a.precision == "fp32"]) == 4
    assert not list(target.glob(f"{staging.PREFIX}*"))


def test_two_exports_into_one_bundle_at_once_both_succeed(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "x.bundle"
    both = [start(tiny_checkpoint, tiny_bundle, target, "run") for _ in range(2)]
    for process in both:
        process.communicate()
    assert [process.returncode for process in both] == [0, 0]
    assert len(load_manifest(target).artifacts) == 4
    open_bundle(target).check()
    assert not list(target.glob(f"{staging.PREFIX}*"))


def test_a_staging_folder_in_use_is_not_taken_for_stale(tmp_path: Path) -> None:
    with staging.staging_folder(tmp_path / "b") as first:
        with staging.staging_folder(tmp_path / "b") as second:
            assert first.is_dir()
            assert second.is_dir()
        assert first.is_dir()
        assert not second.exists()
    assert not (tmp_path / "b").exists()


def test_stale_folders_of_dead_processes_are_removed(tiny_bundle: Path, bundle: Path) -> None:
    dead = bundle / f"{staging.PREFIX}dead"
    (dead / "unet").mkdir(parents=True)
    (dead / "unet/model.onnx").write_bytes(b"half")
    (dead / staging.OWNER).touch()
    with staging.staging_folder(bundle):
        assert not dead.exists()


def test_a_tokenizer_file_that_the_checkpoint_no_longer_has_goes(bundle: Path, tiny_checkpoint: Path) -> None:
    (bundle / "tokenizer/added_tokens.json").write_text("{}")
    manifest = load_manifest(bundle)
    record = record_of(bundle / "tokenizer/added_tokens.json")
    save_manifest(
        bundle, dataclasses.replace(manifest, files={**manifest.files, "tokenizer/added_tokens.json": record})
    )
    export_checkpoint(tiny_checkpoint, bundle)
    assert not (bundle / "tokenizer/added_tokens.json").exists()
    assert "tokenizer/added_tokens.json" not in load_manifest(bundle).files
