from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn
from torch.nn import functional as F

from latentrt.calibrate.calls import Call
from latentrt.calibrate.layers import Layer, kind_of
from latentrt.calibrate.scales import largest_of, output_errors, scale_of
from latentrt.calibrate.smoothing import best_vector, choose_smoothing, smoothing_vector
from latentrt.calibrate.smoothing_sites import How, Site
from latentrt.calibrate.statistics import InputStatistics, Statistics, collect
from latentrt.export.weights import of_array
from latentrt.runtime.errors import CalibrationError

WIDTH, TOKENS = 320, 96
# Group, by the layer that reads it, and how it can be divided.
GROUPS: dict[str, tuple[str, How]] = {
    "attn1.to_q": ("attn1.to_q", "norm"),
    "attn1.to_k": ("attn1.to_q", "norm"),
    "attn1.to_v": ("attn1.to_q", "norm"),
    "attn1.to_out.0": ("attn1.to_out.0", "value"),
    "attn2.to_q": ("attn2.to_q", "norm"),
    "attn2.to_out.0": ("attn2.to_out.0", "value"),
    "ff.net.0.proj": ("ff.net.0.proj", "norm"),
    "ff.net.2": ("ff.net.2", "geglu"),
}


class Net(nn.Module):
    """Modules called by the names of a graph's inputs."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, sample: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None) -> Any:
        if encoder_hidden_states is None:
            return self.block(sample)
        return self.block(sample, encoder_hidden_states=encoder_hidden_states)


def layer_of(name: str, module: Any, group: str) -> Layer:
    shape = module.weight.shape
    return Layer(
        name=name,
        operator="Conv" if len(shape) == 4 else "MatMul",
        kind=kind_of(name),
        input=group,
        group=group,
        inputs=shape[1],
        outputs=shape[0],
        taps=math.prod(shape[2:]),
        macs=1,
        share=0.0,
    )


def calls(count: int, seed: int) -> list[Call]:
    generator = np.random.default_rng(seed)
    return [
        Call(
            {
                "sample": generator.standard_normal((2, TOKENS, WIDTH), np.float32),
                "encoder_hidden_states": generator.standard_normal((2, 77, 768), np.float32),
            },
            prompt=0,
            timestep=125.0 * index,
            negatives=1,
            guidance=7.5,
        )
        for index in range(count)
    ]


def block_with_outliers() -> BasicTransformerBlock:
    """SD 1.5's block at its first width, random, with a few channels that are far larger than the others."""
    torch.manual_seed(0)
    block = BasicTransformerBlock(WIDTH, 8, 40, cross_attention_dim=768, activation_fn="geglu").eval()
    with torch.no_grad():
        for norm in (block.norm1, block.norm2, block.norm3):
            norm.weight[torch.randperm(WIDTH)[:6]] *= 40
        for projection in (block.attn1.to_v, block.attn2.to_v):
            projection.weight[torch.randperm(WIDTH)[:6]] *= 20
        block.ff.net[0].proj.weight[torch.randperm(4 * WIDTH)[:12]] *= 20
    return block.requires_grad_(False)


@contextmanager
def eight_bits(block: nn.Module, vectors: Mapping[str, Any], known: Sequence[Call]) -> Any:
    """Every layer of GROUPS in eight bits, scaled by the largest values of known calls; written anew."""
    ranges: dict[str, float] = {}

    def divided(x: torch.Tensor, name: str) -> torch.Tensor:
        vector = vectors.get(f"block.{GROUPS[name][0]}.weight")
        return x if vector is None else x / torch.from_numpy(vector)

    def largest(name: str) -> Any:
        def look(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            ranges[name] = max(ranges.get(name, 0.0), float(divided(inputs[0], name).abs().max()))

        return look

    hooks = [block.get_submodule(name).register_forward_pre_hook(largest(name)) for name in GROUPS]
    for call in known:
        output(block, call)
    for hook in hooks:
        hook.remove()

    def quantized(name: str, module: Any) -> Any:
        vector = vectors.get(f"block.{GROUPS[name][0]}.weight")
        weight = module.weight if vector is None else module.weight * torch.from_numpy(vector)
        steps = weight.abs().amax(1, keepdim=True) / 127
        weight = (weight / steps).round().clamp(-127, 127) * steps
        step = ranges[name] / 127

        def forward(x: torch.Tensor, *_: Any) -> torch.Tensor:
            return F.linear((divided(x, name) / step).round().clamp(-128, 127) * step, weight, module.bias)

        return forward

    modules = {name: block.get_submodule(name) for name in GROUPS}
    try:
        for name, module in modules.items():
            module.forward = quantized(name, module)
        yield
    finally:
        for module in modules.values():
            del module.forward


def output(block: nn.Module, call: Call) -> torch.Tensor:
    """What a block adds to its input."""
    sample, text = (torch.from_numpy(call.feeds[name]) for name in ("sample", "encoder_hidden_states"))
    added: torch.Tensor = block(sample, encoder_hidden_states=text) - sample
    return added


def sqnr(block: nn.Module, vectors: Mapping[str, Any], known: Sequence[Call], held_out: Sequence[Call]) -> float:
    exact = torch.cat([output(block, call) for call in held_out])
    with eight_bits(block, vectors, known):
        rounded = torch.cat([output(block, call) for call in held_out])
    return float(10 * torch.log10(exact.square().sum() / (exact - rounded).square().sum()))


def test_outlier_channels_of_a_full_width_block_are_recovered() -> None:
    block, known, held_out = block_with_outliers(), calls(8, 1), calls(3, 2)
    wrapper = Net(block)
    modules = dict(block.named_modules())
    layers = [
        layer_of(f"block.{name}.weight", modules[name], f"block.{group}.weight") for name, (group, _) in GROUPS.items()
    ]
    text = [layer_of(f"block.attn2.to_{x}.weight", modules[f"attn2.to_{x}"], "block.attn2.to_k.weight") for x in "kv"]
    statistics = collect(wrapper, [*layers, *text], known, capacity=1024)
    weights = {layer.name: of_array(wrapper.get_parameter(layer.name).numpy()) for layer in layers}
    sites = {f"block.{group}.weight": Site(how, 0) for group, how in GROUPS.values()}
    vectors = choose_smoothing(layers, sites, statistics, weights)
    before, after = sqnr(block, {}, known, held_out), sqnr(block, vectors, known, held_out)
    assert after >= before + 8


POSITIVE = st.floats(1e-3, 1e3)


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=12), st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_a_vector_is_smoothquants_with_reciprocals_that_float16_holds(
    largest: list[tuple[float, float]], alpha: float
) -> None:
    inputs, columns = (np.array(values) for values in zip(*largest, strict=True))
    vector = smoothing_vector(inputs, columns, alpha)
    wanted = inputs**alpha / columns ** (1 - alpha)
    wanted = np.clip(wanted / np.exp(np.log(wanted).mean()), 1 / 256, 256)
    # A sixteenth of what float16 holds.
    wanted = np.maximum(wanted, inputs / (65504 / 16))
    assert vector.dtype == np.float32
    # Half a step of float16.
    assert_allclose(vector, wanted, rtol=2**-10.9)
    halves = (1 / vector.astype(np.float64)).astype(np.float16)
    assert_allclose(halves.astype(np.float64), 1 / vector.astype(np.float64), rtol=1e-7)


def test_channels_that_are_always_zero_are_left_alone_and_have_no_say() -> None:
    inputs, columns = np.array([0.0, 4.0, 1.0, 9.0]), np.array([1.0, 1.0, 1.0, 0.0])
    assert_allclose(smoothing_vector(inputs, columns, 1.0), [1, 2, 0.5, 1])
    assert_array_equal(smoothing_vector(np.zeros(3), np.ones(3), 0.5), np.ones(3))


def test_no_channel_leaves_float16() -> None:
    inputs = np.array([60000.0, 1.0, 1.0, 1.0])
    # Weights alone would have it divided by 1/16 and more.
    vector = smoothing_vector(inputs, np.array([1e3, 1.0, 1.0, 1.0]), 0.0)
    assert (inputs / vector).max() <= 65504 / 16 * 1.001


def test_branches_have_one_number_each() -> None:
    inputs, columns = np.array([1.0, 4.0, 0.0, 64.0, 2.0]), np.array([1.0, 1.0, 1.0, 0.5, 1.0])
    vector = smoothing_vector(inputs, columns, 1.0, branches=(2, 3))
    mean = math.exp((2 * math.log(4) + 3 * math.log(64)) / 5)
    assert_allclose(vector, np.array([4, 4, 64, 64, 64]) / mean, rtol=2**-10.9)


def statistics_of(module: nn.Module, samples: Sequence[Any]) -> Statistics:
    layer = layer_of("block.weight", module, "block.weight")
    recorded = [
        Call({"sample": sample}, prompt=0, timestep=250.0 * index, negatives=0, guidance=1.0)
        for index, sample in enumerate(samples)
    ]
    return collect(Net(module), [layer], recorded, capacity=512)


def conv(large: float) -> tuple[nn.Conv2d, list[Any]]:
    """A convolution and inputs of which one channel of sixteen is larger, with weights that are as much smaller."""
    torch.manual_seed(1)
    module = nn.Conv2d(16, 24, 3, padding=1).requires_grad_(False)
    module.weight[:, 3] /= large
    generator = np.random.default_rng(3)
    samples = [generator.standard_normal((2, 16, 8, 8), np.float32) for _ in range(4)]
    for sample in samples:
        sample[:, 3] *= large
    return module, samples


def noise(module: nn.Conv2d, seen: Mapping[int, InputStatistics], vector: Any) -> float:
    """Of the output of a layer, in decibels, at the scale that clips nothing."""
    scale, weight = scale_of(largest_of(seen, vector)), module.weight.numpy()
    return 10 * math.log10(output_errors(seen, [weight], [scale], bin_weights=np.ones(8), vector=vector)[0])


@pytest.mark.parametrize("large", [32.0, 100.0])
def test_an_outlier_channel_that_weights_make_up_for_costs_nothing_after_smoothing(large: float) -> None:
    plain, level = conv(1.0)
    module, samples = conv(large)
    without = statistics_of(plain, level).inputs["block.weight"]
    seen = statistics_of(module, samples).inputs["block.weight"]
    vector, gain = best_vector(seen, [module.weight.numpy()], bin_weights=np.ones(8))
    assert vector is not None
    assert vector[3] / np.delete(vector, 3).mean() == pytest.approx(large, rel=0.35)
    # The two layers are one function, and one is quantized as well as the other.
    assert noise(module, seen, vector) < noise(plain, without, None) + 0.5
    assert noise(module, seen, None) > noise(module, seen, vector) + 15
    assert gain > 15
    _, nothing = best_vector(without, [plain.weight.numpy()], bin_weights=np.ones(8))
    assert nothing < 1


def test_a_multiplication_has_to_be_worth_it_and_a_fold_does_not() -> None:
    module, samples = conv(4.0)
    statistics = statistics_of(module, samples)
    layers = [layer_of("block.weight", module, "block.weight")]
    weights = {"block.weight": of_array(module.weight.numpy())}
    _, gain = best_vector(statistics.inputs["block.weight"], [module.weight.numpy()], bin_weights=np.ones(8))

    def chosen(how: How, threshold: float) -> set[str]:
        sites = {"block.weight": Site(how, 16)}
        return set(choose_smoothing(layers, sites, statistics, weights, gain_threshold=threshold))

    assert gain > 3
    assert chosen("mul", gain - 0.1) == {"block.weight"}
    assert chosen("mul", gain + 0.1) == set()
    assert chosen("norm", gain + 0.1) == {"block.weight"}
    assert choose_smoothing(layers, {}, statistics, weights) == {}


def test_a_branch_that_is_larger_is_found() -> None:
    torch.manual_seed(2)
    module = nn.Conv2d(32, 24, 1).requires_grad_(False)
    generator = np.random.default_rng(4)
    samples = [generator.standard_normal((2, 32, 8, 8), np.float32) for _ in range(4)]
    module.weight[:, :8] /= 25
    for sample in samples:
        sample[:, :8] *= 25
    weights = {"block.weight": of_array(module.weight.numpy())}
    layers = [layer_of("block.weight", module, "block.weight")]
    sites = {"block.weight": Site("split", 32, branches=(8, 24))}
    vector = choose_smoothing(layers, sites, statistics_of(module, samples), weights)["block.weight"]
    assert len(set(vector[:8])) == len(set(vector[8:])) == 1
    assert vector[0] / vector[-1] == pytest.approx(25, rel=0.4)


def test_an_input_that_is_always_zero_has_no_vector() -> None:
    module, samples = conv(1.0)
    seen = statistics_of(module, [0 * sample for sample in samples]).inputs["block.weight"]
    assert best_vector(seen, [module.weight.numpy()], bin_weights=np.ones(8)) == (None, 0.0)


def test_a_group_without_statistics_is_named() -> None:
    module, samples = conv(1.0)
    layer = layer_of("other.weight", module, "other.weight")
    with pytest.raises(CalibrationError, match=r"other\.weight: expected statistics of its input, found none"):
        choose_smoothing([layer], {"other.weight": Site("mul", 16)}, statistics_of(module, samples), {})
