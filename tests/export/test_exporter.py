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

import numpy as np
import onnx_ir as ir
import pytest
from exports import VAE, contents, edited, failing, hidden, watch_builds
from families import controlnet
from tiny import COMPONENTS

from latentrt.export import export_plan, export_run, graph_builder, graph_files, staging
from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.exporter import export_checkpoint
from latentrt.export.tool_versions import tool_versions
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.cli import main
from latentrt.runtime.errors import ArtifactError, ExportError, UsageError
from latentrt.runtime.manifest import EngineRecord, load_manifest, record_of, save_manifest, update_manifest

Install = Callable[..., None]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny.bundle"))


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
    assert contents(tiny_bundle).keys() - {"manifest.json"} == set(manifest.files)
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
        assert artifact.parity["check"] == "full"
        assert all(figures.keys() == {"max_abs", "relative_l2", "psnr_db"} for figures in cases.values())
        worst = artifact.parity["worst_relative_l2"]
        assert worst == max(figures["relative_l2"] for figures in cases.values())
        assert 0 < worst <= (1e-5 if artifact.precision == "fp32" else 5e-3)
        assert artifact.parameters > 10_000
        if artifact.precision == "fp16":
            nearest = [item["max_abs"] for item in artifact.parity["nearest_overflow"]]
            assert len(nearest) == 10
            assert nearest == sorted(nearest, reverse=True)
            assert artifact.parity["ran"] is True
            assert artifact.parity["casts"] > 0


def test_an_unchanged_checkpoint_is_up_to_date_and_torch_is_not_asked(
    bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_run, "make_graphs", failing(AssertionError("made")))
    before = contents(bundle)
    lines = export_checkpoint(tiny_checkpoint, bundle)
    assert {line.status for line in lines} == {"up to date"}
    assert len(lines) == 8
    assert contents(bundle) == before


def test_what_is_up_to_date_needs_no_torch(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = shutil.copytree(tiny_bundle, tmp_path / "tiny.bundle")
    code = (
        "import pathlib, sys; from latentrt.export.exporter import export_checkpoint; "
        "export_checkpoint(*map(pathlib.Path, sys.argv[1:])); assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_checkpoint), str(target)], check=True)


def test_a_changed_weight_exports_its_component_again_and_says_so(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path, exports_from_bundle: Install
) -> None:
    def follow(name: str, model: ir.Model) -> None:
        if name == "vae_decoder":
            add_to(model, "decoder.conv_in.bias", 0.5)

    exports_from_bundle(follow)
    checkpoint = edited(tiny_checkpoint, tmp_path / "edited", "decoder.conv_in.bias", lambda bias: bias + 0.5)
    before = load_manifest(bundle)
    lines = export_checkpoint(checkpoint, bundle, precisions=["fp32"])
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
        monkeypatch.setattr(export_plan, "tool_versions", lambda *names: {**tool_versions(*names), "torch": "99"})
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


def test_fp16_and_mixed_of_one_component_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected fp16 or mixed, got both"):
        export_checkpoint(tiny_checkpoint, tmp_path / "x", precisions=["fp16", "mixed"])
    with pytest.raises(UsageError, match="check: expected one of auto, full, quick, none, got 'some'"):
        export_checkpoint(tiny_checkpoint, tmp_path / "x", check="some")
    assert not (tmp_path / "x").exists()


def test_fp16_that_would_overflow_is_made_mixed(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = edited(tiny_checkpoint, tmp_path / "wide", "decoder.conv_in.weight", lambda weight: weight * 1e5)
    lines = {line.artifact.component: line for line in export_checkpoint(wide, bundle, precisions=["fp16"])}
    assert lines["unet"].status == "up to date"
    decoder = lines["vae_decoder"].artifact
    assert (decoder.precision, decoder.path) == ("mixed", "vae_decoder/model.mixed.onnx")
    assert decoder.inputs["precision"] == "fp16"
    assert decoder.parity["nearest_overflow"][0]["max_abs"] > 65504
    assert decoder.parity["nearest_overflow"][0]["tensor"] in decoder.parity["kept"]
    assert lines["vae_encoder"].artifact.precision == "fp16"
    assert not (bundle / "vae_decoder/model.fp16.onnx").exists()
    before = contents(bundle)
    with monkeypatch.context() as patch:
        patch.setattr(export_run, "make_graphs", failing(AssertionError("made")))
        lines_again = export_checkpoint(wide, bundle, precisions=["fp16"])
    assert {line.status for line in lines_again} == {"up to date"}
    assert contents(bundle) == before
    export_checkpoint(tiny_checkpoint, bundle, precisions=["fp16"])
    manifest = load_manifest(bundle)
    assert [a.precision for a in manifest.artifacts if a.component == "vae_decoder"] == ["fp16"]
    assert not (bundle / "vae_decoder/model.mixed.onnx").exists()


def test_bf16_is_compared_and_does_not_run(bundle: Path, tiny_checkpoint: Path) -> None:
    lines = export_checkpoint(tiny_checkpoint, bundle, precisions=["bf16"])
    assert [line.artifact.component for line in lines] == list(COMPONENTS)
    for line in lines:
        assert line.artifact.path == f"{line.artifact.component}/model.bf16.onnx"
        assert line.artifact.parity["ran"] is False
        assert 1e-4 < line.artifact.parity["worst_relative_l2"] <= 8e-2
        assert "kept" not in line.artifact.parity
    assert {line.status for line in export_checkpoint(tiny_checkpoint, bundle, precisions=["bf16"])} == {"up to date"}
    assert len(load_manifest(bundle).artifacts) == 12
    open_bundle(bundle).check()


def test_the_unet_for_controlnets_reads_the_unets_weights(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the U-Net is in the bundle already, and when it is made in the same run."""
    monkeypatch.setattr(graph_files, "EXTERNAL_DATA_BYTES", 0)
    target = tmp_path / "x.bundle"
    export_checkpoint(tiny_checkpoint, target, precisions=["fp32"])
    checkpoint = open_checkpoint(tiny_checkpoint, controlnets=[controlnet(tmp_path / "controlnet")])
    bundles = []
    for force in (False, True):
        with monkeypatch.context() as patch:
            made = watch_builds(patch)
            lines = export_checkpoint(checkpoint, target, precisions=["fp32"], force=force)
        assert (("unet", "fp32") in made) == force
        files = {line.artifact.component: line.artifact.files for line in lines}
        assert files["unet"] == ("unet/model.onnx", "unet/model.onnx_data")
        assert files["unet_control"] == ("unet/control.onnx", "unet/model.onnx_data")
        assert files["controlnet"] == ("controlnet/model.onnx", "controlnet/model.onnx_data")
        open_bundle(target).check()
        assert hidden(target) == []
        bundles.append(contents(target))
    assert bundles[0] == bundles[1]
    assert {name for name in bundles[0] if name.startswith("unet/")} == {
        f"unet/{name}" for name in ("config.json", "control.onnx", "model.onnx", "model.onnx_data")
    }
    # An export without the ControlNet lets it stay as long as the U-Net is the same.
    export_checkpoint(tiny_checkpoint, target, precisions=["fp32"])
    assert load_manifest(target).artifact("unet_control", "fp32") is not None


def test_progress_goes_from_nothing_to_all(bundle: Path, tiny_checkpoint: Path) -> None:
    said: list[tuple[str, float]] = []
    export_checkpoint(
        tiny_checkpoint,
        bundle,
        uint8_vae=True,
        prompt_keys=True,
        report=lambda message, share: said.append((message, share)),
    )
    shares = [share for _, share in said]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert [message for message, share in said if 0 < share < 1] == [
        "unet_prompt and unet_cached: fp32",
        "vae_decoder_uint8: fp16",
        "vae_decoder_uint8: fp32",
    ]
    assert said[-1][0] == "moving the graphs into place"


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


# Runs an export that takes the shared bundle's graphs, renamed, in place of making some, so that torch is not imported.
# "kill" dies while files are being moved.
SCRIPT = """
import dataclasses, os, pathlib, shutil, signal, sys, types
import onnx_ir as ir
from latentrt.export import staging
from latentrt.export.exporter import export_checkpoint
from latentrt.runtime.latent_preview import LATENT_RGB_FILE
from latentrt.runtime.manifest import load_manifest
checkpoint, graphs, bundle = map(pathlib.Path, sys.argv[1:4])
def make_graphs(order):
    built = {}
    for plan in order["planned"]:
        artifact = load_manifest(graphs).artifact(plan.component, plan.precision)
        model = ir.load(graphs / artifact.path)
        model.graph.name = "again"
        path = order["folder"] / artifact.path
        path.parent.mkdir(exist_ok=True)
        ir.save(model, path)
        artifact = dataclasses.replace(artifact, key=plan.key, inputs=plan.inputs)
        built[plan.component, plan.precision] = artifact, 0.1
    shutil.copy(graphs / LATENT_RGB_FILE, order["folder"] / LATENT_RGB_FILE)
    return built
run = types.ModuleType("latentrt.export.export_run")
run.Order, run.make_graphs = dict, make_graphs
sys.modules[run.__name__] = run
if sys.argv[4] == "kill":
    moves, replace = [], os.replace
    def dying(source, target):
        if staging.PREFIX in str(source):
            moves.append(target)
            if len(moves) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    staging.os.replace = dying
print(len(export_checkpoint(checkpoint, bundle, precisions=["fp32"], force=True)))
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


def test_without_a_check_the_bytes_are_the_same_and_it_is_said(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of graphs that passed before; and what was not compared is so as soon as that is asked for."""
    unchecked, cache = tmp_path / "unchecked.bundle", tmp_path / "cache"
    command = ["export", str(tiny_checkpoint), "-o", str(unchecked), "--precision", "fp16", "--check", "none"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTRT_CACHE", str(cache))
        assert main(command) == 2
        assert "to have passed a full check" in " ".join(capsys.readouterr().err.split())
        assert not unchecked.exists()
    assert main(command) == 0
    assert "unet fp16: not compared" in capsys.readouterr().out
    made, compared = load_manifest(unchecked), load_manifest(bundle)
    assert {name for name in made.files if name.endswith((".onnx", ".json"))} <= compared.files.keys()
    for name, record in made.files.items():
        assert compared.files[name] == record, name
    assert [artifact.parity for artifact in made.artifacts] == [{"check": "none"}] * 4
    assert {
        line.status for line in export_checkpoint(tiny_checkpoint, unchecked, precisions=["fp16"], check="none")
    } == {"up to date"}
    lines = export_checkpoint(tiny_checkpoint, unchecked, precisions=["fp16"])
    assert {line.reason for line in lines} == {"not compared yet"}
    assert all(0 < line.artifact.parity["worst_relative_l2"] < 1e-2 for line in lines)


def test_graphs_made_from_others_are_always_compared(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"check: expected quick, full or auto with vae_decoder_uint8, got none"):
        export_checkpoint(tiny_checkpoint, tmp_path / "b", precisions=["fp16"], check="none", uint8_vae=True)
