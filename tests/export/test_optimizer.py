from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from ort_graphs import MICROSOFT
from tiny import COMPONENTS

from latentrt.export.bundle_cases import bundle_cases
from latentrt.export.optimizer import optimize_bundle
from latentrt.export.ort_fusions import fuse
from latentrt.export.ort_targets import NOT_ON_A_GPU
from latentrt.export.parity import Case
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.cli import main
from latentrt.runtime.errors import ArtifactError, ExportError, UsageError
from latentrt.runtime.manifest import Manifest, load_manifest, record_of, save_manifest
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.textual_inversion import TextualInversion


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny.bundle"))


@pytest.fixture(scope="module")
def optimized(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with graphs for both targets. Shared: copy it before changing anything."""
    path = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("optimized") / "tiny.bundle"))
    optimize_bundle(path, ["cpu", "cuda"])
    return path


def test_every_component_has_a_graph_for_each_target(optimized: Path) -> None:
    manifest = load_manifest(optimized)
    for component in COMPONENTS:
        for target, precision, bound in (("cpu", "fp32", 1e-5), ("cuda", "fp16", 1e-2)):
            artifact = manifest.artifact(component, precision, target)
            assert artifact is not None
            assert artifact.path == f"{component}/model.{precision}.{target}.onnx"
            assert artifact.parity["worst_relative_l2"] <= bound
            graph = ir.load(optimized / artifact.path).graph
            own = {node.op_type for node in graph if node.domain == MICROSOFT}
            assert own == artifact.parity["operators"].keys()
            assert artifact.parity.get("note") == (NOT_ON_A_GPU if target == "cuda" else None)
    assert main(["verify", str(optimized), "--json"]) == 0


def test_the_picture_is_the_same(tiny_bundle: Path, optimized: Path) -> None:
    wanted, found = (
        Pipeline.load(path, backend="onnxruntime")("red", steps=3, seed=1, width=64, height=64)
        for path in (tiny_bundle, optimized)
    )
    np.testing.assert_allclose(found.latents, wanted.latents, atol=1e-4)
    assert np.abs(found.images.astype(int) - wanted.images).max() <= 1


def test_textual_inversions_use_the_graph_that_they_can_edit(tiny_bundle: Path, optimized: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    word = TextualInversion(("mark",), {"": vectors}, "0" * 64)
    wanted, found, without = (
        Pipeline.load(path, backend="onnxruntime", textual_inversions=words)("a mark", steps=2, width=64, height=64)
        for path, words in ((tiny_bundle, [word]), (optimized, [word]), (optimized, []))
    )
    np.testing.assert_allclose(found.latents, wanted.latents, atol=1e-4)
    assert np.abs(without.latents - wanted.latents).max() > 1e-3


def test_what_is_up_to_date_is_kept(optimized: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(optimized, tmp_path / "again.bundle"))
    before = load_manifest(path)
    assert {line.status for line in optimize_bundle(path, ["cpu"])} == {"up to date"}
    assert load_manifest(path) == before
    damaged = path / "unet/model.fp32.cpu.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    lines = {line.artifact.component: line for line in optimize_bundle(path, ["cpu"])}
    assert {name for name, line in lines.items() if line.status == "optimized"} == {"unet"}
    assert "truncated" in lines["unet"].reason
    open_bundle(path).check()


def test_a_new_source_is_a_reason(optimized: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(optimized, tmp_path / "again.bundle"))
    source = path / "unet/model.onnx"
    model = ir.load(source)
    model.doc_string = "another"
    ir.save(model, source)
    manifest = load_manifest(path)
    files = {**manifest.files, "unet/model.onnx": record_of(source)}
    save_manifest(path, Manifest(**{**vars(manifest), "files": files}))
    lines = {line.artifact.component: line for line in optimize_bundle(path, ["cpu"])}
    assert lines["unet"].reason == "changed: made_from.unet/model.onnx"
    assert lines["vae_decoder"].status == "up to date"


def test_a_graph_that_computes_something_else_changes_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_manifest(bundle)

    def wrong(model: ir.Model, target: str) -> dict[str, int]:
        operators = fuse(model, target)
        for node in model.graph:
            if node.op_type == "MultiHeadAttention":
                node.attributes["scale"] = ir.AttrFloat32("scale", 0.01)
        return operators

    monkeypatch.setattr("latentrt.export.ort_targets.fuse", wrong)
    with pytest.raises(ExportError, match="fp32 for cpu"):
        optimize_bundle(bundle, ["cpu"])
    assert load_manifest(bundle) == before
    assert not list(bundle.rglob("*.cpu.onnx"))


def test_a_source_that_changes_meanwhile_is_not_paired(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(path: Path, manifest: Manifest) -> dict[str, list[Case]]:
        files = {**manifest.files, "unet/model.onnx": manifest.files["unet/config.json"]}
        save_manifest(path, Manifest(**{**vars(manifest), "files": files}))
        return bundle_cases(path, manifest)

    monkeypatch.setattr("latentrt.export.optimizer.bundle_cases", slow)
    with pytest.raises(ArtifactError, match="exported anew meanwhile"):
        optimize_bundle(bundle, ["cpu"])


@pytest.mark.parametrize(
    ("targets", "precision", "message"),
    [
        (["tpu"], None, "target: expected one or more of cpu, cuda, got 'tpu'"),
        (["cpu"], "fp16", "precision: expected one of fp32, int8, fp8, int8w for cpu, got 'fp16'"),
        (["cuda"], "mixed", "expected graphs in mixed, found none"),
    ],
)
def test_what_cannot_be_made_is_said(
    tiny_bundle: Path, targets: list[str], precision: str | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        optimize_bundle(tiny_bundle, targets, precision=precision)


def test_the_command(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimize", str(bundle), "--target", "cuda", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [line["component"] for line in report["artifacts"]] == list(COMPONENTS)
    unet = next(line for line in report["artifacts"] if line["component"] == "unet")
    assert unet["parity"]["operators"]["NhwcConv"] > 10
    assert unet["nodes"] < unet["source_nodes"]
    assert main(["optimize", str(bundle), "--target", "cuda"]) == 0
    assert "not run on a GPU" in capsys.readouterr().out
    assert main(["optimize", str(bundle), "--target", "tpu"]) == 2
