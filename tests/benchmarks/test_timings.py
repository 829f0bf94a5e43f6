import math
import statistics
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from latentrt.benchmarks.timings import is_settled, median_ranks, runs_needed, summarize
from latentrt.runtime.errors import UsageError

TIMES = st.lists(st.floats(1e-6, 1e4), min_size=1, max_size=60)


def test_figures_of_a_sample_in_closed_form() -> None:
    summary = summarize([float(value) for value in reversed(range(101))])
    assert (summary.p50, summary.p90, summary.p99, summary.mean) == (50, 90, 99, 50)
    assert (summary.minimum, summary.maximum, summary.count) == (0, 100, 101)
    # Of 0, 1, …, n - 1 the variance is n (n + 1) / 12.
    assert summary.std == pytest.approx(math.sqrt(101 * 102 / 12))
    assert summarize([float(value) for value in range(12)]).p90 == pytest.approx(0.9 * 11)  # between two values


@given(TIMES)
def test_figures_are_those_of_the_standard_library(values: list[float]) -> None:
    summary = summarize(values)
    assert summary.p50 == pytest.approx(statistics.median(values))
    assert summary.mean == pytest.approx(statistics.fmean(values))
    assert (summary.std is None) == (len(values) == 1)
    if len(values) > 1:
        assert summary.std == pytest.approx(statistics.stdev(values), rel=1e-6, abs=1e-9)
    if len(values) >= 10:
        assert summary.p90 == pytest.approx(statistics.quantiles(values, n=10, method="inclusive")[-1])


def test_outliers_are_kept() -> None:
    summary = summarize([1.0] * 99 + [1001.0])
    assert summary.maximum == 1001
    assert summary.mean == pytest.approx(11)
    assert summary.p99 == pytest.approx(1 + 0.01 * 1000)  # position 98.01 of 0 to 99


@pytest.mark.parametrize(
    ("count", "p90", "p99"), [(9, False, False), (10, True, False), (99, True, False), (100, True, True)]
)
def test_a_percentile_needs_a_value_beyond_it(count: int, p90: bool, p99: bool) -> None:
    summary = summarize([float(value) for value in range(1, count + 1)])
    assert (summary.p90 is not None, summary.p99 is not None) == (p90, p99)


# By hand: of nine tosses 1 + 9 of 512 outcomes have no head or one, and as many no tail or one.
@pytest.mark.parametrize(
    ("count", "rank", "coverage"),
    [
        (6, 1, 0.9688),
        (8, 1, 0.9922),
        (9, 2, 0.9609),
        (10, 2, 0.9785),
        (15, 4, 0.9648),
        (20, 6, 0.9586),
        (25, 8, 0.9567),
    ],
)
def test_ranks_around_the_median(count: int, rank: int, coverage: float) -> None:
    assert median_ranks(count) == pytest.approx((rank, coverage), abs=5e-5)


def test_ranks_are_the_binomial_quantile() -> None:
    for count in (*range(1, 60), 1000, 5000):
        # The largest k with P(X < k) of at most 2.5 %.
        rank = next(k for k in range(count) if stats.binom.cdf(k, count, 0.5) > 0.025)
        if rank == 0:
            assert count < 6
            assert median_ranks(count) is None
        else:
            assert median_ranks(count) == pytest.approx((rank, 1 - 2 * stats.binom.cdf(rank - 1, count, 0.5)))


@pytest.mark.parametrize("count", [6, 7, 20, 61])
def test_interval_is_that_of_the_quantile_test(count: int) -> None:
    values = np.random.default_rng(count).lognormal(size=count)
    expected = stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    assert summarize(values.tolist()).interval == (expected.low, expected.high)


def test_interval_holds_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    count, benchmarks = 12, 2000
    held = 0
    for values in rng.lognormal(0, 1, (benchmarks, count)):
        summary = summarize(values.tolist())
        assert summary.interval is not None
        held += summary.interval[0] <= 1 <= summary.interval[1]
    deviation = math.sqrt(summary.coverage * (1 - summary.coverage) / benchmarks)
    assert held / benchmarks == pytest.approx(summary.coverage, abs=4 * deviation)


def test_stopping_when_settled_costs_little_of_the_coverage() -> None:
    rng = np.random.default_rng(2)
    benchmarks, held, lengths = 300, 0, []
    for values in rng.lognormal(0, 0.03, (benchmarks, 80)).tolist():
        runs = next((n for n in range(8, 80, 2) if is_settled(values[:n], 0.02)), 80)
        lengths.append(runs)
        low, high = summarize(values[:runs]).interval or (math.nan, math.nan)
        held += low <= 1 <= high
    assert 10 < statistics.median(lengths) < 60  # the rule was at work
    assert held / benchmarks == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / benchmarks))


def test_settled_by_the_farther_end() -> None:
    values = [1.0, 1.0, 1.0, 1.0, 1.0, 1.1]  # of six the interval is the range
    assert summarize(values).half_width == pytest.approx(0.1)
    assert is_settled(values, 0.11)
    assert not is_settled(values, 0.09)
    assert not is_settled([1.0] * 5, 0.5)  # too few for any interval
    assert not is_settled([0.0] * 6, 0.5)  # nothing to be a share of


def test_runs_needed_grow_with_the_square() -> None:
    values = [0.75, 0.875, 1.0, 1.0, 1.125, 1.25]  # half width of a quarter, exact in binary
    assert runs_needed(values, 0.25) == 6
    assert runs_needed(values, 0.125) == 24
    assert runs_needed(values, 1.0) == 6
    assert runs_needed([1.0] * 5, 0.02) is None


@settings(max_examples=50)
@given(TIMES, st.floats(1e-3, 1e3), st.randoms(use_true_random=False))
def test_figures_do_not_depend_on_order_or_unit(values: list[float], unit: float, random: Random) -> None:
    shuffled = sorted(values, key=lambda _: random.random())
    one, other = summarize(values), summarize([unit * value for value in shuffled])
    assert other.p50 == pytest.approx(unit * one.p50)
    assert other.half_width == (None if one.half_width is None else pytest.approx(one.half_width, abs=1e-9))
    if one.interval is not None:
        assert one.minimum <= one.interval[0] <= one.p50 <= one.interval[1] <= one.maximum


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_no_figures_of_nothing(values: list[float]) -> None:
    with pytest.raises(UsageError, match="expected one or more finite"):
        summarize(values)
