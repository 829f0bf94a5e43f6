"""`latentrt optimize --target cpu --precision int8`: the graph of a calibration as the CPU's kernels want it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from small_bundle import small_plan, small_source, write_bundle
from small_graphs import counts

from latentrt.calibrate.apply import apply_plan
from latentrt.calibrate.quantized_graphs import probe_feeds
from latentrt.export.optimizer import optimize_bundle
from latentrt.export.parity import Case
from latentrt.export.quantized_on_cpu import QuantizedOnCpuPass
from latentrt.runtime.backends import choose_graph, open_session
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.errors import ExportError, UsageError
from latentrt.runtime.manifest import Manifest, check_files, load_manifest
from latentrt.runtime.session import OnnxSession

PLAIN, FAST = "unet/model.int8.cpu.onnx", "unet/model.int8.cpu-kernels.onnx"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a plan applied. Tests copy it."""
    folder = write_bundle(tmp_path_factory.mktemp("calibrated"))
    apply_plan(small_source(folder), small_plan(small_source(folder)))
    return folder


@pytest.fixture
def bundle(calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, whose networks are given noise: they cannot draw."""

    def noise(path: Path, manifest: Manifest) -> dict[str, list[Case]]:
        feeds = probe_feeds(OnnxSession(path / PLAIN).spec)
        return {"unet": [Case("noise", feeds, {})]}

    monkeypatch.setattr("latentrt.export.optimizer.bundle_cases", noise)
    return Path(shutil.copytree(calibrated, tmp_path / "small.bundle"))


def test_it_gives_the_same_bits_and_is_what_the_cpu_takes(bundle: Path) -> None:
    before = load_manifest(bundle)
    (line,) = optimize_bundle(bundle, ["cpu"], precision="int8")
    assert (line.artifact.path, line.artifact.target, line.status) == (FAST, "cpu-kernels", "optimized")
    manifest = load_manifest(bundle)
    check_files(bundle, manifest, manifest.files)
    # The graph of the calibration stays, its figures are the new one's, and engines are built from TensorRT's.
    assert [a for a in manifest.artifacts if a.target != "cpu-kernels"] == list(before.artifacts)
    plain = manifest.artifact("unet", "int8", "cpu")
    assert plain is not None
    assert line.artifact.parity == {**plain.parity, "identical_cases": 1}
    feeds = probe_feeds(OnnxSession(bundle / PLAIN).spec)
    sessions = [OnnxSession(bundle / path, optimize=False) for path in (PLAIN, FAST)]
    exact, found = (session(feeds)["out_sample"].astype(np.float32) for session in sessions)
    np.testing.assert_array_equal(found, exact)
    stored, fast = (ir.load(bundle / path) for path in (PLAIN, FAST))
    # Three weights of convolutions are floats again; those of the two products, and four tensors, stay rounded.
    assert counts(stored)["DequantizeLinear"] - counts(fast)["DequantizeLinear"] == 3
    assert {node.outputs[0].dtype for node in fast.graph if node.op_type == "QuantizeLinear"} == {ir.DataType.UINT8}
    opened = open_bundle(bundle)
    assert choose_graph(opened, "unet", "int8", backend="onnxruntime").target == "cpu-kernels"
    run = open_session(opened, "unet", "int8", backend="onnxruntime")(feeds)["out_sample"]
    np.testing.assert_allclose(run.astype(np.float32), exact, atol=1e-3)
    assert optimize_bundle(bundle, ["cpu"], precision="int8")[0].status == "up to date"


def test_a_new_plan_takes_it_away(bundle: Path) -> None:
    optimize_bundle(bundle, ["cpu"], precision="int8")
    source = small_source(bundle)
    apply_plan(source, small_plan(source, corrections={}))
    assert load_manifest(bundle).artifact("unet", "int8", "cpu-kernels") is None
    assert not (bundle / FAST).exists()
    assert choose_graph(open_bundle(bundle), "unet", "int8", backend="onnxruntime").target == "cpu"


def test_one_that_differs_by_a_bit_changes_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(QuantizedOnCpuPass):
        def call(self, model: ir.Model) -> ir.passes.PassResult:
            result = super().call(model)
            bias = model.graph.initializers["conv2.bias"]
            assert bias.const_value is not None
            bias.const_value = ir.tensor(np.nextafter(bias.const_value.numpy(), np.float32(9)), name=bias.name)
            return result

    monkeypatch.setattr("latentrt.export.ort_targets.QuantizedOnCpuPass", Wrong)
    before = load_manifest(bundle)
    with pytest.raises(ExportError, match=r"out_sample to be model\.int8\.cpu\.onnx's, bit for bit.*case 'noise'"):
        optimize_bundle(bundle, ["cpu"], precision="int8")
    assert load_manifest(bundle) == before
    assert not (bundle / FAST).exists()


@pytest.mark.parametrize(("precision", "remedy"), [("fp8", "calibrate .* --precision fp8"), ("fp16", "for cpu, got")])
def test_what_was_not_calibrated_is_said(bundle: Path, precision: str, remedy: str) -> None:
    with pytest.raises(UsageError, match=remedy):
        optimize_bundle(bundle, ["cpu"], precision=precision)
