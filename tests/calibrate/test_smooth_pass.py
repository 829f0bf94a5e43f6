from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from small_graphs import counts, model_of, outputs_of, run

from latentrt.calibrate.layer_quant import LayerQuant
from latentrt.calibrate.quantize_pass import QuantizePass
from latentrt.calibrate.smooth_pass import SmoothPass
from latentrt.calibrate.smoothing_sites import sites_of
from latentrt.runtime.errors import CalibrationError

RNG = np.random.default_rng(0)
BLOCK = """
    net (float[b,n,8] x) => (float[b,n,8] y) {
        h = LayerNormalization<axis=-1>(x, gain, shift)
        a = MatMul(h, up) c = Add(a, up_bias)
        left, right = Split<axis=-1, num_outputs=2>(c)
        g = Gelu(right) m = Mul(left, g)
        o = MatMul(m, down) p = Add(o, down_bias)
        y = MatMul(p, last)
    }
"""
SHAPES = {
    "gain": (8,),
    "shift": (8,),
    "up": (8, 32),
    "up_bias": (32,),
    "down": (16, 8),
    "down_bias": (8,),
    "last": (8, 8),
}
WEIGHTS = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
FEEDS = {"x": RNG.standard_normal((2, 5, 8)).astype(np.float32)}


def block(reads: list[str] | None = None) -> ir.Model:
    return model_of(BLOCK, WEIGHTS, reads=reads)


def octaves(rng: np.random.Generator, channels: int) -> Any:
    """A vector over four octaves."""
    return np.exp2(rng.uniform(-2, 2, channels)).astype(np.float32)


def relative(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def check_unet(path: Path, tmp_path: Path) -> None:
    """Smoothing every site of a U-Net changes its prediction by no more than the last bits."""
    model = ir.load(path)
    sites, rng = sites_of(model), np.random.default_rng(1)
    assert {site.how for site in sites.values()} == {"norm", "value", "geglu", "mul", "split"}
    sizes = {"batch": 2, "latent_height": 8, "latent_width": 6, "sequence_length": 77}
    feeds = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape or ()]
        feeds[str(value.name)] = rng.standard_normal(shape).astype(np.float32)
    feeds["timestep"] = np.array([1, 801], np.float32)
    expected = outputs_of(path, feeds)["out_sample"]
    plain = counts(model)
    # A branch of a concatenation as any other channels: exactness does not depend on what was chosen.
    SmoothPass({group: octaves(rng, site.channels) for group, site in sites.items()})(model)
    added = sum(not site.free for site in sites.values())
    assert counts(model) - plain == {"Mul": added}
    ir.save(model, tmp_path / "smoothed.onnx")
    found = outputs_of(tmp_path / "smoothed.onnx", feeds)["out_sample"]
    assert relative(found, expected) < 1e-5


def test_a_unet_predicts_the_same(shapes_bundle: Path, tmp_path: Path) -> None:
    check_unet(shapes_bundle / "unet" / "model.onnx", tmp_path)


def test_a_unet_with_linear_projections_predicts_the_same(family_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    check_unet(family_bundle("sdxl_base") / "unet" / "model.onnx", tmp_path)


def test_every_weight_is_multiplied_and_its_source_divided(tmp_path: Path) -> None:
    model, rng = block(), np.random.default_rng(2)
    expected = run(block(), tmp_path, FEEDS)["y"]
    into, inner, end = (octaves(rng, channels) for channels in (8, 16, 8))
    assert SmoothPass({"up": into, "down": inner, "last": end})(model).modified
    wanted = {
        "gain": WEIGHTS["gain"] / into,
        "shift": WEIGHTS["shift"] / into,
        # Rows by what it reads, columns by what is made of them; the gate's half is as it was.
        "up": into[:, None] * WEIGHTS["up"] / np.concatenate([inner, np.ones(16)]),
        "up_bias": WEIGHTS["up_bias"] / np.concatenate([inner, np.ones(16)]),
        "down": inner[:, None] * WEIGHTS["down"],
        "down_bias": WEIGHTS["down_bias"],
        "last": end[:, None] * WEIGHTS["last"],
        "p.smoothed.factors": 1 / end,
    }
    assert model.graph.initializers.keys() == wanted.keys()
    for name, values in wanted.items():
        tensor = model.graph.initializers[name].const_value
        assert tensor is not None
        assert tensor.dtype == ir.DataType.FLOAT
        assert_allclose(tensor.numpy(), values, rtol=1e-6, err_msg=name)
    assert_allclose(run(model, tmp_path, FEEDS)["y"], expected, rtol=1e-5, atol=1e-5)


def test_powers_of_two_change_no_bit(tmp_path: Path) -> None:
    model = block()
    expected = run(block(), tmp_path, FEEDS)["y"]
    SmoothPass({"last": np.exp2(np.arange(-4, 4)).astype(np.float32)})(model)
    assert_array_equal(run(model, tmp_path, FEEDS)["y"], expected)


def test_a_convolution_is_multiplied_by_channel(tmp_path: Path) -> None:
    text = "net (float[b,3,h,w] x) => (float[b,4,h,w] y) { s = Sigmoid(x) y = Conv<pads=[1,1,1,1]>(s, k, bias) }"
    weights = {"k": RNG.standard_normal((4, 3, 3, 3)).astype(np.float32), "bias": np.ones(4, np.float32)}
    feeds = {"x": RNG.standard_normal((2, 3, 5, 4)).astype(np.float32)}
    model, vector = model_of(text, weights), np.array([0.25, 3, 7], np.float32)
    expected = run(model_of(text, weights), tmp_path, feeds)["y"]
    SmoothPass({"k": vector})(model)
    kernel = model.graph.initializers["k"].const_value
    assert kernel is not None
    assert_allclose(kernel.numpy(), weights["k"] * vector[:, None, None], rtol=1e-6)
    assert_allclose(run(model, tmp_path, feeds)["y"], expected, rtol=1e-5, atol=1e-6)


def test_no_weight_is_read_before_it_is_written() -> None:
    reads: list[str] = []
    SmoothPass({"up": np.ones(8, np.float32), "down": np.ones(16, np.float32)})(block(reads))
    assert reads == []


def test_smoothed_layers_are_quantized_under_their_own_names() -> None:
    model = block()
    SmoothPass({"up": np.full(8, 2, np.float32), "last": np.full(8, 2, np.float32)})(model)
    QuantizePass({name: LayerQuant(0.125) for name in ("up", "down", "last")})(model)
    assert {"up.int8", "down.int8", "last.int8"} <= model.graph.initializers.keys()
    # A quantized tensor is the divided one.
    (mul,) = (node for node in model.graph if node.name == "p.smoothed")
    assert [node.op_type for node in mul.outputs[0].consumers()] == ["QuantizeLinear"]


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"none": np.ones(8)}, "net: expected vectors of tensors that layers read.*got none"),
        ({"up": np.ones(7)}, r"up: expected a vector of 8 channels, got \(7,\)"),
        ({"up": np.ones((8, 1))}, r"up: expected a vector of 8 channels, got \(8, 1\)"),
        ({"up": np.zeros(8)}, "up: expected a vector of positive numbers, got 0 to 0"),
        ({"up": np.array([1, 1, 1, -1, 1, 1, 1, 1])}, "up: expected a vector of positive numbers, got -1 to 1"),
        ({"up": np.array([1, 1, 1, np.inf, 1, 1, 1, 1])}, "up: expected a vector of positive numbers, got 1 to inf"),
        ({"up": np.array([1, 1, 1, np.nan, 1, 1, 1, 1])}, "up: expected a vector of positive numbers, got nan"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused(vectors: dict[str, Any], message: str) -> None:
    model = block()
    with pytest.raises(CalibrationError, match=message):
        SmoothPass({group: values.astype(np.float32) for group, values in vectors.items()})(model)


def test_without_vectors_nothing_changes() -> None:
    model = block()
    assert not SmoothPass({})(model).modified
