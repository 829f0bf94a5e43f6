"""Histograms of absolute values that take constant memory and can be merged.

A bin holds the numbers whose first sixteen bits as float32 are the same, so its edges are the numbers of bfloat16:
128 bins to every power of two, from the smallest float16 to beyond the largest. That makes an edge an exact number, a
bin the same on every device, and what is read off a histogram right to 1 part in 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Counts = NDArray[np.float64]

_SHIFT = 16
PER_OCTAVE = 128
# 2^-24, float16's smallest number, and 2^16, beyond its largest.
_FIRST = (127 - 24) * PER_OCTAVE
BINS = 40 * PER_OCTAVE
# What the first sixteen bits of a number without sign can be.
_PATTERNS = 1 << 15
# Numbers below the first edge fall into the first bin, which therefore begins at 0; those beyond the last edge into
# the last bin.
EDGES: Counts = ((np.arange(BINS + 1, dtype=np.int32) + _FIRST) << _SHIFT).view(np.float32).astype(np.float64)
EDGES[0] = 0.0


@dataclass(frozen=True)
class Histogram:
    """How absolute values are distributed.

    Attributes:
        counts: (BINS,) numbers in every bin; whole unless weighted.
        least: smallest absolute value, exact.
        largest: largest absolute value, exact.
    """

    counts: Counts
    least: float
    largest: float

    @property
    def count(self) -> float:
        """Numbers seen."""
        return float(self.counts.sum())

    def edges(self) -> tuple[Counts, Counts]:
        """Lower and upper edges of the bins (BINS,), cut off at the largest number."""
        upper = np.minimum(EDGES[1:], self.largest)
        upper[-1] = max(float(upper[-1]), self.largest)
        return np.minimum(EDGES[:-1], self.largest), upper


def histogram_of(values: torch.Tensor) -> Histogram:
    """The histogram of finite numbers of any shape, at least one, counted on their own device."""
    sizes = values.detach().float().abs().contiguous().reshape(-1)
    counts = torch.bincount(sizes.view(torch.int32) >> _SHIFT, minlength=_PATTERNS)
    least, largest = torch.aminmax(sizes)
    return Histogram(_binned(counts.cpu().numpy()), float(least), float(largest))


def estimated(rows: NDArray[np.float32], counts: Counts, largest: float) -> Histogram:
    """The histogram of many rows of which a sample is at hand.

    Args:
        rows: (n, width) of the sample.
        counts: (n,) rows that each of them stands for.
        largest: absolute value of all rows, sampled or not. One number at least is this large.
    """
    sizes = np.minimum(np.abs(rows, dtype=np.float32), np.float32(largest)).reshape(-1)
    each = np.repeat(counts, rows.shape[1])
    found = np.bincount(sizes.view(np.int32) >> _SHIFT, each, _PATTERNS)
    last = np.float32(largest).view(np.int32) >> _SHIFT
    found[last] = max(found[last], 1.0)
    return Histogram(_binned(found), float(sizes.min(initial=np.float32(largest))), largest)


def _binned(counts: NDArray[Any]) -> Counts:
    """The bins of counts by the first sixteen bits (_PATTERNS,)."""
    inside = counts[_FIRST : _FIRST + BINS].astype(np.float64)
    inside[0] += counts[:_FIRST].sum()
    inside[-1] += counts[_FIRST + BINS :].sum()
    return inside


def merged(one: Histogram, other: Histogram) -> Histogram:
    """The histogram of the numbers of both."""
    return Histogram(
        counts=one.counts + other.counts,
        least=min(one.least, other.least),
        largest=max(one.largest, other.largest),
    )


def weighted(histograms: Sequence[Histogram], weights: Sequence[float]) -> Histogram:
    """One histogram of several, each counting by its weight and not by how many numbers it has seen."""
    parts = [weight / histogram.count for histogram, weight in zip(histograms, weights, strict=True)]
    return Histogram(
        counts=np.sum([part * each.counts for part, each in zip(parts, histograms, strict=True)], axis=0),
        least=min(each.least for each in histograms),
        largest=max(each.largest for each in histograms),
    )


def percentile(histogram: Histogram, percent: float) -> float:
    """The value that `percent` of the numbers do not exceed, right to 1 part in PER_OCTAVE between 2^-24 and 2^16.

    Inside of a bin numbers are taken to lie evenly; 100 is the exact maximum.
    """
    below = np.cumsum(histogram.counts)
    rank = percent / 100 * below[-1]
    index = min(int(np.searchsorted(below, rank)), int(np.flatnonzero(histogram.counts)[-1]))
    lower, upper = (float(edges[index]) for edges in histogram.edges())
    inside = (rank - (below[index] - histogram.counts[index])) / histogram.counts[index]
    return float(np.clip(lower + min(max(inside, 0.0), 1.0) * (upper - lower), histogram.least, histogram.largest))
