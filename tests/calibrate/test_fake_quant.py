from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from small_graphs import model_of, run
from torch import nn

from latentrt.calibrate.fake_quant import fake_quantized, rounded, simulated, stored_weight
from latentrt.calibrate.layer_quant import Kind, LayerQuant
from latentrt.calibrate.quantize_pass import QuantizePass
from latentrt.runtime.errors import CalibrationError

RNG = np.random.default_rng(0)
# Channels as far apart as in a trained network; one is zero.
CONV, LINEAR = (
    (RNG.standard_normal(shape) * np.logspace(-3, 1, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))).astype(np.float32)
    for shape in ((6, 4, 3, 3), (8, 16))
)
LINEAR[3] = 0
BIAS = RNG.standard_normal(6).astype(np.float32)
SAMPLE = RNG.standard_normal((2, 4, 5, 7)).astype(np.float32)
TEXT = RNG.standard_normal((2, 3, 16)).astype(np.float32)
GRAPH = """
    net (float[b,4,h,w] sample, float[b,n,16] text) => (float[b,6,k,l] image, float[b,n,8] words) {
        image = Conv<pads=[1,1,1,1], strides=[2,2]>(sample, conv_weight, conv_bias)
        words = MatMul(text, linear_weight)
    }
"""


class Pair(nn.Module):
    """The network that the graph is of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.linear = nn.Linear(16, 8, bias=False)
        for parameter, values in ((self.conv.weight, CONV), (self.conv.bias, BIAS), (self.linear.weight, LINEAR)):
            assert parameter is not None
            parameter.data = torch.from_numpy(values.copy())
        self.requires_grad_(False)

    def forward(self, sample: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv(sample), self.linear(text)


def graph() -> ir.Model:
    return model_of(GRAPH, {"conv_weight": CONV, "conv_bias": BIAS, "linear_weight": LINEAR.T})


def answers(network: nn.Module) -> list[Any]:
    return [each.numpy() for each in network(torch.from_numpy(SAMPLE), torch.from_numpy(TEXT))]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("scale", [1 / 64, 0.003, None])  # the second clips most of what it is given
def test_a_simulated_network_is_the_quantized_graph(tmp_path: Path, kind: Kind, scale: float | None) -> None:
    if kind == "fp8" and scale is not None:
        scale /= 4
    quant = LayerQuant(scale=scale, kind=kind)
    model = graph()
    QuantizePass({"conv_weight": quant, "linear_weight": quant})(model)
    wanted = run(model, tmp_path, {"sample": SAMPLE, "text": TEXT})
    network = Pair()
    plain = answers(network)
    with simulated(network, {"conv.weight": quant, "linear.weight": quant}):
        image, words = answers(network)
    np.testing.assert_allclose(image, wanted["image"], rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(words, wanted["words"], rtol=1e-5, atol=2e-5)
    assert np.abs(image - plain[0]).max() > 1e-2
    for before, after in zip(plain, answers(network), strict=True):
        np.testing.assert_array_equal(after, before)


def test_a_layer_is_what_its_numbers_say() -> None:
    """Written out in NumPy: smoothing divides the input and multiplies the weights, the correction is added."""
    vector = np.logspace(-1, 1, 4).astype(np.float32)
    correction = RNG.standard_normal(6).astype(np.float32)
    quant = LayerQuant(scale=0.1, vector=vector, correction=correction)
    network = Pair()
    found = fake_quantized(network.conv, torch.from_numpy(SAMPLE), quant).numpy()
    # 0.1 is rounded up to a float16.
    step = np.float32(0.1000366)
    x = np.clip(np.round(SAMPLE / vector.reshape(1, 4, 1, 1) / step), -128, 127) * step
    weight = CONV * vector.reshape(1, 4, 1, 1)
    amax = np.abs(weight).max((1, 2, 3), keepdims=True)
    # Rounding of scales to float16 is no more than a thousandth.
    weight = np.round(weight / amax * 127) * amax / 127
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3))
    wanted = np.einsum("bchwij,ocij->bohw", windows[:, :, ::2, ::2], weight)
    wanted += (BIAS + correction).reshape(1, 6, 1, 1)
    scale = np.abs(wanted - wanted.mean((0, 2, 3), keepdims=True)).max((0, 2, 3), keepdims=True)
    assert (np.abs(found - wanted) < 0.01 * scale).all()


def test_integers_round_to_even_and_saturate() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.6, 127.4, 300.0, -127.6, -300.0]) / 4
    wanted = torch.tensor([0, 2, 2, 0, -2, 127, 127, 127, -128, -128]) / 4
    torch.testing.assert_close(rounded(x, 0.25, "int8"), wanted, rtol=0, atol=0)


def test_floats_have_three_bits_of_mantissa_and_saturate() -> None:
    # Between 16 and 32 the steps are 2, below 2^-6 they are 2^-9.
    x = torch.tensor([17.0, 19.0, 21.0, 449.0, 1e6, -1e6, 2**-9 * 1.4, 2**-9 * 0.5]) / 2
    wanted = torch.tensor([16.0, 20.0, 20.0, 448.0, 448.0, -448.0, 2**-9, 0.0]) / 2
    torch.testing.assert_close(rounded(x, 0.5, "fp8"), wanted, rtol=0, atol=0)


def test_weights_are_stored_in_a_quarter_of_their_size() -> None:
    weight = torch.from_numpy(LINEAR)
    for kind, step in (("int8", np.abs(LINEAR).max(1, keepdims=True) / 127), ("fp8", np.abs(LINEAR) / 16 + 2e-5)):
        stored = stored_weight(weight, LayerQuant(scale=None, kind=kind))  # type: ignore[arg-type]
        assert stored.steps.element_size() == 1
        error = np.abs(stored.restored().numpy() - LINEAR)
        assert (error <= 0.501 * step + 1e-12).all() if kind == "int8" else (error <= 1.001 * step).all()
    # In steps, the largest weight of every channel is 127; a channel of zeros stays one.
    largest = stored_weight(weight, LayerQuant(scale=None)).steps.abs().amax(1)
    assert largest.tolist() == [0 if row == 3 else 127 for row in range(8)]


def test_what_is_no_layer_is_refused() -> None:
    network = Pair()
    with (
        pytest.raises(CalibrationError, match=r"Pair: expected weights of its layers, got conv\.bias, other\.weight\."),
        simulated(network, {name: LayerQuant(scale=1.0) for name in ("conv.bias", "conv.weight", "other.weight")}),
    ):
        pass
    with pytest.raises(CalibrationError, match="expected a Conv2d or Linear, got GELU"):
        fake_quantized(nn.GELU(), torch.zeros(1), LayerQuant(scale=1.0))


def test_a_network_is_as_before_after_an_error() -> None:
    network = Pair()
    plain = answers(network)

    with pytest.raises(KeyboardInterrupt), simulated(network, {"conv.weight": LayerQuant(scale=0.1)}):
        raise KeyboardInterrupt
    np.testing.assert_array_equal(answers(network)[0], plain[0])
