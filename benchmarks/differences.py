"""How samples of timings differ: ratios with intervals, tests for a change, trends.

Tests go by ranks, so that neither an outlier nor the shape of a distribution decides them. SciPy is imported when one
is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentrt.runtime.errors import UsageError

from .timings import SIGNIFICANT, Doubles, checked_sample, median_ranks, summarize

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio, and its 95 % interval where the samples are large enough for one."""

    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Drift:
    """A trend of timings over their turns.

    Attributes:
        change: from the first turn to the last, as a share of the median: the Theil-Sen slope, which a few slow runs
            do not move.
        p: probability that timings without a trend would look so.
    """

    change: float
    p: float


def paired_ratio(values: Sequence[float], reference: Sequence[float]) -> Ratio:
    """How much larger values are than those of a reference that were taken in the same rounds.

    The median of the ratios by round: what slows a round down slows both, and cancels. Its interval is the exact one of
    a median. It is not quite the ratio of the medians.

    Args:
        values: (n,), by round.
        reference: of the same rounds; where one has fewer, the rounds that both have.

    Raises:
        UsageError: there is no common round, or a value is not finite or not positive.
    """
    common = min(len(values), len(reference))
    ratios = _positive(values[:common]) / _positive(reference[:common])
    summary = summarize(ratios.tolist())
    return Ratio(value=summary.p50, interval=summary.interval)


def ratio_of_medians(values: Sequence[float], reference: Sequence[float], *, seed: int = 0) -> Ratio:
    """How much larger the median of one sample is than that of another that was taken at another time.

    The interval is the percentile bootstrap (Efron 1979), resampling each sample by itself; None if one has fewer than
    6 values, of which resampling makes nothing but the same few medians.

    Args:
        values: (n,).
        reference: (m,).
        seed: of the bootstrap.

    Raises:
        UsageError: a sample is empty, or a value is not finite or not positive.
    """
    upper, lower = _positive(values), _positive(reference)
    value = float(np.median(upper) / np.median(lower))
    if median_ranks(min(len(upper), len(lower))) is None:
        return Ratio(value=value, interval=None)
    rng = np.random.default_rng(seed)
    low, high = np.quantile(_medians(upper, rng) / _medians(lower, rng), (SIGNIFICANT / 2, 1 - SIGNIFICANT / 2))
    return Ratio(value=value, interval=(float(low), float(high)))


def changed(values: Sequence[float], reference: Sequence[float]) -> float:
    """Probability that two samples of one distribution differ as much: the two-sided Mann-Whitney U test.

    It asks whether one sample's values tend to be larger, by ranks: no outlier decides it, and no distribution is
    assumed. Exact for small samples without ties. Runs of one process resemble each other more than runs of two, so a
    small p may mean another process and no other program; hence comparisons ask for a least change too.

    Args:
        values: (n,).
        reference: (m,).

    Raises:
        UsageError: a sample is empty, or a value is not finite.
    """
    from scipy.stats import mannwhitneyu

    upper, lower = checked_sample(values), checked_sample(reference)
    if np.ptp(np.concatenate((upper, lower))) == 0:
        return 1.0
    return float(mannwhitneyu(upper, lower, alternative="two-sided").pvalue)


def changed_by_pair(values: Sequence[float], reference: Sequence[float]) -> float:
    """Probability that values of the same (n,) things differ as much by chance: Wilcoxon's signed ranks, two-sided.

    Of the logarithms, so that equal ratios count alike.

    Raises:
        UsageError: the samples are empty or of different lengths, or a value is not finite or not positive.
    """
    from scipy.stats import wilcoxon

    if len(values) != len(reference):
        raise UsageError(f"values: expected as many as the reference's {len(reference)}, got {len(values)}.")
    logarithms = np.log(_positive(values)) - np.log(_positive(reference))
    return float(wilcoxon(logarithms).pvalue) if logarithms.any() else 1.0


def holm(probabilities: Sequence[float]) -> tuple[float, ...]:
    """Probabilities of (n,) tests, corrected for their number: Holm 1979, which assumes nothing of their dependence.

    With all of them held against one level, the probability of any false finding at all is below that level.
    """
    count = len(probabilities)
    order = sorted(range(count), key=lambda index: probabilities[index])
    corrected, largest = [0.0] * count, 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (count - place) * probabilities[index]))
        corrected[index] = largest
    return tuple(corrected)


def drift(turns: Sequence[int], values: Sequence[float]) -> Drift | None:
    """The trend of values over their turns, by ranks: Kendall's tau and the Theil-Sen slope.

    Args:
        turns: (n,), not all the same.
        values: (n,), positive.

    Returns:
        None for fewer than 6 values, which show no trend at 95 %.

    Raises:
        UsageError: a value is not finite or not positive.
    """
    sample = _positive(values)
    if median_ranks(len(sample)) is None:
        return None
    if np.ptp(sample) == 0:
        return Drift(change=0.0, p=1.0)
    from scipy.stats import kendalltau, theilslopes

    slope = theilslopes(sample, turns).slope
    return Drift(
        change=float(slope * (max(turns) - min(turns)) / np.median(sample)), p=float(kendalltau(turns, sample).pvalue)
    )


def _positive(values: Sequence[float]) -> Doubles:
    sample = checked_sample(values)
    if not (sample > 0).all():
        raise UsageError(f"values: expected positive ones, got {sample.min():g}.")
    return sample


def _medians(sample: Doubles, rng: np.random.Generator) -> Doubles:
    medians: Doubles = np.median(sample[rng.integers(0, len(sample), (_RESAMPLES, len(sample)))], axis=1)
    return medians
