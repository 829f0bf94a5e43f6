"""The scale of every quantized tensor, by one of five methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from latentrt.export.weights import Weight
from latentrt.runtime.errors import CalibrationError, UsageError

from .clipping import entropy_clip, mse_clip
from .histogram import Histogram, estimated, percentile, weighted
from .layer_quant import Kind
from .layers import Layer, groups
from .number_formats import LARGEST, STORED, half_scale, quantized, weight_scales
from .statistics import InputStatistics, Statistics

Method = Literal["minmax", "percentile", "entropy", "mse", "output-error"]
METHODS: tuple[Method, ...] = get_args(Method)
# These reckon with steps of equal width, which fp8 does not have.
_INT8_METHODS = ("entropy", "mse")
DEFAULT_PERCENT = 99.99
# Of the largest value, what the search for the least output error tries.
CANDIDATES: tuple[float, ...] = tuple(np.linspace(1.0, 0.3, 15))
# Sums of outputs with random signs that stand for all outputs of a group: the mean of their squares has the same
# expectation, and with the sum over rows it is right to well below the differences of candidates.
_OUTPUTS = 256

Floats = NDArray[np.float32]


def choose_scales(
    layers: Sequence[Layer],
    statistics: Statistics,
    weights: Mapping[str, Weight],
    *,
    method: Method = "output-error",
    bin_weights: Sequence[float] | None = None,
    percent: float = DEFAULT_PERCENT,
    vectors: Mapping[str, Floats] | None = None,
    kind: Kind = "int8",
) -> dict[str, float]:
    """Symmetric scales by layer, equal for all layers that read one tensor, as float16 can hold them.

    Args:
        layers: to quantize. Those of a group that are left out have no say in its scale.
        statistics: of the network that they are of.
        weights: by the names of the layers, as PyTorch has them, (outputs, inputs, …); read by output-error alone.
        method: minmax, the largest value ever seen; percentile; entropy and mse, of the tensor by itself;
            output-error, of what the layers make of it with their own quantized weights.
        bin_weights: what each timestep bin counts; all the same if left out. minmax heeds none.
        percent: of the values that `percentile` does not clip.
        vectors: by group, (inputs,) what the tensor's channels are divided by before they are quantized.
        kind: what tensors and weights are rounded to.

    Raises:
        UsageError: an option cannot be taken.
        CalibrationError: a layer has no statistics, or a scale is beyond float16.
    """
    counts = np.ones(statistics.bins) if bin_weights is None else np.asarray(bin_weights, np.float64)
    if counts.shape != (statistics.bins,) or not (np.isfinite(counts) & (counts > 0)).all():
        raise UsageError(f"bin_weights: expected {statistics.bins} positive numbers, got {bin_weights}.")
    check_method(method, percent, kind)
    scales: dict[str, float] = {}
    for group, members in groups(layers).items():
        seen, vector = statistics.inputs.get(group), (vectors or {}).get(group)
        if not seen:
            raise CalibrationError(
                f"{group}: expected statistics of its input, found none. They are of another graph: collect them again."
            )
        if method == "minmax":
            amax = largest_of(seen, vector)
        elif method == "output-error":
            matrices = _matching(group, seen, [weights[layer.name].read() for layer in members])
            amax = output_error_clip(seen, matrices, bin_weights=counts, vector=vector, kind=kind)
        else:
            over_time = weighted([_histogram(each, vector) for each in seen.values()], counts[list(seen)].tolist())
            amax = _tensor_clip(over_time, method, percent)
        scales |= dict.fromkeys((layer.name for layer in members), scale_of(amax, kind))
    return scales


def check_method(method: str, percent: float, kind: Kind) -> None:
    """Refuse what no scale can be chosen by.

    Raises:
        UsageError: no such method for the kind, or a percentage out of its range.
    """
    if not 0 < percent <= 100:
        raise UsageError(f"percentile: expected more than 0 and at most 100, got {percent:g}.")
    methods = [each for each in METHODS if kind == "int8" or each not in _INT8_METHODS]
    if method not in methods:
        raise UsageError(f"method: expected one of {', '.join(methods)} for {kind}, got {method}.")


def _matching(
    group: str, seen: Mapping[int, InputStatistics], weights: Sequence[NDArray[np.floating]]
) -> list[NDArray[np.floating]]:
    """The weights whose rows are laid out as the sampled rows; those of another kernel's size have no say."""
    width = next(iter(seen.values())).reservoir.rows.shape[1]
    found = [weight for weight in weights if weight[0].size == width]
    if not found:
        raise CalibrationError(
            f"{group}: expected layers that read {width} numbers for an output, got "
            f"{', '.join(str(weight[0].size) for weight in weights)}. Choose their scales with another method."
        )
    return found


def _histogram(seen: InputStatistics, vector: Floats | None) -> Histogram:
    """The histogram of a tensor divided by a vector, of the sampled rows and the exact largest value."""
    if vector is None:
        return seen.histogram
    rows, counts = seen.reservoir.sample()
    # The middle of the kernel meets every position alike; the others see padding.
    taps = rows.shape[1] // len(vector)
    return estimated(rows[:, taps // 2 :: taps] / vector, counts, _largest(seen, vector))


def _tensor_clip(seen: Histogram, method: Literal["percentile", "entropy", "mse"], percent: float) -> float:
    if method == "percentile":
        return percentile(seen, percent)
    return entropy_clip(seen) if method == "entropy" else mse_clip(seen)


def scale_of(amax: float, kind: Kind = "int8") -> float:
    """The scale at which `amax` is the largest step, rounded up to float16."""
    return float(half_scale(amax / LARGEST[kind]))


def largest_of(seen: Mapping[int, InputStatistics], vector: Floats | None = None) -> float:
    """The largest absolute value over all timesteps, of a tensor whose channels are divided by `vector` (channels,)."""
    return max(_largest(each, vector) for each in seen.values())


def _largest(seen: InputStatistics, vector: Floats | None) -> float:
    return seen.histogram.largest if vector is None else float((seen.amax / vector).max())


def output_error_clip(
    seen: Mapping[int, InputStatistics],
    weights: Sequence[NDArray[np.floating]],
    *,
    bin_weights: NDArray[np.float64],
    vector: Floats | None = None,
    kind: Kind = "int8",
) -> float:
    """The clip of CANDIDATES with the least error of the outputs of all layers that read a tensor.

    Args:
        seen: of the tensor, by timestep bin.
        weights: of the layers, each (outputs, inputs, …).
        bin_weights: (bins,) what each timestep bin counts.
        vector: (inputs,) what the tensor's channels are divided by, and the weights' multiplied with.
        kind: what tensor and weights are rounded to.
    """
    largest = largest_of(seen, vector)
    scales = [scale_of(largest * ratio, kind) for ratio in CANDIDATES]
    errors = output_errors(seen, weights, scales, bin_weights=bin_weights, vector=vector, kind=kind)
    return largest * CANDIDATES[int(np.argmin(errors))]


def output_errors(
    seen: Mapping[int, InputStatistics],
    weights: Sequence[NDArray[np.floating]],
    scales: Sequence[float],
    *,
    bin_weights: NDArray[np.float64],
    vector: Floats | None = None,
    kind: Kind = "int8",
) -> list[float]:
    """Noise over signal of the layers' outputs, summed over layers, at each of the scales of their input.

    Inputs are the sampled rows, each counting for those that it stands for; a bin counts by its weight, however many
    rows it has seen. Weights are quantized as they are in the graph.

    Args:
        seen: of the tensor, by timestep bin.
        weights: of the layers, each (outputs, inputs, …), not multiplied with the vector.
        scales: to try, of the tensor once it is divided.
        bin_weights: (bins,) what each timestep bin counts.
        vector: (inputs,) what the tensor's channels are divided by, and the weights' multiplied with.
        kind: what tensor and weights are rounded to.
    """
    rows, importance = _sampled(seen, bin_weights)
    factors = np.ones(1, np.float32)
    if vector is not None:
        # A row is laid out as a weight's: channel by channel, with all its taps.
        factors = np.repeat(vector, rows.shape[1] // len(vector)).astype(np.float32)
        rows = rows / factors
    exact, rounded = [], []
    for weight in weights:
        matrix = weight.reshape(len(weight), -1) * factors
        # PyTorch has outputs first, for every kind of layer.
        steps = weight_scales(matrix, 0, kind)
        restored = quantized(matrix, steps, 0, kind).astype(np.float32) * steps.astype(np.float32).reshape(-1, 1)
        pair = _condensed(np.stack([matrix, restored]))
        power = float(importance @ np.square(rows @ pair[0].T).sum(1, dtype=np.float64))
        gain = np.float32(1 / np.sqrt(power)) if power > 0 else np.float32(0)
        exact.append(gain * pair[0])
        rounded.append(gain * pair[1])
    wanted, both = rows @ np.concatenate(exact).T, np.concatenate(rounded).T
    errors = []
    for scale in scales:
        error = _restored(rows, np.float32(scale), kind) @ both - wanted
        errors.append(float(importance @ np.square(error).sum(1, dtype=np.float64)))
    return errors


def _restored(rows: Floats, scale: np.float32, kind: Kind) -> Floats:
    """Rows as QuantizeLinear and DequantizeLinear leave them: int8 has one step more below zero than above."""
    steps = rows / scale
    if kind == "int8":
        return np.asarray(np.clip(np.rint(steps), -LARGEST[kind] - 1, LARGEST[kind]) * scale, np.float32)
    within = np.clip(steps, -LARGEST[kind], LARGEST[kind]).astype(STORED[kind].numpy())
    return np.asarray(within.astype(np.float32) * scale, np.float32)


def _sampled(
    seen: Mapping[int, InputStatistics], bin_weights: NDArray[np.float64]
) -> tuple[Floats, NDArray[np.float64]]:
    """Rows (n, width) of all bins, and what each counts (n,)."""
    samples = {index: each.reservoir.sample() for index, each in seen.items()}
    rows = np.concatenate([sample for sample, _ in samples.values()]).astype(np.float32)
    parts = [bin_weights[index] / seen[index].count * counts for index, (_, counts) in samples.items()]
    return rows, np.concatenate(parts)


def _condensed(matrices: NDArray[np.floating]) -> Floats:
    """(k, outputs, width) with at most _OUTPUTS outputs, the same random sums of them in all k."""
    outputs = matrices.shape[1]
    if outputs <= _OUTPUTS:
        return np.asarray(matrices, np.float32)
    signs = np.random.default_rng(outputs).integers(0, 2, (_OUTPUTS, outputs)).astype(np.float32) * 2 - 1
    return np.asarray(signs / np.float32(np.sqrt(_OUTPUTS)) @ matrices.astype(np.float32), np.float32)
