import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.calibrate.budget import (
    DEFAULT_BUDGET,
    LARGEST_DB,
    METRICS,
    Budget,
    check_measurable,
    decibels,
    parse_budgets,
)
from latentrt.runtime.errors import UsageError


def test_budgets_are_read_from_options() -> None:
    assert parse_budgets(["psnr=30", " SSIM = 0.95, accuracy=1e-2"]) == (
        Budget("psnr", 30.0),
        Budget("ssim", 0.95),
        Budget("accuracy", 0.01),
    )
    assert parse_budgets([DEFAULT_BUDGET]) == (Budget("psnr", 32.0),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a metric and a number"),
        ("psnr", "expected a metric and a number"),
        ("psnr=", "expected a metric and a number"),
        ("psnr=high", "expected a metric and a number as in psnr=32, got 'psnr=high'"),
        ("psnr=30,", "expected a metric and a number"),
        ("fid=20", "expected one of psnr, ssim, flip, lpips, sqnr, accuracy, got 'fid'"),
        ("psnr=nan", "psnr: expected a bound above 0 and below 100, got nan"),
        ("psnr=inf", "psnr: expected a bound above 0 and below 100, got inf"),
        ("psnr=0", "got 0"),
        ("ssim=1", "ssim: expected a bound above 0 and below 1, got 1. Smaller ones ask for less"),
        ("flip=-0.1", "flip: expected a bound above 0 and below 1, got -0.1. Larger ones ask for less"),
        ("accuracy=1", "accuracy: expected a bound"),
        ("psnr=30,psnr=31", "psnr: expected one bound, got two"),
        ("psnr=30,psnr=30", "psnr: expected one bound, got two"),
    ],
)
def test_impossible_budgets_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_budgets([text])


def test_no_budget_is_refused() -> None:
    with pytest.raises(UsageError, match="expected at least one, got none"):
        parse_budgets([])


@pytest.mark.parametrize("metric", ["psnr", "ssim", "sqnr"])
def test_more_is_better(metric: str) -> None:
    budget = Budget(metric, 0.5)
    assert budget.met(0.5)
    assert budget.met(0.75)
    assert not budget.met(0.25)
    assert budget.margin(0.75) == 0.25


@pytest.mark.parametrize("metric", ["flip", "lpips", "accuracy"])
def test_less_is_better(metric: str) -> None:
    budget = Budget(metric, 0.5)
    assert budget.met(0.5)
    assert budget.met(0.25)
    assert not budget.met(0.75)
    assert budget.margin(0.75) == -0.25


@pytest.mark.parametrize("metric", METRICS)
def test_nan_meets_no_budget(metric: str) -> None:
    assert not Budget(metric, 0.5).met(math.nan)


def test_budgets_name_their_direction_and_unit() -> None:
    assert [str(budget) for budget in parse_budgets(["psnr=32,flip=0.05"])] == ["PSNR >= 32 dB", "FLIP <= 0.05"]


def test_budgets_that_nothing_measures_are_refused() -> None:
    budgets = parse_budgets(["psnr=30,accuracy=0.01,lpips=0.1,sqnr=30"])
    check_measurable(budgets, judge=True, lpips=True, calls=True)
    check_measurable(budgets[:1], judge=False, lpips=False, calls=False)
    for missing, option in (("judge", "--judge"), ("lpips", "--lpips"), ("calls", "Capture")):
        given_means = {"judge": True, "lpips": True, "calls": True} | {missing: False}
        with pytest.raises(UsageError, match=option):
            check_measurable(budgets, **given_means)


@given(st.floats(1e-3, 1e3), st.floats(-60, 60))
def test_decibels_are_ten_logarithms_of_the_ratio(noise: float, ratio: float) -> None:
    assert decibels(noise * 10 ** (ratio / 10), noise) == pytest.approx(ratio, abs=1e-9)


def test_decibels_stay_within_what_json_can_hold() -> None:
    assert decibels(1.0, 0.0) == decibels(1.0, 1e-30) == LARGEST_DB
    assert decibels(0.0, 1.0) == decibels(1e-30, 1.0) == -LARGEST_DB
    assert decibels(1.0, math.inf) == -LARGEST_DB
    assert math.isnan(decibels(1.0, math.nan))
