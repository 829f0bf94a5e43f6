"""What the inputs of layers look like over the steps of sampling, streamed from a network in PyTorch.

Everything that is kept can be merged, and a row's part in it depends on that row alone: whatever order rows come in,
and in however many runs, the statistics are the same. Memory grows with the layers and their channels, not with the
rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from latentrt.runtime.errors import CalibrationError
from latentrt.runtime.specs import Array

from . import histogram, reservoir, windows
from .calls import Call
from .histogram import BINS, Histogram
from .layers import Layer, groups, layer_modules
from .reservoir import Reservoir

# Rows of a reservoir: of layers with one tap; others get as many numbers, in fewer rows.
DEFAULT_ROWS = 4096
DEFAULT_BINS = 8


@dataclass(frozen=True)
class InputStatistics:
    """One tensor in one timestep bin.

    Attributes:
        amax: (channels,) largest absolute value.
        sums: (channels,) of the values.
        count: values of every channel.
        histogram: of the absolute values.
        reservoir: of what an output position reads, (inputs · taps,) as a row of the weight is laid out.
    """

    amax: NDArray[np.float32]
    sums: NDArray[np.float64]
    count: int
    histogram: Histogram
    reservoir: Reservoir

    @property
    def mean(self) -> NDArray[np.float64]:
        """(channels,) of the values."""
        return self.sums / self.count


@dataclass(frozen=True)
class Statistics:
    """All inputs of a network's layers.

    Attributes:
        inputs: by `Layer.group`, by timestep bin; bins that no row fell into are left out.
        bins: into which the timesteps are divided.
        steps: timesteps of the noise schedule; bin k begins at k · steps / bins.
        rows: of the network that were seen.
        capacity: rows of a reservoir over all bins, where a layer has one tap.
        seed: of the reservoirs.
    """

    inputs: Mapping[str, Mapping[int, InputStatistics]]
    bins: int
    steps: int
    rows: int
    capacity: int
    seed: int


def estimated_bytes(layers: Sequence[Layer], *, bins: int = DEFAULT_BINS, capacity: int = DEFAULT_ROWS) -> int:
    """Memory that the statistics take at most; one batch's activations and the weights at hand come on top."""
    total = 0
    for layer in (members[0] for members in groups(layers).values()):
        sampled = (_rows_of_bin(capacity, bins, layer.taps) + 1) * (2 * layer.inputs * layer.taps + 16)
        total += bins * (sampled + 8 * BINS + 12 * layer.inputs)
    return total


def collect(
    wrapper: nn.Module,
    layers: Sequence[Layer],
    calls: Iterable[Call],
    *,
    bins: int = DEFAULT_BINS,
    steps: int = 1000,
    capacity: int = DEFAULT_ROWS,
    seed: int = 0,
    device: str = "cpu",
) -> Statistics:
    """Run a network over captured calls and look at what its layers are given.

    Args:
        wrapper: the module that the graph was traced from, which takes its inputs by name; its weights are at hand.
        layers: of the graph.
        calls: of the network, of any number of rows; the calls of one that is told no timestep all have the same.
        bins: to divide the timesteps into.
        steps: timesteps of the model's noise schedule.
        capacity: rows to keep of every input, over all bins; at least `bins`.
        seed: of the choice of rows.
        device: that the inputs are put on, and the weights are on.

    Raises:
        CalibrationError: there is no row; an input is NaN or infinite (names layer and timestep); graph and module
            have different layers.
    """
    modules = layer_modules(layers, wrapper)
    found: dict[str, dict[int, InputStatistics]] = {name: {} for name in groups(layers)}
    running: list[_Running] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            (call,) = running
            rows = _rows_of_bin(capacity, bins, windows.taps(module))
            held = found[name].get(call.bin)
            floor = 0.0 if held is None else held.reservoir.floor
            own = _observed(name, module, inputs[0], call, capacity=rows, floor=floor)
            found[name][call.bin] = own if held is None else _merged_inputs(held, own)

        return look

    hooks = [modules[name].register_forward_pre_hook(watch(name)) for name in found]
    seen = 0
    try:
        with torch.inference_mode():
            for call in calls:
                keys = tuple(_row_key(call.feeds, row, seed) for row in range(call.rows))
                running[:] = [_Running(call.timestep, timestep_bin(call.timestep, bins=bins, steps=steps), keys)]
                wrapper(**{name: torch.from_numpy(np.array(values)).to(device) for name, values in call.feeds.items()})
                seen += call.rows
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise CalibrationError("statistics: expected captured rows, got none. Capture with more prompts or steps.")
    inputs = {name: dict(sorted(own.items())) for name, own in found.items()}
    return Statistics(inputs=inputs, bins=bins, steps=steps, rows=seen, capacity=capacity, seed=seed)


def merged(one: Statistics, other: Statistics) -> Statistics:
    """The statistics of the rows of both.

    Raises:
        CalibrationError: they are of other layers or were made with other options.
    """
    for what in ("bins", "steps", "capacity", "seed"):
        if getattr(one, what) != getattr(other, what):
            raise CalibrationError(
                f"statistics: expected {what} {getattr(one, what)} as in the first, got {getattr(other, what)}. "
                "Collect both with the same options."
            )
    if one.inputs.keys() != other.inputs.keys():
        raise CalibrationError("statistics: expected the same layers in both, got others. They are of two models.")
    inputs = {}
    for name, ours in one.inputs.items():
        theirs = other.inputs[name]
        both = {index: _merged_inputs(ours[index], theirs[index]) for index in ours.keys() & theirs.keys()}
        inputs[name] = dict(sorted({**ours, **theirs, **both}.items()))
    return Statistics(inputs, one.bins, one.steps, one.rows + other.rows, one.capacity, one.seed)


def timestep_bin(timestep: float, *, bins: int, steps: int) -> int:
    """The bin of a timestep; those outside of the schedule belong to the outermost."""
    return int(np.clip(timestep * bins / steps, 0, bins - 1))


@dataclass(frozen=True)
class _Running:
    """What the hooks have to know of the call that is running.

    Attributes:
        timestep: of its rows.
        bin: that the timestep falls into.
        keys: (rows,) of their contents.
    """

    timestep: float
    bin: int
    keys: tuple[int, ...]


def _row_key(feed: Mapping[str, Array], row: int, seed: int) -> int:
    """A number that a row's content alone decides, so that its random numbers do not depend on its company."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=16)
    for name in sorted(feed):
        digest.update(np.ascontiguousarray(feed[name][row]).tobytes())
    return int.from_bytes(digest.digest(), "little")


def _merged_inputs(one: InputStatistics, other: InputStatistics) -> InputStatistics:
    return InputStatistics(
        amax=np.maximum(one.amax, other.amax),
        sums=one.sums + other.sums,
        count=one.count + other.count,
        histogram=histogram.merged(one.histogram, other.histogram),
        reservoir=reservoir.merged(one.reservoir, other.reservoir),
    )


def _observed(
    name: str, module: nn.Module, inputs: torch.Tensor, call: _Running, *, capacity: int, floor: float
) -> InputStatistics:
    """The statistics of one call's input."""
    inputs = inputs.detach().float()
    # (rows, channels, y, x)
    maps = inputs
    if not isinstance(module, nn.Conv2d):
        maps = inputs.reshape(len(inputs), -1, inputs.shape[-1]).transpose(1, 2)[..., None]
    sizes = maps.abs()
    amax = sizes.amax((0, 2, 3))
    if not torch.isfinite(amax).all():
        raise CalibrationError(
            f"{name}: expected finite inputs, got NaN or infinity at timestep {call.timestep:g}. Check the checkpoint "
            "and the captured inputs."
        )
    largest = F.max_pool2d(sizes.amax(1), *windows.geometry(module)).flatten(1).double().cpu().numpy()
    return InputStatistics(
        amax=amax.cpu().numpy(),
        # Of a row in float32, which PyTorch adds up pairwise.
        sums=maps.sum((2, 3)).sum(0, dtype=torch.float64).cpu().numpy(),
        count=maps.numel() // maps.shape[1],
        histogram=histogram.histogram_of(inputs),
        reservoir=reservoir.reservoir_of(
            np.square(largest).reshape(-1),
            np.concatenate([_uniform(name, key, largest.shape[1]) for key in call.keys]),
            windows.reader(maps, module),
            capacity=capacity,
            floor=floor,
        ),
    )


def _uniform(name: str, key: int, count: int) -> NDArray[np.float64]:
    """Random numbers in (0, 1] for the positions of one row in one layer."""
    layer = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return 1.0 - np.random.default_rng([key, layer]).random(count)


def _rows_of_bin(capacity: int, bins: int, taps: int) -> int:
    """Rows that the reservoir of a bin holds."""
    return max(1, capacity // (bins * taps))
