from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from exports import edited
from tiny import COMPONENTS

from latentrt.export.bundle_update import _staying
from latentrt.export.exporter import export_checkpoint
from latentrt.export.optimizer import optimize_bundle
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.manifest import Artifact, FileRecord, load_manifest

SPLIT = {("unet_prompt", "fp32", ""), ("unet_cached", "fp32", "")}
PICTURES = ("vae_decoder_uint8", "fp32", "")


def graphs(bundle: Path) -> set[tuple[str, str, str]]:
    return {(a.component, a.precision, a.target) for a in load_manifest(bundle).artifacts}


def half(found: set[tuple[str, str, str]]) -> set[tuple[str, str, str]]:
    return {(component, "fp16", target) for component, _, target in found}


@pytest.fixture(scope="module")
def full(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with everything that is made from its graphs. Shared: copy it before changing anything."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("full") / "tiny.bundle"))
    export_checkpoint(tiny_checkpoint, bundle, uint8_vae=True, prompt_keys=True)
    optimize_bundle(bundle, ["cpu"])
    return bundle


@pytest.fixture
def bundle(full: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(full, tmp_path / "tiny.bundle"))


def check_files(bundle: Path) -> None:
    """All files are whole and named, and nothing else is there."""
    open_bundle(bundle).check()
    manifest = load_manifest(bundle)
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert found - {".lock", "manifest.json"} == manifest.files.keys()
    graphs = {name for artifact in manifest.artifacts for name in artifact.files}
    assert {name for name in manifest.files if ".onnx" in name} == graphs


@pytest.mark.parametrize(("held", "made"), [("fp16", "mixed"), ("mixed", "fp16")])
def test_a_graph_takes_the_place_of_what_was_asked_for_by_the_same_name(held: str, made: str) -> None:
    """Of the same weights, by other tools: a later version may find that more overflows, or less."""

    def artifact(precision: str, asked: str) -> Artifact:
        path = f"unet/model.{precision}.onnx"
        return Artifact("unet", precision, path, (path,), 20, "", {"precision": asked, "source": {}}, {}, 1)

    old, other, new = artifact(held, "fp16"), artifact("bf16", "bf16"), artifact(made, "fp16")
    before = {name: FileRecord("0", 1) for a in (old, other) for name in a.files}
    staged = {name: FileRecord("1", 1) for name in new.files}
    assert _staying([old, other], before, [new], staged, {"unet": {}}) == ([other], [])


def test_other_weights_take_what_was_made_from_the_old_ones_along(
    bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    before = graphs(bundle)
    of_decoder = {("vae_decoder", "fp32", "cpu"), PICTURES}
    assert {*SPLIT, *half(SPLIT), *of_decoder, *half({PICTURES}), ("unet", "fp32", "cpu")} < before
    checkpoint = edited(tiny_checkpoint, tmp_path / "other", "decoder.conv_in.bias", lambda bias: bias + 0.5)
    export_checkpoint(checkpoint, bundle, precisions=["fp16"])
    encoder = {("vae_encoder", "fp32", ""), ("vae_encoder", "fp32", "cpu")}
    gone = {*of_decoder, PICTURES, *half({PICTURES}), ("vae_decoder", "fp32", ""), *encoder}
    # Graphs for a target of what was made from the old decoder.
    gone |= {identity for identity in before if identity[0] == "vae_decoder_uint8"}
    assert graphs(bundle) == before - gone
    check_files(bundle)


def test_another_graph_of_the_same_weights_does_too(
    bundle: Path, tiny_checkpoint: Path, exports_from_bundle: Callable[..., None]
) -> None:
    def rename(name: str, model: ir.Model) -> None:
        if name == "unet":
            model.graph.name = "another"

    exports_from_bundle(rename)
    before = graphs(bundle)
    export_checkpoint(tiny_checkpoint, bundle, precisions=["fp32"], force=True)
    made_from_unet = {identity for identity in before if identity[0].startswith("unet")} - {("unet", "fp32", "")}
    assert before - graphs(bundle) == {identity for identity in made_from_unet if identity[1] == "fp32"}
    check_files(bundle)


def test_the_same_graphs_again_leave_everything_in_place(bundle: Path, tiny_checkpoint: Path) -> None:
    before = load_manifest(bundle)
    lines = export_checkpoint(tiny_checkpoint, bundle, precisions=["fp32"], force=True)
    assert [line.artifact.component for line in lines if line.status == "exported"] == list(COMPONENTS)
    after = load_manifest(bundle)
    assert after.files == before.files
    assert graphs(bundle) == {(a.component, a.precision, a.target) for a in before.artifacts}


def test_what_is_made_from_a_damaged_graph_waits_for_it(
    bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_manifest(bundle)
    for name in ("unet/model.onnx", "unet/prompt.onnx"):
        (bundle / name).write_bytes((bundle / name).read_bytes()[:-1])
    lines = export_checkpoint(tiny_checkpoint, bundle, uint8_vae=True, prompt_keys=True)
    made = {(line.artifact.component, line.artifact.precision) for line in lines if line.status == "exported"}
    assert made == {("unet", "fp32"), ("unet_prompt", "fp32")}
    assert load_manifest(bundle).files == whole.files
    check_files(bundle)


def test_another_checkpoint_rebuilds_what_is_asked_for(bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    before = load_manifest(bundle)
    checkpoint = edited(tiny_checkpoint, tmp_path / "other", "decoder.conv_in.bias", lambda bias: bias + 0.5)
    lines: list[Any] = export_checkpoint(checkpoint, bundle, precisions=["fp32"], uint8_vae=True)
    reasons = {line.artifact.component: line.reason for line in lines}
    assert reasons["vae_decoder_uint8"] == "changed: source.vae/diffusion_pytorch_model.safetensors"
    assert reasons["unet"] == ""
    after = load_manifest(bundle)
    assert after.files["vae_decoder/uint8.onnx"] != before.files["vae_decoder/uint8.onnx"]
    assert after.artifact("vae_decoder_uint8", "fp16") is None
    check_files(bundle)
