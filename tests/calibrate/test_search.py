"""The search for the cheapest plan, on networks whose relation between noise and pictures is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.calibrate.budget import Budget
from latentrt.calibrate.search import Choice, Trial, best, search, spare_db
from latentrt.runtime.errors import CalibrationError

# Noise over signal of single layers: 32 dB for all of them together, 60 dB for the mildest alone.
NOISES = np.geomspace(1e-6, 1.3e-4, 20)


def solve(limit: float) -> Choice:
    """As many layers as go into the limit, the mildest first; each is worth the same."""
    count = int(np.searchsorted(np.cumsum(NOISES), limit, side="right"))
    return Choice(frozenset(map(str, range(count))), float(NOISES[:count].sum()), count / len(NOISES))


def pictures(slope: float, offset: float) -> Callable[[Choice], Mapping[str, float]]:
    def measure(choice: Choice) -> Mapping[str, float]:
        return {"psnr": 60.0 if not choice.chosen else offset + slope * choice.predicted_db}

    return measure


def test_a_budget_that_all_layers_meet_takes_one_measurement() -> None:
    trials = search(solve, [Budget("psnr", 25)], pictures(1, 0))
    assert [len(trial.choice.chosen) for trial in trials] == [len(NOISES)]
    assert trials[0].met


@given(slope=st.floats(0.6, 1.4), offset=st.floats(-6, 2), bound=st.floats(33, 45))
def test_the_plan_found_is_near_the_best_there_is(slope: float, offset: float, bound: float) -> None:
    measure = pictures(slope, offset)
    options = [solve(limit) for limit in (0.0, *np.cumsum(NOISES) * 1.000001)]
    possible = [choice for choice in options if measure(choice)["psnr"] >= bound]
    found = best(search(solve, [Budget("psnr", bound)], measure, rounds=6))
    wanted = max(len(choice.chosen) for choice in possible)
    assert found is not None
    assert wanted - 2 <= len(found.choice.chosen) <= wanted


def test_a_budget_that_nothing_meets_ends_with_no_layer() -> None:
    trials = search(solve, [Budget("psnr", 70)], pictures(1, 0), rounds=12)
    assert best(trials) is None
    assert all(not trial.met for trial in trials)
    assert len(trials) <= 12


def test_no_plan_is_measured_twice_and_rounds_are_kept() -> None:
    seen: list[frozenset[str]] = []

    def measure(choice: Choice) -> Mapping[str, float]:
        seen.append(choice.chosen)
        return pictures(1.3, -8)(choice)

    search(solve, [Budget("psnr", 38)], measure, rounds=5)
    assert len(seen) == len(set(seen)) <= 5


def test_the_strictest_of_several_budgets_decides() -> None:
    def measure(choice: Choice) -> Mapping[str, float]:
        # 20 dB of signal over noise are 0.02 of structure here.
        return {**pictures(1, 0)(choice), "ssim": 1 - 2 * choice.noise}

    found = best(search(solve, [Budget("psnr", 33), Budget("ssim", 0.9997)], measure, rounds=8))
    assert found is not None
    assert found.limiting.metric == "ssim"
    assert found.values["ssim"] >= 0.9997
    assert found.choice.noise >= 0.7 * 1.5e-4


def test_a_count_of_right_pictures_is_searched_by_halving() -> None:
    def measure(choice: Choice) -> Mapping[str, float]:
        return {"accuracy": 0.0 if choice.noise < 2e-4 else 0.05}

    found = best(search(solve, [Budget("accuracy", 0.01)], measure, rounds=10))
    assert found is not None
    assert 1e-4 < found.choice.noise < 2e-4


def test_nan_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="psnr: expected a number"):
        search(solve, [Budget("psnr", 30)], lambda choice: {"psnr": math.nan})


@pytest.mark.parametrize(
    ("metric", "bound", "value", "spare"),
    [
        ("psnr", 30, 33, 3),
        ("sqnr", 30, 27, -3),
        ("ssim", 0.9, 0.95, 3.0103),  # half the distance from 1
        ("flip", 0.1, 0.05, 6.0206),  # half the amplitude
        ("lpips", 0.1, 0.2, -3.0103),
        ("flip", 0.1, 0.0, math.inf),
        ("accuracy", 0.01, 0.01, math.inf),
    ],
)
def test_what_is_left_in_decibels(metric: str, bound: float, value: float, spare: float) -> None:
    assert spare_db(Budget(metric, bound), value) == pytest.approx(spare, abs=1e-4)


def test_the_best_trial_saves_most() -> None:
    budget = Budget("psnr", 30)
    trials = [
        Trial(Choice(frozenset("a"), 1e-4, 0.1), {}, 1.0, budget),
        Trial(Choice(frozenset("ab"), 1e-3, 0.4), {}, 0.1, budget),
        Trial(Choice(frozenset("abc"), 1e-2, 0.9), {}, -0.1, budget),
    ]
    assert best(trials) is trials[1]
