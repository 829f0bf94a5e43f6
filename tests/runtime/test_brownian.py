"""brownian against torchsde itself, and against what a Brownian motion is."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torchsde
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.runtime.brownian import BrownianNoise
from latentrt.runtime.errors import UsageError
from latentrt.runtime.noise import RNGS, Rng

LOW, HIGH = float(np.float32(0.0291675)), float(np.float32(14.614642))
# Karras steps of Stable Diffusion, from the largest sigma to the smallest.
RAMP = np.linspace(0.0, 1.0, 8)
SIGMAS = [float(s) for s in (HIGH ** (1 / 7) + RAMP * (LOW ** (1 / 7) - HIGH ** (1 / 7))) ** 7]

sigmas = st.floats(LOW, HIGH, width=32)


def torchsde_noise(seed: int, shape: tuple[int, ...], sigma: float, sigma_next: float) -> np.ndarray:
    """One image's noise from the tree that k-diffusion makes, float32 sigmas included."""
    a, b = (float(np.float32(s)) for s in (sigma, sigma_next))
    # torchsde rounds the ends of its range and then warns of a query at an end that was not rounded.
    tree = torchsde.BrownianTree(LOW, torch.zeros(shape), HIGH, entropy=seed)
    start, end = tree._interval._start, tree._interval._end
    increment = tree(max(min(a, b), start), min(max(a, b), end)).numpy() * math.copysign(1.0, b - a)
    return np.asarray(increment / math.sqrt(abs(b - a)))


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**63])
def test_the_numbers_are_torchsdes(seed: int) -> None:
    noise = BrownianNoise([seed, seed + 1], (2, 4, 8, 8), LOW, HIGH)
    for sigma, sigma_next in itertools.pairwise(SIGMAS):
        expected = np.stack([torchsde_noise(seed + i, (4, 8, 8), sigma, sigma_next) for i in range(2)])
        # Both add some twenty float32 numbers of size up to 15, one an ulp of 1e-6 each; over these steps.
        np.testing.assert_allclose(noise(sigma, sigma_next), expected, rtol=0, atol=2e-5)


@given(seed=st.integers(0, 2**64 - 1), ends=st.tuples(sigmas, sigmas).filter(lambda e: abs(e[0] - e[1]) > 1e-3))
@settings(max_examples=40, deadline=None)
def test_the_numbers_are_torchsdes_between_any_sigmas(seed: int, ends: tuple[float, float]) -> None:
    noise = BrownianNoise([seed], (1, 3, 5), LOW, HIGH)(*ends)
    expected = torchsde_noise(seed, (3, 5), *ends)
    np.testing.assert_allclose(noise[0], expected, rtol=0, atol=1e-5 / math.sqrt(abs(ends[0] - ends[1])))


@pytest.mark.parametrize("rng", RNGS)
@given(queries=st.lists(sigmas, min_size=3, max_size=12, unique=True))
@settings(max_examples=15, deadline=None)
def test_parts_add_up_whatever_the_order(rng: Rng, queries: list[float]) -> None:
    def increment(path: BrownianNoise, a: float, b: float) -> np.ndarray:
        return path(a, b) * math.sqrt(abs(float(np.float32(b)) - float(np.float32(a))))

    first = BrownianNoise([3], (1, 2, 3, 3), LOW, HIGH, rng=rng)
    parts = [increment(first, a, b) for a, b in itertools.pairwise(queries)]
    # A path that was asked for nothing else.
    second = BrownianNoise([3], (1, 2, 3, 3), LOW, HIGH, rng=rng)
    whole = increment(second, queries[0], queries[-1])
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=0, atol=2e-5)
    # Bit for bit: neither what is kept nor the order of queries shows.
    for (a, b), part in reversed(list(zip(itertools.pairwise(queries), parts, strict=True))):
        np.testing.assert_array_equal(increment(second, a, b), part)
        np.testing.assert_array_equal(increment(second, b, a), -part)


@pytest.mark.parametrize("rng", RNGS)
def test_an_image_is_the_same_in_any_batch(rng: Rng) -> None:
    together = BrownianNoise([5, 6, 7], (3, 4, 6, 6), LOW, HIGH, rng=rng)
    alone = [BrownianNoise([seed], (1, 4, 6, 6), LOW, HIGH, rng=rng) for seed in (5, 6, 7)]
    for sigma, sigma_next in itertools.pairwise(SIGMAS):
        values = together(sigma, sigma_next)
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, np.concatenate([each(sigma, sigma_next) for each in alone]))


@pytest.mark.parametrize("rng", RNGS)
def test_steps_have_unit_variance_and_are_uncorrelated(rng: Rng) -> None:
    noise = BrownianNoise([11], (1, 4, 64, 64), LOW, HIGH, rng=rng)
    steps = np.stack([noise(a, b).ravel() for a, b in itertools.pairwise(SIGMAS)]).astype(np.float64)
    # 16384 numbers a step: 5 standard errors of each entry of the covariance.
    np.testing.assert_allclose(np.cov(steps), np.eye(len(steps)), rtol=0, atol=5 * math.sqrt(2.0 / 16384))
    np.testing.assert_allclose(steps.mean(axis=1), 0.0, rtol=0, atol=5 / math.sqrt(16384))


def test_seeds_of_other_signs_and_kinds_give_other_paths() -> None:
    def step(seed: int, rng: Rng) -> np.ndarray:
        return BrownianNoise([seed], (1, 8), LOW, HIGH, rng=rng)(5.0, 1.0)

    np.testing.assert_array_equal(step(-1, "cpu"), step(2**64 - 1, "cpu"))
    paths = [step(1, "cpu"), step(2, "cpu"), step(2**32 + 1, "cpu"), step(1, "cuda"), step(1, "numpy")]
    for a, b in itertools.combinations(paths, 2):
        assert (a != b).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], (3, 4), 0.1, 1.0), r"shape: expected 2 rows, one for each seed, got \(3, 4\)"),
        (([1], (1, 4), 1.0, 1.0), "sigmas: expected sigma_min < sigma_max"),
        (([1], (1, 4), 0.1, math.nan), "sigmas: expected sigma_min < sigma_max"),
        (([1.5], (1, 4), 0.1, 1.0), "seed: expected an integer"),
    ],
)
def test_arguments_are_checked(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BrownianNoise(*arguments)


@pytest.mark.parametrize("ends", [(0.05, 1.0), (0.5, 2.0), (0.5, math.nan)])
def test_sigmas_outside_the_path_are_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match=r"sigma: expected 0.1 to 1.0, the range of the path, got"):
        BrownianNoise([1], (1, 4), 0.1, 1.0)(*ends)


def test_a_step_of_no_length_is_refused() -> None:
    with pytest.raises(UsageError, match=r"sigma_next: expected another sigma than 0\.5, got 0\.5"):
        BrownianNoise([1], (1, 4), 0.1, 1.0)(0.5, 0.5)
