from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import lambertw
from scipy.stats import expon, halfnorm

from latentrt.calibrate.clipping import entropy_clip, mse_clip, squared_errors
from latentrt.calibrate.histogram import EDGES, Histogram, histogram_of

RNG = np.random.default_rng(0)


def exact(below: Callable[[Any], Any], largest: float) -> Histogram:
    """The histogram of a distribution of sizes, given by how much of it lies below a number."""
    edges = np.minimum(EDGES, largest)
    return Histogram(counts=1e9 * np.diff(below(edges)), least=0.0, largest=largest)


def seen(values: Any) -> Histogram:
    return histogram_of(torch.from_numpy(np.asarray(values, np.float32)))


def quantized(values: Any, clip: float) -> Any:
    step = clip / 127
    return np.clip(np.rint(values / step), -127, 127) * step


def test_the_best_clip_of_a_laplace_distribution_is_that_of_its_closed_form() -> None:
    # Of rounding and clipping, a^2 / (12 127^2) + 2 b^2 exp(-a / b), the least is where (a / b) exp(a / b) is 12 127^2.
    for b in (0.01, 1.0, 30.0):
        best = b * float(lambertw(12 * 127**2).real)
        assert mse_clip(exact(expon(scale=b).cdf, 40 * b)) == pytest.approx(best, rel=0.02)


def test_the_best_clip_of_a_gaussian_is_that_of_its_closed_form() -> None:
    def error(clip: float) -> float:
        beyond = (1 + clip**2) * halfnorm.sf(clip) - clip * halfnorm.pdf(clip)
        return float(clip**2 / (12 * 127**2) + beyond)

    best = minimize_scalar(error, bounds=(1, 8), method="bounded")
    whole = exact(halfnorm.cdf, 12.0)
    assert mse_clip(whole) == pytest.approx(best.x, rel=0.02)
    assert squared_errors(whole, np.array([mse_clip(whole)]))[0] == pytest.approx(best.fun, rel=0.01)


def test_nothing_is_clipped_where_all_sizes_are_alike_or_equally_frequent() -> None:
    whole = exact(lambda size: size / 3, 3.0)
    assert mse_clip(whole) == 3
    assert entropy_clip(whole) == 3
    assert mse_clip(seen([-0.75, 0.75])) == 0.75
    for clip in (mse_clip, entropy_clip):
        assert clip(seen(np.zeros(5))) == 0


@pytest.mark.parametrize("draw", [RNG.standard_normal, RNG.standard_exponential, RNG.random])
def test_errors_are_those_of_the_numbers_themselves(draw: Callable[[int], Any]) -> None:
    values = draw(200_000).astype(np.float32)
    clips = np.array([0.2, 0.5, 1.0]) * values.max()
    expected = [np.square(values - quantized(values, clip)).mean() for clip in clips]
    np.testing.assert_allclose(squared_errors(seen(values), clips), expected, rtol=0.02)


def divergence(bins: list[float], kept: int) -> float:
    """As on Migacz' slides, one bin after the other."""
    reference = bins[:kept]
    reference[-1] += sum(bins[kept:])
    levels: list[list[int]] = [[] for _ in range(128)]
    for index in range(kept):
        levels[index * 128 // kept].append(index)
    candidate = [0.0] * kept
    for members in levels:
        occupied = [index for index in members if bins[index] > 0]
        for index in occupied:
            candidate[index] = sum(bins[each] for each in members) / len(occupied)
    p, q = np.array(reference) / sum(reference), np.array(candidate) / sum(candidate)
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-10))).sum())


@pytest.mark.parametrize(("below", "largest"), [(halfnorm.cdf, 9.0), (expon.cdf, 20.0)])
def test_the_clip_of_least_divergence_is_that_of_a_search_bin_by_bin(
    below: Callable[[Any], Any], largest: float
) -> None:
    bins = np.diff(below(np.linspace(0, largest, 2049))).tolist()
    choices = list(range(128, 2049, 8))
    divergences = [divergence(bins, kept) for kept in choices]
    found = round(entropy_clip(exact(below, largest)) / largest * 2048)
    # Bins of bfloat16 are finer than these near zero and coarser far out: the same to a hair, not the same.
    assert divergences[choices.index(found)] < 1.02 * min(divergences)
    assert abs(found - choices[int(np.argmin(divergences))]) <= 0.05 * found
    assert found < 1600


def test_one_outlier_does_not_cost_the_others_their_steps() -> None:
    count = 100_000
    values = RNG.random(count)
    # The least of count c^2 / (12 127^2) + (4 - c)^2, but for steps that the numbers do not fill.
    assert mse_clip(seen(np.append(values, 4.0))) == pytest.approx(4 / (count / (12 * 127**2) + 1), rel=0.05)
    # The fewest bins that are left: 128 of 2048.
    assert entropy_clip(seen(np.append(values, 1000.0))) == 1000 * 128 / 2048


@settings(max_examples=8, deadline=None)
@given(st.integers(-8, 8), st.integers(0, 1000))
def test_clips_grow_with_the_numbers(power: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_t(3, 500)
    values *= 8 / np.abs(values).max()
    for clip in (mse_clip, entropy_clip):
        assert clip(seen(values * 2.0**power)) == pytest.approx(clip(seen(values)) * 2.0**power, rel=1e-6)
