from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.calibrate.layers import Layer
from latentrt.calibrate.solver import Item, frontier, items_of, predicted_sqnr, solve
from latentrt.runtime.errors import CalibrationError, UsageError

# Noises and gains over the many orders of magnitude that layers have, and ties.
NOISES = st.one_of(st.just(0.0), st.integers(1, 5).map(float), st.floats(-9, 0).map(lambda x: 10**x))
GAINS = st.one_of(st.integers(-1, 5).map(float), st.floats(-5, 0).map(lambda x: 10**x))
SETS = st.lists(st.tuples(NOISES, GAINS), max_size=9).map(
    lambda pairs: [Item((f"layer {index}",), noise, gain) for index, (noise, gain) in enumerate(pairs)]
)
LIMITS = st.one_of(st.just(0.0), st.just(math.inf), st.integers(1, 9).map(float), st.floats(-9, 1).map(lambda x: 10**x))


def most(items: Sequence[Item], limit: float) -> float:
    """The most gain of all subsets that stay within the limit."""
    return max(
        math.fsum(item.gain for item in subset)
        for count in range(len(items) + 1)
        for subset in itertools.combinations(items, count)
        if math.fsum(item.noise for item in subset) <= limit
    )


def totals(items: Sequence[Item], chosen: frozenset[str]) -> tuple[float, float]:
    picked = [item for item in items if set(item.layers) <= chosen]
    assert {name for item in picked for name in item.layers} == chosen
    return math.fsum(item.noise for item in picked), math.fsum(item.gain for item in picked)


@settings(max_examples=60, deadline=None)
@given(SETS, LIMITS)
def test_milp_is_as_good_as_trying_all(items: list[Item], limit: float) -> None:
    found = solve(items, limit)
    assert (found.noise, found.gain) == totals(items, found.chosen)
    assert found.noise <= limit
    # What comes within the tolerance of the limit may be missed, and gains of a millionth of the largest.
    assert found.gain >= most(items, limit * (1 - 2e-5)) - 1e-5


@settings(max_examples=60, deadline=None)
@given(SETS, LIMITS)
def test_greedy_misses_less_than_the_largest_gain(items: list[Item], limit: float) -> None:
    found = solve(items, limit, solver="greedy")
    assert (found.noise, found.gain) == totals(items, found.chosen)
    assert found.noise <= limit
    missed = most(items, limit) - found.gain
    assert missed <= max((item.gain for item in items if item.noise <= limit and item.gain > 0), default=0.0) + 1e-12
    assert solve(items, limit).gain >= found.gain


@settings(max_examples=40, deadline=None)
@given(SETS)
def test_every_plan_of_the_frontier_is_the_best_for_its_noise(items: list[Item]) -> None:
    choices = frontier(items)
    assert choices[0].noise == 0
    assert choices[-1].chosen == {item.layers[0] for item in items if item.gain > 0}
    for choice in choices:
        assert choice.gain == pytest.approx(most(items, choice.noise), abs=1e-9)
    for before, after in itertools.pairwise(choices):
        assert before.chosen < after.chosen
        assert before.noise < after.noise
        assert before.gain < after.gain


def hundreds() -> list[Item]:
    """As many layers as SDXL has, with noises over five orders of magnitude."""
    rng = np.random.default_rng(0)
    noises, gains = 10 ** rng.normal(-6, 1, 800), rng.lognormal(0, 1, 800)
    return [Item((f"layer {i}",), noises[i], gains[i] / gains.sum()) for i in range(800)]


def test_hundreds_of_layers_take_seconds_and_greedy_is_close(capfd: pytest.CaptureFixture[str]) -> None:
    items = hundreds()
    for limit in (1e-4, 1e-3):
        exact, greedy = solve(items, limit), solve(items, limit, solver="greedy")
        assert greedy.gain <= exact.gain <= greedy.gain + 0.004
        # The frontier's line from one plan to the next is above what any plan can have.
        choices = frontier(items)
        gains = np.interp(limit, [choice.noise for choice in choices], [choice.gain for choice in choices])
        assert exact.gain <= gains + 1e-9
    # HiGHS has notes on this one, which are not to come between a machine and its JSON.
    assert capfd.readouterr().out == ""


def test_a_knapsack_that_greedy_gets_wrong() -> None:
    items = [Item(("a",), 6.0, 7.0), Item(("b",), 5.0, 5.0), Item(("c",), 5.0, 5.0)]
    assert solve(items, 10.0, solver="greedy").chosen == {"a"}
    assert solve(items, 10.0).chosen == {"b", "c"}
    assert solve(items, 10.0) == solve(items, 10.0)
    # With no time, greedy's answer counts.
    assert solve(items, 10.0, time_limit=0.0).gain >= 7.0


def layer(name: str, group: str) -> Layer:
    return Layer(name, "MatMul", "other", group, group, 16, 16, 1, 1, 0.1)


def test_layers_that_read_one_tensor_are_one_item() -> None:
    layers = [layer("q", "q"), layer("out", "out"), layer("k", "q"), layer("v", "q")]
    noises, gains = {"v": 0.5, "q": 0.125, "out": 1.0}, {"q": 1.0, "k": 2.0, "v": 3.0, "out": 4.0}
    # k has no noise: it stays as it is, and the others are decided for.
    assert items_of(layers, noises, gains) == (Item(("q", "v"), 0.625, 4.0), Item(("out",), 1.0, 4.0))
    apart = items_of(layers, noises, gains, together=False)
    assert apart == (Item(("q",), 0.125, 1.0), Item(("out",), 1.0, 4.0), Item(("v",), 0.5, 3.0))
    assert solve(items_of(layers, noises, gains), 0.7).chosen == {"q", "v"}


def test_decibels_of_layers_together() -> None:
    assert predicted_sqnr([0.004, 0.006]) == pytest.approx(20.0)
    assert predicted_sqnr(iter([1e-4])) == pytest.approx(40.0)
    assert predicted_sqnr([]) >= 100


@pytest.mark.parametrize(
    ("noise", "gain"), [(math.nan, 1.0), (math.inf, 1.0), (-1e-9, 1.0), (1.0, math.nan), (1, math.inf)]
)
def test_numbers_that_are_none_are_refused(noise: float, gain: float) -> None:
    items = [Item(("fine",), 1.0, 1.0), Item(("conv", "other"), noise, gain)]
    for use in (lambda: solve(items, 1.0), lambda: solve(items, 1.0, solver="greedy"), lambda: frontier(items)):
        with pytest.raises(
            CalibrationError, match="conv: expected a finite noise of at least 0 and a finite gain, got"
        ):
            use()
    with pytest.raises(CalibrationError, match="conv: expected a finite noise"):
        items_of([layer("conv", "conv")], {"conv": noise}, {"conv": gain})


def test_limits_and_solvers_that_are_none_are_refused() -> None:
    for limit in (math.nan, -1.0):
        with pytest.raises(UsageError, match="limit: expected a noise of at least 0, got"):
            solve([], limit)
    with pytest.raises(UsageError, match="solver: expected one of greedy, milp, got best"):
        solve([], 1.0, solver="best")  # type: ignore[arg-type]
