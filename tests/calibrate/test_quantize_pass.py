from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_graphs import counts, model_of, run

from latentrt.calibrate.quantize_pass import LEAST_SCALE, QuantizePass, half_scale, quantized, weight_scales
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
SCALES = {"conv": 1 / 64, "left": 1 / 32, "right": 1 / 32}
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
    assert QuantizePass(SCALES)(model).modified
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
    QuantizePass(SCALES)(full)
    QuantizePass(SCALES)(half)
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


def test_what_is_not_named_stays(tmp_path: Path) -> None:
    model = net()
    QuantizePass({"left": 1 / 32})(model)
    plain = run(net(), tmp_path, FEEDS)
    found = run(model, tmp_path, FEEDS)
    np.testing.assert_array_equal(found["out"], plain["out"])
    np.testing.assert_array_equal(found["v"], plain["v"])
    assert 0 < np.abs(found["k"] - plain["k"]).max() < 0.1
    assert not QuantizePass({})(net()).modified


def test_the_parser_of_tensorrt_takes_both_types(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    from latentrt.export.engine_readout import precisions_of, read_layers
    from latentrt.runtime.trt_log import shared_logger

    for half in (False, True):
        model = net()
        QuantizePass(SCALES)(model)
        if half:
            HalfPrecisionPass()(model)
        path = tmp_path / f"{half}.onnx"
        ir.save(model, path)
        builder = trt.Builder(shared_logger(trt))
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, shared_logger(trt))
        assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
        layers = read_layers(trt, network, {name: values.shape for name, values in FEEDS.items()})
        assert precisions_of(layers).share("Int8") == 1.0


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


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_scales_that_no_graph_can_hold_are_refused(value: float) -> None:
    with pytest.raises(CalibrationError, match="scale: expected finite numbers up to 65504"):
        half_scale(value)


def test_names_of_no_weight_and_two_scales_for_one_tensor_are_refused() -> None:
    with pytest.raises(CalibrationError, match="net: expected weights of a Conv or MatMul, got text, up"):
        QuantizePass({"up": 0.1, "text": 0.1, "conv": 0.1})(net())
    with pytest.raises(CalibrationError, match=r"right: expected scale 0.03\d*, .* got 0.04"):
        QuantizePass({"left": 0.03, "right": 0.04})(net())
