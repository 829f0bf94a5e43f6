from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_layers import layers_of
from torch import nn
from torch.nn import functional as F

from latentrt.calibrate.calls import Call
from latentrt.calibrate.histogram import EDGES
from latentrt.calibrate.statistics import InputStatistics, Statistics, collect, estimated_bytes, merged, timestep_bin
from latentrt.export.networks import libraries_quiet
from latentrt.export.vae import VaeDecoder
from latentrt.runtime.errors import CalibrationError


class Net(nn.Module):
    """Every kind of layer: a 3 x 3 convolution, one with stride, two linear layers of one input, a vector's."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 3)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 5, 3, stride=2, padding=1)
        self.query = nn.Linear(5, 6)
        self.key = nn.Linear(5, 2)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden = self.down(self.conv(sample + self.time(timestep[:, None])[..., None, None]))
        tokens = hidden.flatten(2).transpose(1, 2)
        out: torch.Tensor = self.query(tokens).sum(-1) * self.key(tokens).sum(-1)
        return out


GROUPS = {"key.weight": "query.weight"}
NAMES = {"time.weight", "conv.weight", "down.weight", "query.weight"}


def whole_net() -> Net:
    """Weights and sums are small whole numbers, so that no order of adding matters."""
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for values in net.parameters():
            values.copy_(torch.randint(-1, 2, values.shape))
    return net


NET = whole_net()
LAYERS = layers_of(NET, GROUPS)
SAMPLES = np.random.default_rng(0).integers(-2, 3, (8, 3, 6, 4)).astype(np.float32)
TIMES = np.array([1, 1, 1, 1, 7, 7, 7, 7], np.float32)


def calls(*parts: Sequence[int]) -> Iterator[Call]:
    for part in parts:
        rows = list(part)
        yield Call({"sample": SAMPLES[rows], "timestep": TIMES[rows]}, 0, float(TIMES[rows[0]]), 0, 1.0)


def collected(*parts: Sequence[int], **options: Any) -> Statistics:
    return collect(NET, LAYERS, calls(*parts), **{"bins": 2, "steps": 10, "capacity": 10_000, **options})


def arrays(own: InputStatistics) -> dict[str, Any]:
    held = own.reservoir
    return {
        "amax": own.amax,
        "sums": own.sums,
        "count": own.count,
        "counts": own.histogram.counts,
        "extremes": (own.histogram.least, own.histogram.largest),
        "priorities": held.priorities,
        "importance": held.importance,
        "rows": held.rows,
    }


def assert_same(one: Statistics, other: Statistics) -> None:
    assert one.inputs.keys() == other.inputs.keys()
    assert (one.rows, one.bins, one.steps) == (other.rows, other.bins, other.steps)
    for name, bins in one.inputs.items():
        assert list(bins) == list(other.inputs[name])
        for index, own in bins.items():
            for what, values in arrays(own).items():
                np.testing.assert_array_equal(values, arrays(other.inputs[name][index])[what], f"{name} {what}")


def inputs_of(rows: Sequence[int]) -> dict[str, tuple[Any, torch.Tensor]]:
    """Layers and what PyTorch gives them, by the names of their weights."""
    found: dict[str, tuple[Any, torch.Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda own, given, _, path=path: found.update({f"{path}.weight": (own, given[0])}))
        for path, module in NET.named_children()
    ]
    with torch.no_grad():
        NET(torch.from_numpy(SAMPLES[list(rows)]), torch.from_numpy(TIMES[list(rows)]))
    for hook in hooks:
        hook.remove()
    return found


def test_statistics_are_those_of_the_inputs_that_layers_are_given() -> None:
    statistics = collected(range(4), range(4, 8))
    assert statistics.inputs.keys() == NAMES
    assert statistics.rows == 8
    for index, rows in enumerate((range(4), range(4, 8))):
        for name, (module, values) in inputs_of(rows).items():
            if name not in NAMES:
                continue
            own = statistics.inputs[name][index]
            numbers = values.numpy() if values.ndim != 4 else values.movedim(1, -1).numpy()
            numbers = numbers.reshape(-1, numbers.shape[-1]).astype(np.float64)
            np.testing.assert_array_equal(own.amax, np.abs(numbers).max(0))
            np.testing.assert_array_equal(own.mean, numbers.mean(0))
            expected, _ = np.histogram(np.abs(numbers), bins=EDGES)
            np.testing.assert_array_equal(own.histogram.counts, expected)
            # With room for all, the rows of a weight times what was sampled are the layer's outputs, in any order.
            sampled, counts = own.reservoir.sample()
            weight = module.weight.detach().flatten(1).numpy()
            with torch.no_grad():
                outputs = module(values) - module.bias.reshape(-1, *(1,) * (2 * (values.ndim == 4)))
            outputs = outputs.movedim(1, -1) if values.ndim == 4 else outputs
            outputs = outputs.reshape(-1, len(weight)).numpy()
            products = sampled.astype(np.float32) @ weight.T
            # Rows of nothing but zeros are not kept.
            zeros = np.zeros((len(outputs) - len(products), len(weight)), np.float32)
            found = np.concatenate([products, zeros])
            np.testing.assert_array_equal(found[np.lexsort(found.T)], outputs[np.lexsort(outputs.T)])
            assert (counts == 1).all()


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(4)), st.permutations(range(4, 8)), st.integers(1, 3), st.sampled_from([40, 10_000]))
def test_order_and_company_of_rows_do_not_matter(early: list[int], late: list[int], cut: int, capacity: int) -> None:
    whole = collected(range(4), range(4, 8), capacity=capacity)
    assert_same(collected(late[:cut], early, late[cut:], capacity=capacity), whole)
    one = collected(early[:cut], capacity=capacity)
    other = collected(late, early[cut:], capacity=capacity)
    assert_same(merged(one, other), whole)
    assert_same(merged(other, one), whole)


def test_another_seed_samples_other_rows_of_the_same_numbers() -> None:
    one, other = (collected(range(4), capacity=40, seed=seed) for seed in (0, 1))
    mine, theirs = one.inputs["query.weight"][0], other.inputs["query.weight"][0]
    np.testing.assert_array_equal(mine.histogram.counts, theirs.histogram.counts)
    assert not np.array_equal(mine.reservoir.rows, theirs.reservoir.rows)


def test_statistics_of_other_kinds_do_not_merge() -> None:
    one = collected(range(4))
    others = {
        "bins": replace(one, bins=3),
        "steps": replace(one, steps=50),
        "capacity": replace(one, capacity=41),
        "seed": replace(one, seed=5),
    }
    for what, other in others.items():
        with pytest.raises(CalibrationError, match=f"expected {what} "):
            merged(one, other)
    with pytest.raises(CalibrationError, match="of two models"):
        merged(one, replace(one, inputs={}))


def test_memory_does_not_grow_with_the_rows() -> None:
    alive: list[weakref.ref[Any]] = []

    def many() -> Iterator[Call]:
        for seed in range(30):
            assert sum(ref() is not None for ref in alive) <= 1
            sample = np.random.default_rng(seed).standard_normal((2, 3, 6, 4), np.float32)
            call = Call({"sample": sample, "timestep": np.full(2, 3.0, np.float32)}, 0, 3.0 + 500 * (seed % 2), 0, 1.0)
            alive.append(weakref.ref(call))
            yield call

    def held(statistics: Statistics) -> int:
        return sum(
            np.asarray(values).nbytes
            for bins in statistics.inputs.values()
            for own in bins.values()
            for what, values in arrays(own).items()
            if what not in ("count", "extremes")
        )

    options: dict[str, Any] = {"bins": 2, "capacity": 36}
    assert held(collect(NET, LAYERS, many(), **options)) == estimated_bytes(LAYERS, bins=2, capacity=36)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_inputs_that_are_no_numbers_are_named_with_their_timestep(bad: float) -> None:
    sample = SAMPLES[:2].copy()
    sample[1, 2, 3, 1] = bad
    broken = Call({"sample": sample, "timestep": np.full(2, 321, np.float32)}, 0, 321.0, 0, 1.0)
    with pytest.raises(CalibrationError, match=r"^conv\.weight: .*NaN or infinity at timestep 321\."):
        collect(NET, LAYERS, [*calls(range(4)), broken])
    assert not any(module._forward_pre_hooks for module in NET.modules())


def test_no_calls_and_other_layers_are_refused() -> None:
    with pytest.raises(CalibrationError, match="captured rows, got none"):
        collect(NET, LAYERS, [])
    with pytest.raises(CalibrationError, match=r"Net: expected the layers .* 1 missing in the graph: time\.weight"):
        collect(NET, LAYERS[1:], calls(range(4)))


def test_a_decoder_has_one_bin_for_it_is_told_no_timestep() -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    torch.manual_seed(0)
    with libraries_quiet():
        vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, **blocks)
    decoder = VaeDecoder(vae).eval()
    latents = np.random.default_rng(0).standard_normal((3, 4, 5, 6)).astype(np.float32)
    layers = layers_of(decoder)
    statistics = collect(decoder, layers, [Call({"latent_sample": latents}, 0, 0.0, 0, 1.0)], bins=1)
    assert statistics.inputs.keys() == {layer.name for layer in layers}
    assert all(list(bins) == [0] for bins in statistics.inputs.values())
    first = statistics.inputs["post_quant_conv.weight"][0]
    np.testing.assert_array_equal(first.amax, np.abs(latents).max((0, 2, 3)))
    with torch.inference_mode():
        second = vae.post_quant_conv(torch.from_numpy(latents))
    np.testing.assert_allclose(statistics.inputs["decoder.conv_in.weight"][0].amax, second.abs().amax((0, 2, 3)))


def test_steps_of_the_schedule_are_divided_evenly() -> None:
    found = [timestep_bin(timestep, bins=4, steps=1000) for timestep in (-1, 0, 249.9, 250, 749, 750, 999, 5000)]
    assert found == [0, 0, 0, 1, 2, 3, 3, 3]


def test_convolutions_are_sampled_by_their_largest_input() -> None:
    statistics = collected(range(4), capacity=36)
    sampled = statistics.inputs["down.weight"][0].reservoir
    maps = inputs_of(range(4))["down.weight"][1]
    windows = F.unfold(maps, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1).numpy()
    for row, importance in zip(sampled.rows, sampled.importance, strict=True):
        assert (windows == row).all(1).any()
        assert importance == np.square(row.astype(np.float64)).max()
    assert len(sampled.rows) == 36 // (2 * 9) + 1
