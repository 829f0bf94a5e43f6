from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.testing import assert_allclose
from small_graphs import model_of, run
from torch import nn
from torch.nn import functional as F

from latentrt.calibrate.bias_correction import BiasCorrectionPass, biases_of, choose_corrections, weight_correction
from latentrt.calibrate.calls import Call
from latentrt.calibrate.layer_quant import LayerQuant
from latentrt.calibrate.layers import graph_layers
from latentrt.calibrate.smooth_pass import SmoothPass
from latentrt.calibrate.statistics import collect
from latentrt.export.weights import of_array
from latentrt.runtime.errors import CalibrationError

RNG = np.random.default_rng(0)
WEIGHTS = {
    "conv": RNG.standard_normal((6, 4, 1, 1)).astype(np.float32),
    "conv_bias": RNG.standard_normal(6).astype(np.float32),
    "first": RNG.standard_normal((4, 8)).astype(np.float32),
    "first_bias": RNG.standard_normal(8).astype(np.float32),
    "second": RNG.standard_normal((4, 5)).astype(np.float32),
    "shared_bias": RNG.standard_normal(5).astype(np.float32),
    "third": RNG.standard_normal((8, 5)).astype(np.float32),
}
TEXT = """
    net (float[b,4,h,w] x, float[b,n,4] z) => (float[b,6,h,w] a, float[b,n,5] d, float[b,n,8] c) {
        a = Conv(x, conv, conv_bias)
        m = MatMul(z, first) c = Add(first_bias, m)
        e = MatMul(z, second) f = Add(e, shared_bias)
        g = MatMul(c, third) i = Add(g, shared_bias)
        d = Add(f, i)
    }
"""
FEEDS = {
    "x": RNG.standard_normal((2, 4, 3, 2)).astype(np.float32),
    "z": RNG.standard_normal((2, 3, 4)).astype(np.float32),
}


def net() -> ir.Model:
    return model_of(TEXT, WEIGHTS)


def test_layers_with_a_bias_of_their_own_are_found() -> None:
    # Of a bias that two layers read, none can have it changed.
    assert biases_of(net()) == {"conv": "conv_bias", "first": "first_bias"}
    others = model_of(
        "net (float[b,n,4] z, float[b,n,8] r) => (float[b,n,8] y) { m = MatMul(z, first) y = Add(m, r) }",
        {"first": WEIGHTS["first"]},
    )
    assert biases_of(others) == {}


def test_every_layer_of_a_unet_but_the_projections_to_attention_has_one(shapes_bundle: Path) -> None:
    model = ir.load(shapes_bundle / "unet" / "model.onnx")
    sizes = {"batch": 1, "latent_height": 8, "latent_width": 8, "sequence_length": 77}
    without = {layer.kind for layer in graph_layers(model, sizes) if layer.name not in biases_of(model)}
    attention = {f"attn{n}.to_{x}" for n in (1, 2) for x in "qkv"}
    # Gemm has its bias inside, and is not quantized.
    assert without == attention
    for name, bias in biases_of(model).items():
        assert bias == name.removesuffix("weight") + "bias"


def test_corrections_are_added_to_the_output(tmp_path: Path) -> None:
    model, expected = net(), run(net(), tmp_path, FEEDS)
    conv, first = (RNG.standard_normal(size).astype(np.float32) for size in (6, 8))
    assert BiasCorrectionPass({"conv": conv, "first": first})(model).modified
    found = run(model, tmp_path, FEEDS)
    assert_allclose(found["a"], expected["a"] + conv[:, None, None], rtol=1e-5, atol=1e-6)
    assert_allclose(found["c"], expected["c"] + first, rtol=1e-5, atol=1e-6)
    assert not BiasCorrectionPass({})(net()).modified


def test_no_weight_is_read_before_it_is_written() -> None:
    reads: list[str] = []
    BiasCorrectionPass({"conv": np.ones(6, np.float32)})(model_of(TEXT, WEIGHTS, reads=reads))
    assert reads == []


def test_a_corrected_bias_is_divided_with_what_it_makes(tmp_path: Path) -> None:
    weights = {name: WEIGHTS[name] for name in ("first", "first_bias", "third")} | {"third": np.eye(4, dtype="f4")}
    text = """net (float[b,n,4] z) => (float[b,n,4] y) {
        m = MatMul(z, first) c = Add(m, first_bias) l, r = Split<axis=-1, num_outputs=2>(c)
        g = Gelu(r) p = Mul(l, g) y = MatMul(p, third)
    }"""
    corrected, both = model_of(text, weights), model_of(text, weights)
    correction = RNG.standard_normal(8).astype(np.float32)
    for model in (corrected, both):
        BiasCorrectionPass({"first": correction})(model)
    SmoothPass({"third": np.array([0.5, 2, 3, 0.25], np.float32)})(both)
    feeds = {"z": FEEDS["z"]}
    assert_allclose(run(both, tmp_path, feeds)["y"], run(corrected, tmp_path, feeds)["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("corrections", "message"),
    [
        ({"second": np.ones(5)}, "net: expected corrections of layers with a bias, got second"),
        ({"conv": np.ones(5)}, r"conv: expected a correction of 6 finite numbers, got shape \(5,\)"),
        ({"conv": np.full(6, np.nan)}, "conv: expected a correction of 6 finite numbers"),
    ],
)
def test_corrections_that_do_not_fit_are_refused(corrections: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        BiasCorrectionPass(corrections)(net())


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """Eight bits by output channel, the step rounded up to float16; written anew."""
    largest = weight.flatten(1).abs().amax(1).double() / 127
    near = largest.half().double()
    step = torch.where(near < largest, torch.nextafter(near.half(), torch.tensor(torch.inf).half()).double(), near)
    step = step.reshape(-1, *(1,) * (weight.ndim - 1))
    return (weight.double() / step).round().clamp(-127, 127) * step


@pytest.mark.parametrize("smoothed", [False, True])
def test_the_mean_error_of_the_weights_is_gone(smoothed: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 20).requires_grad_(False), torch.randn(500, 32) + 3 * torch.randn(32)
    vector = np.exp2(RNG.uniform(-2, 2, 32)).astype(np.float32) if smoothed else None
    v = torch.ones(32) if vector is None else torch.from_numpy(vector)
    error = x.double() @ linear.weight.double().T - (x / v).double() @ rounded(linear.weight * v).T
    correction = weight_correction(linear.weight.numpy(), x.double().mean(0).numpy(), LayerQuant(None, vector))
    assert correction.dtype == np.float32
    assert float(error.mean(0).abs().max()) > 1e-3
    assert_allclose(correction, error.mean(0), atol=1e-6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 24, 3)

    def forward(self, sample: torch.Tensor) -> Any:
        return self.conv(sample)


def test_corrections_are_those_of_the_calls_with_every_timestep_weighted() -> None:
    torch.manual_seed(1)
    module = Net().requires_grad_(False)
    # Constant channels, so that the inside and the border of a picture have one mean.
    samples = [np.broadcast_to(RNG.standard_normal((1, 16, 1, 1)), (1, 16, 6, 6)).astype(np.float32) for _ in range(2)]
    recorded = [
        Call({"sample": sample}, prompt=0, timestep=t, negatives=0, guidance=1.0)
        for sample, t in zip([samples[0], samples[0], samples[1]], (100.0, 110.0, 900.0), strict=True)
    ]
    graph = model_of(
        "net (float[1,16,6,6] sample) => (float[1,24,4,4] y) { y = Conv(sample, w, b) }",
        {"w": module.conv.weight.numpy(), "b": np.zeros(24, np.float32)},
    )
    graph.graph.initializers["w"].name = "conv.weight"
    layers = graph_layers(graph, {})
    statistics = collect(module, layers, recorded, bins=2)
    weights = {"conv.weight": of_array(module.conv.weight.numpy())}
    quants = {"conv.weight": LayerQuant(0.1)}
    found = choose_corrections(layers, statistics, weights, quants, bin_weights=[1, 3])["conv.weight"]
    error = [
        F.conv2d(torch.from_numpy(sample).double(), module.conv.weight.double() - rounded(module.conv.weight))
        for sample in samples
    ]
    assert_allclose(found, (error[0] + 3 * error[1]).mean((0, 2, 3)) / 4, atol=1e-6)
    with pytest.raises(CalibrationError, match=r"conv\.weight: expected statistics of its input, found none"):
        choose_corrections(layers, type(statistics)({}, 2, 1000, 0, 1, 0), weights, quants)
