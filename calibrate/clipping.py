"""Where to clip a tensor before it is quantized, read off the histogram of its absolute values alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .histogram import EDGES, Histogram

Numbers = NDArray[np.float64]

# Steps of symmetric int8 from zero to the largest value.
LEVELS = 127
# Of the largest value, what the search for the least squared error tries: by 2 %, down to a thousandth.
_MSE_RATIOS = np.geomspace(1.0, 1e-3, 350)
# As in TensorRT's calibrator: histogram bins of equal width, and the fewest and the step of those that are not clipped.
_ENTROPY_BINS, _ENTROPY_LEAST, _ENTROPY_STEP = 2048, 128, 8
# In place of a probability of zero.
_LEAST_PROBABILITY = 1e-10


def mse_clip(histogram: Histogram) -> float:
    """The clip at which the squared error of quantized values is least.

    Numbers are taken to lie evenly in a bin, over which the error is integrated exactly.
    """
    if not histogram.largest:
        return 0.0
    clips = histogram.largest * _MSE_RATIOS
    return float(clips[int(np.argmin(squared_errors(histogram, clips)))])


def squared_errors(histogram: Histogram, clips: Numbers) -> Numbers:
    """The mean squared error (n,) that rounding and clipping make at each of the clips (n,)."""
    occupied = histogram.counts > 0
    lower, upper = (edges[occupied] for edges in histogram.edges())
    # A bin that the largest value cuts down to nothing holds that value alone.
    lower = np.minimum(lower, upper * (1 - 1e-6))
    shares = histogram.counts[occupied] / histogram.count
    steps = clips[:, None] / LEVELS
    mean = (_integral(upper[None], steps) - _integral(lower[None], steps)) / (upper - lower)
    return np.asarray(mean @ shares, np.float64)


def _integral(to: Numbers, step: Numbers) -> Numbers:
    """The integral of (t - q(t))^2 over t from 0, q rounding to LEVELS multiples of `step`.

    A whole interval around a multiple adds step^3 / 12; what is left is centred on the last.
    """
    whole = np.minimum(np.rint(to / step), LEVELS)
    return np.asarray(whole * step**3 / 12 + (to - whole * step) ** 3 / 3, np.float64)


def entropy_clip(histogram: Histogram) -> float:
    """The clip at which the quantized distribution loses the least information.

    Of all clips the one of the least Kullback-Leibler divergence of the clipped distribution from itself in 128 levels.
    S. Migacz, 8-bit inference with TensorRT, GTC 2017.
    """
    if not histogram.largest:
        return 0.0
    counts = _evenly_binned(histogram)
    kept = np.arange(_ENTROPY_LEAST, _ENTROPY_BINS + 1, _ENTROPY_STEP)
    divergences = [_divergence(counts, int(count)) for count in kept]
    return float(histogram.largest * kept[int(np.argmin(divergences))] / _ENTROPY_BINS)


def _evenly_binned(histogram: Histogram) -> Numbers:
    """Counts in bins of equal width up to the largest value."""
    upper = histogram.edges()[1]
    positions = np.concatenate([EDGES[:1], upper])
    below = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    # From the largest value on all edges are that value; the last of them has the whole count.
    distinct = np.append(positions[1:] > positions[:-1], True)
    edges = np.linspace(0, histogram.largest, _ENTROPY_BINS + 1)
    return np.diff(np.interp(edges, positions[distinct], below[distinct]))


def _divergence(counts: Numbers, kept: int) -> float:
    inside = counts[:kept]
    clipped = inside.copy()
    clipped[-1] += counts[kept:].sum()
    level = np.arange(kept) * _ENTROPY_LEAST // kept
    occupied = inside > 0
    sums = np.bincount(level, weights=inside, minlength=_ENTROPY_LEAST)
    members = np.bincount(level, weights=occupied, minlength=_ENTROPY_LEAST)
    spread = np.where(occupied, (sums / np.maximum(members, 1))[level], 0.0)
    p = clipped / clipped.sum()
    q = np.maximum(spread / max(spread.sum(), _LEAST_PROBABILITY), _LEAST_PROBABILITY)
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())
