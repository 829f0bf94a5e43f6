"""Engines of graphs with QuantizeLinear and DequantizeLinear: ours, and those that others write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from engine_bundle import make_bundle, put_graph, unet_graph
from onnx import helper, numpy_helper

from latentrt.calibrate.layer_quant import LayerQuant
from latentrt.calibrate.quantize_pass import QuantizePass
from latentrt.export.build_options import BuildOptions, wanted_components
from latentrt.export.engine_jobs import build_engines
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.cache_folder import VARIABLE
from latentrt.runtime.cli import main
from latentrt.runtime.errors import BuildError, UsageError
from latentrt.runtime.machine import Machine, probe_machine
from latentrt.runtime.manifest import load_manifest, save_manifest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'latentrt[tensorrt-rtx]'")

NO_GPU = Machine(packages=probe_machine().packages, why_no_gpu="tests build ahead of time", platform="linux_x86_64")
LAYERS = ("conv_in.weight", "conv_out.weight", "to_k.weight")


def ours(kind: Any, scale: float | None = 0.02) -> Any:
    """Weights stored quantized, one pair for each input that has a scale."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(unet_graph()))
    QuantizePass({name: LayerQuant(scale=scale, kind=kind) for name in LAYERS})(model)
    return ir.to_proto(model)


def elsewhere() -> Any:
    """As modelopt.onnx and ONNX Runtime's `AddQDQPairToWeight` write it: weights stay floats before their own pair."""
    model = unet_graph()
    graph, nodes = model.graph, []
    scale = numpy_helper.from_array(np.array(0.02, np.float16), "scale")
    zero = numpy_helper.from_array(np.array(0, np.int8), "zero")
    for node in graph.node:
        if node.op_type in ("Conv", "MatMul"):
            for index, name in enumerate(node.input):
                pair = [name, f"{node.name}.{index}.q", f"{node.name}.{index}.dq"]
                nodes.append(helper.make_node("QuantizeLinear", [pair[0], "scale", "zero"], [pair[1]]))
                nodes.append(helper.make_node("DequantizeLinear", [pair[1], "scale", "zero"], [pair[2]]))
                node.input[index] = pair[2]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend([scale, zero])
    onnx.checker.check_model(model)
    return model


def bundle_with(folder: Path, precision: str, unet: Any) -> Path:
    """The tiny bundle with a U-Net in another precision."""
    bundle = make_bundle(folder / "b")
    save_manifest(bundle, put_graph(bundle, "unet", precision, unet, load_manifest(bundle)))
    return bundle


def build(bundle: Path, **options: Any) -> Any:
    asked = BuildOptions(**{"target": "sm89", "size": "64", "components": ("unet",), "cache": "off", **options})
    return build_engines(bundle, asked, machine=NO_GPU)


@pytest.mark.parametrize(
    ("graph", "precision", "dtype"),
    [
        (lambda: ours("int8"), "int8", "Int8"),
        (lambda: ours("fp8"), "fp8", "Fp8"),
        (lambda: ours("int8", None), "int8w", "Int8w"),
        (elsewhere, "int8", "Int8"),
    ],
    ids=["ours int8", "ours fp8", "ours int8w", "elsewhere"],
)
def test_its_layers_are_read_back_as_quantized(tmp_path: Path, graph: Any, precision: str, dtype: str) -> None:
    (result,) = build(bundle_with(tmp_path, precision, graph()), precision=precision)
    sidecar = result.sidecar
    assert (sidecar.component, sidecar.precision) == ("unet", precision)
    assert sidecar.precisions.share(dtype) == 1.0
    assert sidecar.flops == {dtype: 1.0}
    report = json.loads((tmp_path / "b" / "unet/engines" / str(sidecar.layer_report)).read_text())
    assert {layer["precision"] for layer in report["layers"]} == {dtype}


def test_an_engine_asked_as_int8_that_has_none_is_refused(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path, "int8", unet_graph())
    with pytest.raises(BuildError, match=r"expected an int8 engine .* got Half 100\.0%.* Calibrate again"):
        build(bundle, precision="int8")
    assert load_manifest(bundle).engines == ()


@pytest.mark.parametrize(("precision", "scale", "found"), [("int8", None, "Int8w"), ("int8w", 0.02, "Int8")])
def test_int8_weights_and_int8_layers_are_not_the_same(
    tmp_path: Path, precision: str, scale: float | None, found: str
) -> None:
    bundle = bundle_with(tmp_path, precision, ours("int8", scale))
    with pytest.raises(BuildError, match=rf"got {found} 100\.0%"):
        build(bundle, precision=precision)


def test_beside_it_the_others_are_built_in_half_precision(tmp_path: Path) -> None:
    bundle = bundle_with(tmp_path, "int8", ours("int8"))
    wanted = wanted_components(open_bundle(bundle), BuildOptions(precision="int8"))
    assert wanted == {"text_encoder": "fp16", "unet": "int8", "vae_decoder": "fp16"}


@pytest.mark.parametrize("refit", ["lora", "all"])
def test_its_weights_cannot_be_replaced(tmp_path: Path, refit: str) -> None:
    with pytest.raises(UsageError, match=r"unet: .* got int8: new weights need new scales.*--lora"):
        build(bundle_with(tmp_path, "int8", ours("int8")), precision="int8", refit=refit)


def test_it_is_planned_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    bundle = bundle_with(tmp_path, "int8", ours("int8"))
    command = ["plan", str(bundle), "--precision", "int8", "--size", "64", "--flavour", "tensorrt_rtx", "--json"]
    assert main(command) == 0
    before = json.loads(capsys.readouterr().out)
    planned = {part["component"]: part for part in before["components"]}
    assert {name: part["precision"] for name, part in planned.items()} == {
        "text_encoder": "fp16",
        "unet": "int8",
        "vae_decoder": "fp16",
    }
    # Seven more streams than the first, with a workspace each, are the builder's to take.
    sides = {name: part["estimated_side_bytes"] for name, part in planned.items()}
    assert sides == {"text_encoder": 0, "unet": 7 * 8_192_000, "vae_decoder": 0}
    (note,) = (note for note in before["notes"] if "side by side" in note)
    assert "unet int8: up to 57 MB" in note
    (built,) = build(bundle, precision="int8")
    assert main(command) == 0
    after = json.loads(capsys.readouterr().out)
    unet = next(part for part in after["components"] if part["component"] == "unet")
    assert unet["activation_bytes"] == built.sidecar.activation_bytes <= planned["unet"]["activation_bytes"]
    assert abs(unet["estimate_error"]) < 0.05
    assert not [note for note in after["notes"] if "side by side" in note]
