from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_layers import layers_of
from torch import nn
from torch.nn import functional as F

from latentrt.calibrate.calls import Call
from latentrt.calibrate.clipping import entropy_clip, mse_clip
from latentrt.calibrate.histogram import histogram_of, weighted
from latentrt.calibrate.layer_quant import Kind
from latentrt.calibrate.layers import Layer
from latentrt.calibrate.scales import (
    CANDIDATES,
    Method,
    choose_scales,
    largest_of,
    output_error_clip,
    output_errors,
    scale_of,
)
from latentrt.calibrate.statistics import Statistics, collect
from latentrt.export.weights import Weight, of_array
from latentrt.runtime.errors import CalibrationError, UsageError

BIN_WEIGHTS = np.array([3.0, 1.0])
LARGEST = {"int8": 127, "fp8": 448}


Weighted = nn.Linear | nn.Conv2d


class Pair(nn.Module):
    """Two layers of one input."""

    one: Weighted
    other: Weighted

    def __init__(self, one: Weighted, other: Weighted) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.one(x), self.other(x)


def pair_of(shape: str, *, outputs: int = 7) -> Pair:
    torch.manual_seed(1)
    if shape == "linear":
        return Pair(nn.Linear(6, outputs, bias=False), nn.Linear(6, 3, bias=False)).eval()
    return Pair(nn.Conv2d(6, outputs, 3, padding=1, bias=False), nn.Conv2d(6, 3, 3, padding=1, bias=False)).eval()


def inputs_of(shape: str) -> list[torch.Tensor]:
    """For two bins, of numbers that float16 holds, with a few far out and one channel larger than the others."""
    rng = np.random.default_rng(0)
    size = (40, 6) if shape == "linear" else (6, 7, 5)
    found = []
    for rows, spread in ((2, 1.0), (5, 3.0)):
        values = spread * rng.standard_t(4, (rows, *size))
        values[..., 2] *= 6 if shape == "linear" else 1
        values[:, 2] *= 6 if shape == "conv" else 1
        found.append(torch.from_numpy(values.astype(np.float16).astype(np.float32)))
    return found


GROUPS = {"other.weight": "one.weight"}


def seen_by(
    pair: Pair, inputs: Sequence[torch.Tensor], *, capacity: int = 10**6
) -> tuple[tuple[Layer, ...], Statistics]:
    layers = layers_of(pair, GROUPS)
    calls = [Call({"x": values.numpy()}, 0, 600.0 * index, 0, 1.0) for index, values in enumerate(inputs)]
    return layers, collect(pair, layers, calls, bins=2, capacity=capacity)


def weights_of(pair: Pair) -> dict[str, Weight]:
    return {name: of_array(values.detach().numpy()) for name, values in pair.named_parameters()}


def in_torch(values: torch.Tensor, scale: torch.Tensor, kind: Kind, *, least: int) -> torch.Tensor:
    steps = values / scale
    if kind == "int8":
        return torch.clamp(torch.round(steps), least, 127) * scale
    return torch.clamp(steps, -448, 448).to(torch.float8_e4m3fn).float() * scale


def half_up(values: torch.Tensor) -> torch.Tensor:
    near = values.half()
    return torch.where(near.float() < values, torch.nextafter(near, torch.tensor(torch.inf).half()), near).float()


def brute_force(pair: Pair, inputs: Sequence[torch.Tensor], scale: float, vector: torch.Tensor, kind: Kind) -> float:
    """Noise over signal of both layers as PyTorch computes them, by bin and layer."""
    total = 0.0
    for layer in (pair.one, pair.other):
        columns = vector.reshape(-1, *(1,) * (layer.weight.ndim - 2))
        weight = layer.weight.detach() * columns
        amax = weight.abs().flatten(1).amax(1) if kind == "int8" else weight.abs().max().reshape(1)
        steps = half_up(amax / LARGEST[kind]).reshape(-1, *(1,) * (weight.ndim - 1))
        rounded = in_torch(weight, steps, kind, least=-127)
        noise = signal = 0.0
        for values, share in zip(inputs, BIN_WEIGHTS, strict=True):
            divided = values / columns if isinstance(layer, nn.Conv2d) else values / vector
            restored = in_torch(divided, torch.tensor(scale), kind, least=-128)
            wanted = layer(values).detach()
            got = (
                F.linear(restored, rounded) if isinstance(layer, nn.Linear) else F.conv2d(restored, rounded, padding=1)
            )
            noise += share * float(((got - wanted).double() ** 2).mean())
            signal += share * float((wanted.double() ** 2).mean())
        total += noise / signal
    return total


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("shape", ["linear", "conv"])
def test_output_errors_are_those_of_the_layers_computed_by_pytorch(shape: str, kind: Kind, smoothed: bool) -> None:
    pair, inputs = pair_of(shape), inputs_of(shape)
    layers, statistics = seen_by(pair, inputs)
    seen = statistics.inputs["one.weight"]
    vector = torch.tensor([1.0, 0.5, 5.0, 1.5, 0.7, 2.0])
    matrices = [weight.read() for weight in weights_of(pair).values()]
    given = {"vector": vector.numpy()} if smoothed else {}
    factors = vector if smoothed else torch.ones(6)
    largest = largest_of(seen, given.get("vector"))
    columns = factors[:, None, None] if shape == "conv" else factors
    assert largest == pytest.approx(max(float((values / columns).abs().max()) for values in inputs), rel=1e-6)

    scales = [scale_of(largest * ratio, kind) for ratio in CANDIDATES]
    found = output_errors(seen, matrices, scales, bin_weights=BIN_WEIGHTS, kind=kind, **given)
    expected = [brute_force(pair, inputs, scale, factors, kind) for scale in scales]
    np.testing.assert_allclose(found, expected, rtol=1e-3)

    best = largest * CANDIDATES[int(np.argmin(expected))]
    assert output_error_clip(seen, matrices, bin_weights=BIN_WEIGHTS, kind=kind, **given) == best
    chosen = choose_scales(
        layers,
        statistics,
        weights_of(pair),
        bin_weights=BIN_WEIGHTS.tolist(),
        vectors={"one.weight": vector.numpy()} if smoothed else None,
        kind=kind,
    )
    assert chosen == dict.fromkeys(("one.weight", "other.weight"), scale_of(best, kind))


def test_a_few_random_sums_stand_for_many_outputs() -> None:
    pair, inputs = pair_of("linear", outputs=1500), inputs_of("linear")
    seen = seen_by(pair, inputs)[1].inputs["one.weight"]
    matrices = [weight.read() for weight in weights_of(pair).values()]
    scales = [scale_of(largest_of(seen) * ratio) for ratio in (1.0, 0.6, 0.3)]
    found = output_errors(seen, matrices, scales, bin_weights=BIN_WEIGHTS)
    expected = [brute_force(pair, inputs, scale, torch.ones(6), "int8") for scale in scales]
    np.testing.assert_allclose(found, expected, rtol=0.1)


def test_a_sample_of_rows_stands_for_all() -> None:
    pair = pair_of("linear")
    rng = np.random.default_rng(3)
    inputs = [torch.from_numpy(rng.standard_normal((8, 500, 6)).astype(np.float32)) for _ in range(2)]
    matrices = [weight.read() for weight in weights_of(pair).values()]
    whole, some = (seen_by(pair, inputs, capacity=capacity)[1].inputs["one.weight"] for capacity in (10**6, 1200))
    scales = [scale_of(largest_of(whole) * ratio) for ratio in (1.0, 0.6, 0.3)]
    expected = output_errors(whole, matrices, scales, bin_weights=BIN_WEIGHTS)
    np.testing.assert_allclose(output_errors(some, matrices, scales, bin_weights=BIN_WEIGHTS), expected, rtol=0.2)


def test_smoothing_an_outlier_channel_takes_its_noise_away() -> None:
    pair, inputs = pair_of("linear"), inputs_of("linear")
    for values in inputs:
        values[..., 4] *= 100
    pair.one.weight.data[:, 4] /= 100
    pair.other.weight.data[:, 4] /= 100
    seen = seen_by(pair, inputs)[1].inputs["one.weight"]
    matrices = [weight.read() for weight in weights_of(pair).values()]
    amax = np.maximum(seen[0].amax, seen[1].amax)
    vector = (amax / amax.min()).astype(np.float32)
    plain, smooth = (
        output_errors(seen, matrices, [scale_of(largest_of(seen, each))], bin_weights=BIN_WEIGHTS, vector=each)[0]
        for each in (None, vector)
    )
    assert 10 * np.log10(plain / smooth) > 10


def chosen(method: Method, shape: str = "linear", **options: Any) -> Mapping[str, float]:
    pair = pair_of(shape)
    layers, statistics = seen_by(pair, inputs_of(shape))
    return choose_scales(layers, statistics, weights_of(pair), method=method, **options)


def rounded_up(scale: float) -> float:
    half = np.float16(scale)
    return float(half if float(half) >= scale else np.nextafter(half, np.float16(np.inf)))


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("shape", ["linear", "conv"])
def test_each_method_reads_the_scale_off_the_tensor(shape: str, smoothed: bool) -> None:
    vector = torch.tensor([1, 0.5, 5, 1.5, 0.7, 2] if smoothed else [1.0] * 6)
    inputs = [values / (vector[:, None, None] if shape == "conv" else vector) for values in inputs_of(shape)]
    options = {"vectors": {"one.weight": vector.numpy()}} if smoothed else {}
    largest = max(float(values.abs().max()) for values in inputs)
    by_bin = weighted([histogram_of(values) for values in inputs], BIN_WEIGHTS.tolist())
    sizes = np.concatenate([values.abs().numpy().reshape(-1) for values in inputs])
    counts = np.concatenate(
        [np.full(each.numel(), own / each.numel()) for each, own in zip(inputs, BIN_WEIGHTS, strict=True)]
    )
    order = np.argsort(sizes)
    below = np.cumsum(counts[order]) / counts.sum()
    exact: dict[Method, tuple[float, float]] = {
        "minmax": (largest, 1e-6),
        "percentile": (sizes[order][np.searchsorted(below, 0.97)], 0.01),
        "mse": (mse_clip(by_bin), 0.021),
        "entropy": (entropy_clip(by_bin), 0.05),
    }
    for method, (amax, tolerance) in exact.items():
        found = chosen(method, shape, bin_weights=BIN_WEIGHTS.tolist(), percent=97, **options)
        assert set(found) == {"one.weight", "other.weight"}
        (scale,) = set(found.values())
        assert scale == np.float16(scale)
        assert scale == pytest.approx(rounded_up(amax / 127), rel=tolerance + 1e-3), method


def test_scales_are_rounded_up_to_float16_and_to_the_largest_step() -> None:
    for amax in (0.1, 1.0, 77.7, 3e4):
        for kind, steps in LARGEST.items():
            assert scale_of(amax, kind) == rounded_up(amax / steps)  # type: ignore[arg-type]
    assert set(chosen("minmax", kind="fp8").values()) == {
        rounded_up(max(float(values.abs().max()) for values in inputs_of("linear")) / 448)
    }


def test_layers_left_out_have_no_say() -> None:
    pair, inputs = pair_of("linear"), inputs_of("linear")
    layers, statistics = seen_by(pair, inputs)
    weights = weights_of(pair)
    alone = choose_scales(layers[1:], statistics, {"other.weight": weights["other.weight"]})
    seen = statistics.inputs["one.weight"]
    clip = output_error_clip(seen, [weights["other.weight"].read()], bin_weights=np.ones(2))
    assert alone == {"other.weight": scale_of(clip)}


def test_options_and_statistics_that_do_not_fit_are_refused() -> None:
    for bin_weights in ([1.0], [1.0, 0.0], [1.0, np.nan]):
        with pytest.raises(UsageError, match="bin_weights: expected 2 positive numbers"):
            chosen("mse", bin_weights=bin_weights)
    for percent in (0, 101, np.nan):
        with pytest.raises(UsageError, match="percentile: expected more than 0"):
            chosen("percentile", percent=percent)
    with pytest.raises(UsageError, match=r"method: expected one of minmax, .* for int8, got best"):
        chosen("best")  # type: ignore[arg-type]
    int8_methods: tuple[Method, ...] = ("mse", "entropy")
    for method in int8_methods:
        with pytest.raises(UsageError, match=f"expected one of minmax, percentile, output-error for fp8, got {method}"):
            chosen(method, kind="fp8")
    pair = pair_of("linear")
    layers, statistics = seen_by(pair, inputs_of("linear"))
    other = Statistics({}, statistics.bins, statistics.steps, 4, statistics.capacity, statistics.seed)
    with pytest.raises(CalibrationError, match=r"one\.weight: expected statistics of its input, found none"):
        choose_scales(layers, other, weights_of(pair))
    wide = {name: of_array(np.ones((3, 6, 3, 3), np.float32)) for name in ("one.weight", "other.weight")}
    with pytest.raises(CalibrationError, match="layers that read 6 numbers for an output, got 54, 54"):
        choose_scales(layers, statistics, wide)
