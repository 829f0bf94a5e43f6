from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_graphs import counts, model_of, run

from latentrt.calibrate.layer_quant import LayerQuant
from latentrt.calibrate.number_formats import LEAST_SCALE, half_scale, quantized, weight_scales
from latentrt.calibrate.quantize_pass import QuantizePass
from latentrt.export.half_precision import HalfPrecisionPass
from latentrt.runtime.errors import CalibrationError

RNG = np.random.default_rng(0)
CONV = (0.3 * RNG.standard_normal((6, 4, 3, 3))).astype(np.float32)
LEFT, RIGHT = (RNG.standard_normal((16, n)).astype(np.float32) / 4 for n in (8, 5))
TEXT = """
    net (float[b,4,h,w] sample, float[b,n,16] text) => (float[b,6,h,w] out, float[b,n,8] k, float[b,n,5] v) {
        out = Conv<pads=[1,1,1,1]>(sample, conv)
        k = MatMul(text, left)
        v = MatMul(text, right)
    }
"""
QUANTS = {"conv": LayerQuant(1 / 64), "left": LayerQuant(1 / 32), "right": LayerQuant(1 / 32)}
FEEDS = {
    "sample": RNG.standard_normal((2, 4, 5, 7)).astype(np.float32),
    "text": RNG.standard_normal((2, 3, 16)).astype(np.float32),
}


def net() -> ir.Model:
    return model_of(TEXT, {"conv": CONV, "left": LEFT, "right": RIGHT})


def fake(values: Any, scale: Any, low: int = -128) -> Any:
    """What eight bits leave of values, written anew."""
    scale = np.asarray(scale, np.float32)
    return np.clip(np.round(np.asarray(values, np.float32) / scale), low, 127) * scale


def convolved(x: Any, weight: Any) -> Any:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.einsum("bchwij,ocij->bohw", windows, weight)


def test_the_graph_computes_what_eight_bits_leave(tmp_path: Path) -> None:
    model = net()
    assert QuantizePass(QUANTS)(model).modified
    # One pair for the text, whoever reads it.
    assert counts(model) == {"QuantizeLinear": 2, "DequantizeLinear": 5, "Conv": 1, "MatMul": 2}
    found = run(model, tmp_path, FEEDS)
    x, text = (fake(FEEDS[name], scale) for name, scale in (("sample", 1 / 64), ("text", 1 / 32)))
    # By channel, the largest weight is 127 steps of a float16 that is not smaller.
    conv = np.stack([fake(w, half_scale(np.abs(w).max() / 127), -127) for w in CONV])
    np.testing.assert_allclose(found["out"], convolved(x, conv), rtol=1e-4, atol=1e-5)
    for name, weight in (("k", LEFT), ("v", RIGHT)):
        columns = np.stack([fake(w, half_scale(np.abs(w).max() / 127), -127) for w in weight.T], axis=1)
        np.testing.assert_allclose(found[name], text @ columns, rtol=1e-4, atol=1e-5)


def test_float32_and_float16_graphs_hold_the_same_integers_and_scales(tmp_path: Path) -> None:
    full, half = net(), net()
    QuantizePass(QUANTS)(full)
    QuantizePass(QUANTS)(half)
    HalfPrecisionPass()(half)
    for name, value in full.graph.initializers.items():
        ours, theirs = value.const_value, half.graph.initializers[name].const_value
        assert ours is not None
        assert theirs is not None
        np.testing.assert_array_equal(ours.numpy().astype(np.float64), theirs.numpy().astype(np.float64), err_msg=name)
        if name.endswith(".scale"):
            assert (ours.dtype, theirs.dtype) == (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    # Weights are stored as int8, and only so.
    assert {str(v.dtype) for n, v in half.graph.initializers.items() if n.endswith(".int8")} == {"INT8"}
    assert not {"conv", "left", "right"} & half.graph.initializers.keys()
    found = run(half, tmp_path, FEEDS)
    assert {value.dtype for value in half.graph.outputs} == {ir.DataType.FLOAT}
    assert np.isfinite(found["out"]).all()


def fake8(values: Any, scale: Any) -> Any:
    """What E4M3 leaves of values, by PyTorch's own conversion."""
    steps = torch.from_numpy(np.asarray(values, np.float32) / np.asarray(scale, np.float32)).clamp(-448, 448)
    return steps.to(torch.float8_e4m3fn).float().numpy() * np.asarray(scale, np.float32)


def test_fp8_computes_what_e4m3_leaves(tmp_path: Path) -> None:
    model = net()
    # The scales are small enough for values to be beyond the range: those have to be its ends, and not NaN.
    scales = {"conv": 1 / 256, "left": 1 / 512, "right": 1 / 512}
    QuantizePass({name: LayerQuant(scale, kind="fp8") for name, scale in scales.items()})(model)
    stored = {n: v.dtype for n, v in model.graph.initializers.items() if n.endswith((".fp8", ".zero_point"))}
    assert set(stored.values()) == {ir.DataType.FLOAT8E4M3FN}
    assert len(stored) == 5
    assert np.abs(FEEDS["sample"]).max() > 448 / 256
    found = run(model, tmp_path, FEEDS)
    x, text = (fake8(FEEDS[name], scale) for name, scale in (("sample", 1 / 256), ("text", 1 / 512)))
    conv, left, right = (fake8(w, half_scale(np.abs(w).max() / 448)) for w in (CONV, LEFT, RIGHT))
    np.testing.assert_allclose(found["out"], convolved(x, conv), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["k"], text @ left, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["v"], text @ right, rtol=1e-4, atol=1e-5)


def test_of_weights_alone_the_inputs_stay_as_they_are(tmp_path: Path) -> None:
    model = net()
    QuantizePass(dict.fromkeys(QUANTS, LayerQuant(None)))(model)
    assert counts(model) == {"DequantizeLinear": 3, "Conv": 1, "MatMul": 2}
    found = run(model, tmp_path, FEEDS)
    conv = np.stack([fake(w, half_scale(np.abs(w).max() / 127), -127) for w in CONV])
    np.testing.assert_allclose(found["out"], convolved(FEEDS["sample"], conv), rtol=1e-4, atol=1e-5)


SHORTCUT = (RNG.standard_normal((5, 7, 1, 1)) / 3).astype(np.float32)
BRANCHES = """
    net (float[b,3,h,w] x, float[b,4,h,w] skip) => (float[b,5,h,w] out, float[b,7,h,w] joined) {
        joined = Concat<axis=1>(x, skip)
        smooth = Mul(joined, factors)
        out = Conv(smooth, shortcut)
    }
"""
# The skip is 30 times as large; v is what the branches are divided by.
V = np.repeat([0.37, 9.1], [3, 4]).astype(np.float32)
SKIP = {
    "x": RNG.standard_normal((2, 3, 5, 4)).astype(np.float32),
    "skip": (30 * RNG.standard_normal((2, 4, 5, 4))).astype(np.float32),
}


def branches(factors: Any = None) -> ir.Model:
    weights = {"shortcut": SHORTCUT * V.reshape(1, 7, 1, 1), "factors": (1 / V if factors is None else factors)}
    return model_of(BRANCHES, {name: w.reshape(1, 7, 1, 1) if w.ndim == 1 else w for name, w in weights.items()})


def test_branches_of_a_concat_have_scales_of_their_own_and_no_mul(tmp_path: Path) -> None:
    model = branches()
    QuantizePass({"shortcut": LayerQuant(1 / 11)})(model)
    assert counts(model) == {"Concat": 2, "QuantizeLinear": 2, "DequantizeLinear": 2, "Conv": 1}
    assert "factors" not in model.graph.initializers
    found = run(model, tmp_path, SKIP)
    np.testing.assert_array_equal(found["joined"], np.concatenate([SKIP["x"], SKIP["skip"]], 1))
    # Written anew: each branch in its own steps, weights for the steps of the joined tensor.
    step = float(half_scale(1 / 11))
    own = [float(half_scale(step * v)) for v in (0.37, 9.1)]
    joined = np.concatenate([fake(SKIP["x"], own[0]) / own[0], fake(SKIP["skip"], own[1]) / own[1]], 1) * step
    weight = SHORTCUT[..., 0, 0] * np.repeat([own[0] / step, own[1] / step], [3, 4])
    weight = np.stack([fake(row, half_scale(np.abs(row).max() / 127), -127) for row in weight])
    np.testing.assert_allclose(found["out"], np.einsum("bchw,oc->bohw", joined, weight), rtol=1e-4, atol=1e-3)


def test_float8_has_no_need_of_branches(tmp_path: Path) -> None:
    model = branches()
    QuantizePass({"shortcut": LayerQuant(1 / 11, kind="fp8")})(model)
    assert counts(model) == {"Concat": 1, "Mul": 1, "QuantizeLinear": 1, "DequantizeLinear": 2, "Conv": 1}
    assert np.isfinite(run(model, tmp_path, SKIP)["out"]).all()


def test_branches_equal_the_mul_that_they_stand_for(tmp_path: Path) -> None:
    """With scales that float16 holds, the split is the Mul's graph to the last integer."""
    quants = {"shortcut": LayerQuant(1 / 16)}
    halves = np.repeat([0.5, 4.0], [3, 4]).astype(np.float32)
    split, mul = branches(1 / halves), branches(1 / halves)
    QuantizePass(quants)(split)
    # The same but for its name, which no rule of ours knows.
    for node in mul.graph:
        if node.op_type == "Concat":
            node.outputs[0].shape = ir.Shape(["b", "c", "h", "w"])
    smooth = next(node for node in mul.graph if node.op_type == "Mul")
    divided = ir.node("Div", [smooth.inputs[0], smooth.inputs[1]])
    divided.outputs[0].shape, divided.outputs[0].type = smooth.outputs[0].shape, smooth.outputs[0].type
    mul.graph.initializers["factors"].const_value = ir.tensor(halves.reshape(1, 7, 1, 1))
    mul.graph.insert_after(smooth, divided)
    smooth.outputs[0].replace_all_uses_with(divided.outputs[0])
    divided.outputs[0].name = "divided"
    mul.graph.remove(smooth, safe=True)
    QuantizePass(quants)(mul)
    assert counts(mul)["Div"] == 1
    for name in ("shortcut.int8", "shortcut.scale"):
        ours, theirs = (model.graph.initializers[name].const_value for model in (split, mul))
        assert ours is not None
        assert theirs is not None
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    np.testing.assert_array_equal(run(split, tmp_path, SKIP)["out"], run(mul, tmp_path, SKIP)["out"])


@pytest.mark.parametrize("factors", [np.arange(1, 8, dtype=np.float32), np.repeat([1, -1], [3, 4]).astype(np.float32)])
def test_a_mul_by_channel_is_no_split(factors: Any) -> None:
    model = branches(factors)
    QuantizePass({"shortcut": LayerQuant(1 / 16)})(model)
    assert counts(model) == {"Concat": 1, "Mul": 1, "QuantizeLinear": 1, "DequantizeLinear": 2, "Conv": 1}


def test_what_is_not_named_stays(tmp_path: Path) -> None:
    model = net()
    QuantizePass({"left": LayerQuant(1 / 32)})(model)
    plain = run(net(), tmp_path, FEEDS)
    found = run(model, tmp_path, FEEDS)
    np.testing.assert_array_equal(found["out"], plain["out"])
    np.testing.assert_array_equal(found["v"], plain["v"])
    assert 0 < np.abs(found["k"] - plain["k"]).max() < 0.1
    assert not QuantizePass({})(net()).modified


def parsed(trt: Any, path: Path) -> tuple[Any, ...]:
    from latentrt.runtime.trt_log import shared_logger

    builder = trt.Builder(shared_logger(trt))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, shared_logger(trt))
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    return builder, network, parser


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("half", [False, True])
def test_the_parser_of_tensorrt_takes_both_types(tmp_path: Path, kind: Any, half: bool) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from latentrt.export.engine_readout import precisions_of, read_layers

    for model, quants, feeds in (
        (net(), QUANTS, FEEDS),
        (branches(), {"shortcut": LayerQuant(0.1)}, SKIP),
    ):
        QuantizePass({name: LayerQuant(quant.scale, kind=kind) for name, quant in quants.items()})(model)
        if half:
            HalfPrecisionPass()(model)
        path = tmp_path / "model.onnx"
        ir.save(model, path)
        _, network, _ = parsed(trt, path)
        layers = read_layers(trt, network, {name: values.shape for name, values in feeds.items()})
        assert precisions_of(layers).share(kind.capitalize()) == 1.0


@given(st.lists(st.floats(0, 60000), min_size=1, max_size=8))
def test_scales_are_rounded_up_to_half(values: list[float]) -> None:
    scales = half_scale(np.array(values)).astype(np.float64)
    wanted = np.maximum(values, LEAST_SCALE)
    assert (scales >= wanted).all()
    # No smaller half would do.
    below = np.nextafter(scales.astype(np.float16), np.float16(0)).astype(np.float64)
    assert ((below < wanted) | (scales == LEAST_SCALE)).all()


def test_no_weight_is_clipped_and_zeros_stay_zeros() -> None:
    weight = RNG.standard_normal((64, 5)).astype(np.float32) * np.logspace(-7, 3, 5, dtype=np.float32)
    weight[:, 2] = 0
    scales = weight_scales(weight, 1)
    steps = quantized(weight, scales, 1)
    assert steps.dtype == np.int8
    assert np.abs(steps).max() <= 127
    assert not steps[:, 2].any()
    error = np.abs(steps * scales.astype(np.float32) - weight)
    assert (error <= 0.5000001 * scales.astype(np.float32)).all()


def test_weights_that_small_keep_their_precision() -> None:
    """Rounded scales are those that weights are quantized with: otherwise 20 dB are lost here."""
    weight = (1e-5 * RNG.standard_normal((256, 32))).astype(np.float32)
    scales = weight_scales(weight, 1)
    restored = quantized(weight, scales, 1) * scales.astype(np.float32)
    assert 10 * np.log10((weight**2).sum() / ((restored - weight) ** 2).sum()) > 38


def test_an_opset_without_such_types_is_refused() -> None:
    model = model_of('<ir_version: 8, opset_import: ["" : 18]>' + TEXT, {"conv": CONV, "left": LEFT, "right": RIGHT})
    with pytest.raises(CalibrationError, match=r"expected a graph of opset 19 or later, .* got 18"):
        QuantizePass(QUANTS)(model)


@pytest.mark.parametrize(("kind", "largest"), [("int8", 127), ("fp8", 448)])
def test_what_is_beyond_the_largest_step_is_that_step(kind: Any, largest: int) -> None:
    steps = quantized(np.array([[1e4, -1e4, 3.0, np.inf]], np.float32), np.array([1], np.float16), 0, kind)
    np.testing.assert_array_equal(steps.astype(np.float32), [[largest, -largest, 3, largest]])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_scales_that_no_graph_can_hold_are_refused(value: float) -> None:
    with pytest.raises(CalibrationError, match="scale: expected finite numbers up to 65504"):
        half_scale(value)


def test_names_of_no_weight_and_two_scales_for_one_tensor_are_refused() -> None:
    with pytest.raises(CalibrationError, match="net: expected weights of a Conv or MatMul, got text, up"):
        QuantizePass(dict.fromkeys(("up", "text", "conv"), LayerQuant(0.1)))(net())
    with pytest.raises(CalibrationError, match=r"right: expected int8 with scale 0.03\d*, .* got int8 with 0.04"):
        QuantizePass({"left": LayerQuant(0.03), "right": LayerQuant(0.04)})(net())
