"""What repeated timings say: percentiles, the median's interval, whether there are enough. No outlier is ever dropped.

Times are skewed, and a busy machine gives them long tails: nothing here takes them to be normal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from latentrt.runtime.errors import UsageError

Doubles: TypeAlias = NDArray[np.float64]

# What chance alone does this often is no finding; intervals are at what is left, 95 %.
SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures of a sample, in its unit.

    Attributes:
        count: of the values.
        p50: the median.
        p90: None for fewer than 10 values, as p99 for fewer than 100: with no value beyond it, it would be the largest
            one by another name.
        std: of the sample (n - 1); None for a single value.
        interval: of the median, at `coverage`; None for fewer than 6 values, which have none at 95 %.
        coverage: the exact probability with which such an interval holds the median; 0 without one.
    """

    count: int
    p50: float
    p90: float | None
    p99: float | None
    mean: float
    std: float | None
    minimum: float
    maximum: float
    interval: tuple[float, float] | None
    coverage: float

    @property
    def half_width(self) -> float | None:
        """The farther end of the interval from the median, as a share of the median; None without either."""
        if self.interval is None or self.p50 == 0:
            return None
        return max(self.interval[1] - self.p50, self.p50 - self.interval[0]) / self.p50


def summarize(values: Sequence[float]) -> Summary:
    """The figures of (n,) values.

    Raises:
        UsageError: there is no value, or one is not finite.
    """
    sample = checked_sample(values)
    count = len(sample)
    ranks = median_ranks(count)
    ordered = np.sort(sample)
    return Summary(
        count=count,
        p50=float(np.median(sample)),
        p90=_percentile(sample, 90),
        p99=_percentile(sample, 99),
        mean=float(sample.mean()),
        std=float(sample.std(ddof=1)) if count > 1 else None,
        minimum=float(ordered[0]),
        maximum=float(ordered[-1]),
        interval=None if ranks is None else (float(ordered[ranks[0] - 1]), float(ordered[-ranks[0]])),
        coverage=0.0 if ranks is None else ranks[1],
    )


def median_ranks(count: int) -> tuple[int, float] | None:
    """Which order statistics enclose the median at 95 %: the k-th smallest and the k-th largest of n values.

    The number of values below the median is binomial (n, 1/2) whatever they are distributed like, so the interval
    holds it with probability 1 - 2 P(X < k) exactly: David & Nagaraja, Order Statistics (2003), 7.1.

    Returns:
        The largest k with 95 % or more, and its probability; None for fewer than 6 values, where even the smallest and
        the largest enclose it less often.
    """
    # In whole numbers of the 2^n outcomes: exact for any n.
    outcomes, ways, below, rank = 2**count, 1, 0, 0
    while (below + ways) / outcomes <= SIGNIFICANT / 2:
        below += ways
        ways = ways * (count - rank) // (rank + 1)
        rank += 1
    return (rank, 1 - 2 * below / outcomes) if rank else None


def is_settled(values: Sequence[float], bound: float) -> bool:
    """Whether the interval of the median of (n,) values is within a bound, as a share of the median.

    To look again after every few runs, and to stop the first time that it is, favours intervals that are narrow by
    chance. Order statistics enclose the median a little more often than at 95 %, which makes up for it: of simulated
    benchmarks with a spread of 3 % that stopped so, 95 % held the median.
    """
    half = summarize(values).half_width
    return half is not None and half <= bound


def runs_needed(values: Sequence[float], bound: float) -> int | None:
    """How many runs would settle a row, judged by (n,) runs: the interval shrinks with the root of their number.

    Returns:
        None for fewer than 6 runs, which say nothing of it.
    """
    half = summarize(values).half_width
    return None if half is None else max(len(values), math.ceil(len(values) * (half / bound) ** 2))


def checked_sample(values: Sequence[float]) -> Doubles:
    """Values as an array (n,).

    Raises:
        UsageError: there is none, or one is not finite.
    """
    sample = np.asarray(values, np.float64)
    if not (sample.size and np.isfinite(sample).all()):
        raise UsageError(f"values: expected one or more finite ones, got {sample.size} with NaN or infinity.")
    return sample


def _percentile(sample: Doubles, percent: int) -> float | None:
    """Linear between order statistics (NumPy's default, type 7 of Hyndman & Fan 1996)."""
    return float(np.percentile(sample, percent)) if len(sample) * (100 - percent) >= 100 else None
