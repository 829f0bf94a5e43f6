import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.benchmarks.differences import Ratio, changed, changed_by_pair, drift, holm, paired_ratio, ratio_of_medians
from latentrt.runtime.errors import UsageError

PROBABILITIES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_what_slows_a_round_cancels() -> None:
    rng = np.random.default_rng(0)
    rounds = rng.lognormal(0, 1, 20)  # by a factor of e, up and down
    ratio = paired_ratio((1.25 * rounds).tolist(), rounds.tolist())
    assert ratio.value == pytest.approx(1.25)
    assert ratio.interval == pytest.approx((1.25, 1.25))
    # Without the pairs the same runs say next to nothing.
    alone = ratio_of_medians((1.25 * rounds).tolist(), rng.permutation(rounds).tolist())
    assert alone.interval is not None
    assert alone.interval[1] / alone.interval[0] > 1.5


def test_paired_ratio_is_the_median_over_the_rounds_of_both() -> None:
    ratio = paired_ratio([2.0, 3.0, 8.0, 5.0, 6.0, 7.0, 100.0], [1.0, 1.0, 2.0, 1.0, 1.0, 1.0])
    assert ratio.value == pytest.approx(4.5)  # of 2, 3, 4, 5, 6, 7; the last has no partner
    assert ratio.interval == (2, 7)


@pytest.mark.parametrize("ratio", [paired_ratio, ratio_of_medians])
def test_no_interval_of_five(ratio: Callable[[list[float], list[float]], Ratio]) -> None:
    found = ratio([2.0] * 5, [1.0] * 5)
    assert (found.value, found.interval) == (2, None)


def test_bootstrap_interval_holds_the_ratio() -> None:
    rng = np.random.default_rng(3)
    benchmarks, held = 200, 0
    for _ in range(benchmarks):
        values, reference = rng.lognormal(math.log(1.2), 0.1, 12), rng.lognormal(0, 0.1, 12)
        low, high = ratio_of_medians(values.tolist(), reference.tolist()).interval or (math.nan, math.nan)
        held += low <= 1.2 <= high
    assert 0.92 < held / benchmarks < 1


def test_bootstrap_is_the_same_again() -> None:
    values, reference = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    assert ratio_of_medians(values, reference) == ratio_of_medians(values, reference)
    assert ratio_of_medians(values, reference).value == pytest.approx(3.5 / 1.25)


def test_mann_whitney_by_all_orders() -> None:
    values, reference = [1.0, 4.0, 7.0, 8.0], [2.0, 3.0, 5.0, 0.5, 0.7]
    pooled = values + reference

    def larger(chosen: tuple[int, ...]) -> int:
        rest = [pooled[place] for place in range(9) if place not in chosen]
        return sum(pooled[place] > other for place in chosen for other in rest)

    counts = [larger(chosen) for chosen in itertools.combinations(range(9), 4)]
    middle = len(values) * len(reference) / 2
    extreme = abs(larger((0, 1, 2, 3)) - middle)
    assert changed(values, reference) == pytest.approx(np.mean([abs(count - middle) >= extreme for count in counts]))


def test_a_change_is_found_rarely_where_there_is_none() -> None:
    rng = np.random.default_rng(4)
    tries = 400
    found = np.mean([changed(*rng.lognormal(0, 0.5, (2, 12)).tolist()) < 0.05 for _ in range(tries)])
    assert found == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / tries))


def test_an_outlier_decides_nothing_and_a_change_is_found() -> None:
    rng = np.random.default_rng(5)
    reference = rng.lognormal(0, 0.02, 20).tolist()
    same = [*rng.lognormal(0, 0.02, 19).tolist(), 50.0]
    assert changed(same, reference) > 0.05
    assert changed([1.05 * value for value in reference], reference) < 1e-4
    assert changed([1.0] * 8, [1.0] * 8) == 1


def test_signed_ranks_by_all_signs() -> None:
    values = [1.1, 1.3, 0.9, 1.8, 1.05, 2.0, 1.6, 1.45]
    logarithms = np.log(values)
    ranks = np.argsort(np.argsort(abs(logarithms))) + 1
    sums = [np.dot(signs, ranks) for signs in itertools.product((0, 1), repeat=8)]
    middle = sum(ranks) / 2
    extreme = abs(np.dot(logarithms > 0, ranks) - middle)
    expected = np.mean([abs(each - middle) >= extreme for each in sums])
    scale = [3.0, 1.0, 0.5, 2.0, 7.0, 0.1, 4.0, 1.5]
    scaled = [value * by for value, by in zip(values, scale, strict=True)]
    assert changed_by_pair(scaled, scale) == pytest.approx(expected)
    assert changed_by_pair(scale, scale) == 1


def test_holm_by_hand() -> None:
    # 4 · 0.005, 3 · 0.01, 2 · 0.03; then 0.04 is not allowed to be below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.6, 0.9]) == (1, 1)
    assert holm([]) == ()


@given(PROBABILITIES)
def test_holm_lies_between_none_and_bonferroni(probabilities: list[float]) -> None:
    corrected = holm(probabilities)
    for before, after in zip(probabilities, corrected, strict=True):
        assert before <= after <= min(1, len(probabilities) * before)
    assert [corrected[i] for i in np.argsort(probabilities)] == sorted(corrected)


def test_any_false_finding_among_many_is_rare_with_holm() -> None:
    rng = np.random.default_rng(6)
    tests = rng.random((2000, 10))
    assert np.mean([min(holm(row.tolist())) < 0.05 for row in tests]) == pytest.approx(0.05, abs=0.02)
    assert np.mean(tests.min(1) < 0.05) > 0.3  # as it were without


def test_drift_in_closed_form() -> None:
    turns = [3 * place for place in range(11)]
    values = [2.0 + 0.01 * turn for turn in turns]
    trend = drift(turns, values)
    assert trend is not None
    assert trend.change == pytest.approx(0.3 / 2.15)  # 0.3 over the turns, of the median
    # Of 11! orders two are as extreme.
    assert trend.p == pytest.approx(2 / math.factorial(11))
    slowed = drift(turns, [*values[:5], 99.0, *values[6:]])
    assert slowed is not None
    assert slowed.change == pytest.approx(trend.change, rel=0.05)


def test_no_drift() -> None:
    rng = np.random.default_rng(7)
    found = []
    for values in rng.lognormal(0, 0.1, (200, 10)).tolist():
        trend = drift(range(10), values)
        assert trend is not None
        found.append(trend.p < 0.05)
    assert 0.005 < np.mean(found) < 0.11
    assert drift(range(5), [1.0, 2.0, 3.0, 4.0, 5.0]) is None
    still = drift(range(8), [1.0] * 8)
    assert still is not None
    assert (still.change, still.p) == (0, 1)


def test_refused() -> None:
    with pytest.raises(UsageError, match="expected positive"):
        paired_ratio([1.0], [0.0])
    with pytest.raises(UsageError, match="one or more finite"):
        ratio_of_medians([], [1.0])
    with pytest.raises(UsageError, match="as many as the reference's 2, got 1"):
        changed_by_pair([1.0], [1.0, 2.0])
