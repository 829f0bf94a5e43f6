from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from latentrt.calibrate.reservoir import Reservoir, merged, reservoir_of

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((300, 3)).astype(np.float16)
ROWS[7] *= 50


def sampled(indices: Any, uniform: Any, capacity: int) -> Reservoir:
    rows = ROWS[indices]
    importance = np.abs(rows.astype(np.float64)).max(1) ** 2
    return reservoir_of(importance, uniform[indices], lambda chosen: rows[chosen], capacity=capacity)


@given(st.integers(0, 300), st.integers(1, 40), st.integers(0, 9))
def test_two_parts_merge_to_the_reservoir_of_the_whole(cut: int, capacity: int, seed: int) -> None:
    uniform = 1 - np.random.default_rng(seed).random(300)
    order = np.random.default_rng(seed + 1).permutation(300)
    whole = sampled(np.arange(300), uniform, capacity)
    parts = sampled(order[:cut], uniform, capacity), sampled(order[cut:], uniform, capacity)
    for found in (merged(*parts), merged(*parts[::-1])):
        np.testing.assert_array_equal(found.priorities, whole.priorities)
        np.testing.assert_array_equal(found.rows, whole.rows)
        np.testing.assert_array_equal(found.importance, whole.importance)


def test_sums_are_estimated_without_bias_and_outliers_are_always_kept() -> None:
    estimates = []
    exact = np.square(ROWS.astype(np.float64)).sum()
    for seed in range(2000):
        found = sampled(np.arange(300), 1 - np.random.default_rng(seed).random(300), 20)
        rows, counts = found.sample()
        assert rows.shape == (20, 3)
        assert (np.abs(rows).max(1) > 20).any()
        estimates.append(counts @ np.square(rows.astype(np.float64)).sum(1))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - exact) < 4 * error
    # Even sampling of 20 of 300 would miss the outlier 14 times of 15.
    assert np.std(estimates) < 0.05 * exact


def test_all_rows_are_kept_where_there_is_room_and_zeros_never() -> None:
    uniform = np.full(4, 0.5)
    values = np.array([[0, 0], [1, 2], [3, 1], [0, 0]], np.float16)
    importance = np.array([0.0, 4, 9, 0])
    rows, counts = reservoir_of(importance, uniform, lambda chosen: values[chosen], capacity=2).sample()
    np.testing.assert_array_equal(rows, values[[2, 1]])
    np.testing.assert_array_equal(counts, [1, 1])
