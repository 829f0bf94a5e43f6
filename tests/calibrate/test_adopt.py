from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_bundle import network, small_plan, small_source, weights, write_bundle

from latentrt.calibrate.adopt import adopt_graph
from latentrt.calibrate.apply import apply_plan
from latentrt.calibrate.layer_quant import LayerQuant
from latentrt.calibrate.quantize_pass import QuantizePass
from latentrt.calibrate.quantized_graphs import probe_feeds
from latentrt.export.half_precision import HalfPrecisionPass
from latentrt.runtime.errors import ArtifactError, CalibrationError, UsageError
from latentrt.runtime.manifest import check_files, load_manifest
from latentrt.runtime.session import OnnxSession

QUANTS = {
    "conv1.weight": LayerQuant(4.5 / 127),
    "conv2.weight": LayerQuant(5 / 127),
    "conv_shortcut.weight": LayerQuant(5 / 127),
    "to_k.weight": LayerQuant(4.5 / 127),
    "to_v.weight": LayerQuant(4.5 / 127),
}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "small.bundle").mkdir()
    return write_bundle(tmp_path / "small.bundle")


def quantized(
    path: Path,
    edit: Callable[[ir.Model], object] = lambda model: None,
    quants: Mapping[str, LayerQuant] = QUANTS,
    **values: Any,
) -> Path:
    model = network({**weights(), **values})
    QuantizePass(quants)(model)
    edit(model)
    ir.save(model, path)
    return path


def quantized_by_onnxruntime(source: Path, path: Path, **options: Any) -> Path:
    """What ONNX Runtime's own quantizer makes of the graph."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.calls = iter([probe_feeds(OnnxSession(source).spec)])

        def get_next(self) -> Mapping[str, Any] | None:
            return next(self.calls, None)

    quantize_static(
        source,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        **options,
    )
    return path


SAFE = {
    "op_types_to_quantize": ["Conv", "MatMul"],
    "extra_options": {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "MatMulConstBOnly": True,
        "OpTypesToExcludeOutputQuantization": ["Conv", "MatMul"],
        "QDQDisableWeightAdjustForInt32Bias": True,
    },
}


def test_onnxruntimes_graph_is_taken_with_safe_options_and_refused_with_its_own(bundle: Path, tmp_path: Path) -> None:
    source = bundle / "unet/model.onnx"
    with pytest.raises(
        CalibrationError, match=r"expected Q/DQ as TensorRT takes it, got an int32 bias .*; a zero point"
    ):
        adopt_graph(bundle, "unet", quantized_by_onnxruntime(source, tmp_path / "own.onnx"), "int8")
    assert not [a for a in load_manifest(bundle).artifacts if a.precision == "int8"]
    adopted = adopt_graph(bundle, "unet", quantized_by_onnxruntime(source, tmp_path / "safe.onnx", **SAFE), "int8")
    assert adopted.placement.quantized == {"Conv": 3, "MatMul": 2}
    feeds = probe_feeds(OnnxSession(source).spec)
    answers: list[Any] = [OnnxSession(path)(feeds)["out_sample"] for path in (source, bundle / adopted.artifact.path)]
    wanted, found = answers
    distance = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert adopted.artifact.parity["worst_relative_l2"] == pytest.approx(distance, rel=0.02)
    manifest = load_manifest(bundle)
    check_files(bundle, manifest, manifest.files)
    assert manifest.artifact("unet", "int8") == adopted.artifact
    assert adopted.artifact.inputs["made_from"] == {"unet/model.onnx": manifest.files["unet/model.onnx"].sha256}


def test_a_float16_graph_is_given_the_inputs_and_outputs_of_the_bundle(bundle: Path, tmp_path: Path) -> None:
    def halve(model: ir.Model) -> None:
        HalfPrecisionPass()(model)
        for node in list(model.graph):
            # float16 from end to end, as ModelOpt leaves it.
            data = node.inputs[0]
            if node.op_type == "Cast" and data is not None and data.is_graph_input():
                data.dtype = ir.DataType.FLOAT16
                node.outputs[0].replace_all_uses_with(data)
                model.graph.remove(node, safe=True)
            elif node.op_type == "Cast" and node.outputs[0].is_graph_output() and data is not None:
                data.name, node.outputs[0].name = node.outputs[0].name, "gone"
                model.graph.outputs[0] = data
                model.graph.remove(node, safe=True)

    graph = quantized(tmp_path / "half.onnx", halve)
    made = OnnxSession(graph).spec
    assert {tensor.dtype for tensor in (*made.inputs, *made.outputs)} == {"float16"}
    adopted = adopt_graph(bundle, "unet", graph, "int8")
    spec = OnnxSession(bundle / adopted.artifact.path).spec
    assert spec == OnnxSession(bundle / "unet/model.onnx").spec
    assert adopted.artifact.parity["worst_relative_l2"] < 0.05


def test_it_takes_the_place_of_what_was_there(bundle: Path, tmp_path: Path) -> None:
    source = small_source(bundle)
    apply_plan(source, small_plan(source))
    adopt_graph(bundle, "unet", quantized(tmp_path / "graph.onnx"), "int8")
    manifest = load_manifest(bundle)
    assert [a.target for a in manifest.artifacts if a.precision == "int8"] == [""]
    assert not (bundle / "unet/model.int8.cpu.onnx").exists()
    assert apply_plan(source, small_plan(source)).reason == "new"


def renamed(model: ir.Model) -> None:
    model.graph.inputs[0].name = "latent"


def unrowed(model: ir.Model) -> None:
    model.graph.inputs[1].shape = ir.Shape([1])


def foreign(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.op_type == "Sigmoid")
    node.domain, model.opset_imports["com.microsoft"] = "com.microsoft", 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (renamed, r"expected inputs encoder_hidden_states, sample, timestep, got encoder_hidden_states, latent, time"),
        (unrowed, r"timestep: expected shape \[batch\], got \[1\]. .* a timestep for each row"),
        (foreign, "expected ONNX's own operators, got some of com.microsoft"),
    ],
)
def test_graphs_that_do_not_fit_are_refused(
    bundle: Path, tmp_path: Path, edit: Callable[[ir.Model], object], message: str
) -> None:
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(CalibrationError, match=message):
        adopt_graph(bundle, "unet", quantized(tmp_path / "graph.onnx", edit), "int8")
    assert (bundle / "manifest.json").read_bytes() == before


def test_weights_alone_are_a_precision_of_their_own(bundle: Path, tmp_path: Path) -> None:
    graph = quantized(tmp_path / "weights.onnx", quants=dict.fromkeys(QUANTS, LayerQuant(None)))
    with pytest.raises(CalibrationError, match=r"expected layers in int8, got int8 with inputs in floats\."):
        adopt_graph(bundle, "unet", graph, "int8")
    adopted = adopt_graph(bundle, "unet", graph, "int8w")
    assert (adopted.artifact.path, adopted.placement.quantized) == ("unet/model.int8w.onnx", {})
    with pytest.raises(CalibrationError, match=r"expected layers in int8w, got int8\."):
        adopt_graph(bundle, "unet", quantized(tmp_path / "both.onnx"), "int8w")


def test_other_networks_and_other_precisions_are_refused(bundle: Path, tmp_path: Path) -> None:
    graph = quantized(tmp_path / "graph.onnx")
    with pytest.raises(CalibrationError, match=r"expected layers in fp8, got int8\."):
        adopt_graph(bundle, "unet", graph, "fp8")
    with pytest.raises(CalibrationError, match=r"expected layers in int8, got nothing quantized\."):
        adopt_graph(bundle, "unet", bundle / "unet/model.onnx", "int8")
    other = weights(seed=5)
    with pytest.raises(CalibrationError, match="It is of another checkpoint, or its scales are wrong"):
        adopt_graph(bundle, "unet", quantized(tmp_path / "other.onnx", **other), "int8")
    with pytest.raises(UsageError, match="precision: expected one of int8, fp8, int8w, got 'int4'"):
        adopt_graph(bundle, "unet", graph, "int4")
    with pytest.raises(UsageError, match="vae_decoder"):
        adopt_graph(bundle, "vae_decoder", graph, "int8")
    (tmp_path / "text.onnx").write_text("no graph")
    for path in (tmp_path / "text.onnx", tmp_path / "none.onnx"):
        with pytest.raises(ArtifactError, match="expected an ONNX graph"):
            adopt_graph(bundle, "unet", path, "int8")
    onnx.checker.check_model(str(graph))
