"""Choosing what the channels of a layer's input are divided by, so that rounding loses least of its output.

SmoothQuant, Xiao et al. 2022 (arXiv 2211.10438): channel c is divided by

    v_c = max |x_c| ** alpha / max |w_c| ** (1 - alpha),

which moves the spread of the channels from the input, which has one scale, to the weights. alpha is searched for by the
error of what the layers put out, each alpha with the clip that suits it, as in AWQ (Lin et al. 2023, arXiv 2306.00978).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from latentrt.export.weights import Weight
from latentrt.runtime.errors import CalibrationError

from .layer_quant import Kind
from .layers import Layer, groups
from .reservoir import Reservoir
from .scales import largest_of, output_errors, scale_of
from .smoothing_sites import Site
from .statistics import InputStatistics, Statistics

Vector = NDArray[np.float32]

# At 1 every channel would fill the range with what calibration saw of it, and clip whatever it did not see: on
# held-out prompts 0.8 at most is better than a search up to 1.
ALPHAS: tuple[float, ...] = tuple(round(0.1 * step, 1) for step in range(1, 9))
# Decibels of the layers' output that a multiplication before them has to win; what is free has to win anything at all.
# On the shapes model, the third of the multiplications that win less are worth 0.05 dB of the prediction together.
DEFAULT_THRESHOLD = 3.0
# No channel is divided or multiplied by more than this, and none is larger than float16 holds with room for values
# that calibration did not see.
_LIMIT = 2.0**8
_LARGEST = float(np.finfo(np.float16).max) / 16
# Of the largest value, what is tried as a clip with each alpha. The scale itself is chosen afterwards, more finely.
_CLIPS: tuple[float, ...] = (1.0, 0.85, 0.7, 0.55, 0.4)
# What an alpha is judged by: sampled rows and outputs of each layer at most, and numbers that the rows hold.
_ROWS, _OUTPUTS, _NUMBERS = 512, 64, 2**20
_LEAST_ROWS = 64


def choose_smoothing(
    layers: Sequence[Layer],
    sites: Mapping[str, Site],
    statistics: Statistics,
    weights: Mapping[str, Weight],
    *,
    kind: Kind = "int8",
    bin_weights: Sequence[float] | None = None,
    gain_threshold: float = DEFAULT_THRESHOLD,
) -> dict[str, Vector]:
    """The vectors by group of those tensors that are better quantized divided, for `SmoothPass` and `LayerQuant`.

    Args:
        layers: to quantize. Those of a group that are left out have no say.
        sites: of their graph, from `smoothing_sites`.
        statistics: of the network that they are of.
        weights: by the names of the layers, as PyTorch has them, (outputs, inputs, …).
        kind: what tensors and weights are rounded to.
        bin_weights: what each timestep bin counts; all the same if left out.
        gain_threshold: decibels of the layers' output that a site which costs a multiplication has to win.

    Returns:
        (channels,) each, positive; the reciprocals are numbers that float16 holds.

    Raises:
        UsageError: bin_weights cannot be taken.
        CalibrationError: a group has no statistics.
    """
    counts = np.ones(statistics.bins) if bin_weights is None else np.asarray(bin_weights, np.float64)
    vectors = {}
    for group, members in groups(layers).items():
        if group not in sites:
            continue
        seen = statistics.inputs.get(group)
        if not seen:
            raise CalibrationError(
                f"{group}: expected statistics of its input, found none. They are of another graph: collect them again."
            )
        # Layers of another kernel's size see other rows than were sampled.
        matrices = [weights[layer.name].read() for layer in members if layer.taps == members[0].taps]
        vector, gain = best_vector(seen, matrices, sites[group].branches, kind=kind, bin_weights=counts)
        if vector is not None and gain > (0.0 if sites[group].how != "mul" else gain_threshold):
            vectors[group] = vector
    return vectors


def best_vector(
    seen: Mapping[int, InputStatistics],
    weights: Sequence[NDArray[np.floating]],
    branches: Sequence[int] = (),
    *,
    kind: Kind = "int8",
    bin_weights: NDArray[np.float64],
) -> tuple[Vector | None, float]:
    """The vector of least output error, and how many decibels it is better than none; None and 0 if none is best.

    Args:
        seen: of the tensor, by timestep bin.
        weights: of the layers that read it, each (outputs, inputs, …).
        branches: channels that share a number; each has its own if left out.
        kind: what tensor and weights are rounded to.
        bin_weights: (bins,) what each timestep bin counts.
    """
    inputs = np.max([each.amax for each in seen.values()], axis=0)
    columns = np.max([np.abs(weight).max(axis=(0, *range(2, weight.ndim))) for weight in weights], axis=0)
    sampled = _thinned(seen)
    matrices = [_some_outputs(weight) for weight in weights]
    tried: dict[float | None, Vector | None] = {None: None}
    tried |= {alpha: smoothing_vector(inputs, columns, alpha, branches) for alpha in ALPHAS}
    errors = {}
    for alpha, vector in tried.items():
        largest = largest_of(seen, vector)
        scales = [scale_of(largest * clip, kind) for clip in _CLIPS]
        errors[alpha] = min(output_errors(sampled, matrices, scales, bin_weights=bin_weights, vector=vector, kind=kind))
    best = min(errors, key=lambda alpha: errors[alpha])
    if best is None or not errors[best] > 0:
        return None, 0.0
    return tried[best], 10 * math.log10(errors[None] / errors[best])


def smoothing_vector(
    inputs: NDArray[np.floating], columns: NDArray[np.floating], alpha: float, branches: Sequence[int] = ()
) -> Vector:
    """SmoothQuant's vector (channels,), of geometric mean 1 but for what float16 asks for.

    Channels that are always zero, in the input or in the weights, are left alone.

    Args:
        inputs: (channels,) largest absolute values.
        columns: (channels,) of the weights.
        alpha: from 0, where weights are levelled, to 1, where inputs are.
        branches: channels that share a number, with the largest values of all of them.
    """
    if branches:
        inputs, columns = (_by_branch(values, branches) for values in (inputs, columns))
    live = (inputs > 0) & (columns > 0)
    if not live.any():
        return np.ones(len(inputs), np.float32)
    logarithms = alpha * np.log(np.where(live, inputs, 1.0)) - (1 - alpha) * np.log(np.where(live, columns, 1.0))
    centred = np.where(live, logarithms - logarithms[live].mean(), 0.0)
    wanted = np.clip(np.exp(centred), 1 / _LIMIT, _LIMIT)
    reciprocals = np.minimum(1 / wanted, _LARGEST / np.maximum(inputs, 1e-30))
    # The graph multiplies with the reciprocals; in float16 and in float32 they are to be the same numbers.
    return np.asarray(1 / reciprocals.astype(np.float16).astype(np.float64), np.float32)


def _by_branch(values: NDArray[np.floating], branches: Sequence[int]) -> NDArray[np.floating]:
    parts = np.split(values, np.cumsum(branches)[:-1])
    return np.concatenate([np.full(len(part), part.max()) for part in parts])


def _thinned(seen: Mapping[int, InputStatistics]) -> dict[int, InputStatistics]:
    """The same with fewer rows: the rows of highest priority are what a smaller reservoir would have kept."""
    width = max(each.reservoir.rows.shape[1] for each in seen.values())
    capacity = max(1, min(_ROWS, max(_LEAST_ROWS, _NUMBERS // width)) // len(seen))
    thinned = {}
    for index, each in seen.items():
        held = each.reservoir
        kept = slice(min(capacity, held.capacity) + 1)
        fewer = Reservoir(min(capacity, held.capacity), held.priorities[kept], held.importance[kept], held.rows[kept])
        thinned[index] = replace(each, reservoir=fewer)
    return thinned


def _some_outputs(weight: NDArray[np.floating]) -> NDArray[np.floating]:
    """A random choice of the outputs, the same every time."""
    if len(weight) <= _OUTPUTS:
        return weight
    chosen = np.random.default_rng(len(weight)).choice(len(weight), _OUTPUTS, replace=False)
    return weight[np.sort(chosen)]
