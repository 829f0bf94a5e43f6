from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentrt.calibrate.histogram import BINS, EDGES, Histogram, estimated, histogram_of, merged, percentile, weighted

FLOATS = st.floats(-65504, 65504, width=32)
LISTS = st.lists(FLOATS, min_size=1, max_size=50)


def seen(values: Any) -> Histogram:
    return histogram_of(torch.from_numpy(np.array(values, np.float32)))


@given(LISTS)
def test_every_number_is_counted_between_the_edges_of_its_bin(values: list[float]) -> None:
    found = seen(values)
    sizes = np.abs(np.array(values, np.float32)).astype(np.float64)
    expected, _ = np.histogram(sizes, bins=[*EDGES[:-1], np.inf])
    np.testing.assert_array_equal(found.counts, expected)
    assert (found.count, found.least, found.largest) == (len(values), sizes.min(), sizes.max())


def test_edges_are_the_numbers_of_bfloat16_over_the_range_of_float16() -> None:
    assert len(EDGES) == BINS + 1
    assert (EDGES[0], EDGES[-1]) == (0, 65536)
    assert (np.diff(EDGES) > 0).all()
    bits = EDGES.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    assert EDGES[1] == np.float32(2.0**-24) * (1 + 1 / 128)
    # Beyond the range: in the outermost bins, and the extremes are exact.
    found = seen([1e-30, 1e9])
    assert (found.counts[0], found.counts[-1]) == (1, 1)
    assert (found.least, found.largest) == (float(np.float32(1e-30)), 1e9)
    assert percentile(found, 100) == 1e9


@given(LISTS, LISTS)
def test_merging_gives_the_histogram_of_both(one: list[float], other: list[float]) -> None:
    found, whole = merged(seen(one), seen(other)), seen(one + other)
    np.testing.assert_array_equal(found.counts, whole.counts)
    assert (found.least, found.largest) == (whole.least, whole.largest)


@given(st.lists(st.floats(2.0**-24, 65504, width=32), min_size=1, max_size=60), st.floats(0.01, 100))
def test_a_percentile_is_that_of_the_sorted_numbers_to_one_part_in_128(values: list[float], percent: float) -> None:
    ordered = np.sort(np.array(values, np.float32).astype(np.float64))
    # The least number that so many do not exceed.
    rank = percent / 100 * len(ordered)
    exact = ordered[max(int(np.ceil(rank)) - 1, 0)]
    found = percentile(seen(values), percent)
    assert abs(found - exact) <= exact / 128
    assert ordered[0] <= found <= ordered[-1]
    assert percentile(seen(values), 100) == ordered[-1]


def test_percentiles_inside_of_bins_are_those_of_evenly_spread_numbers() -> None:
    values = np.linspace(0, 8, 800_001)
    for percent in (1, 37.5, 99, 99.9, 99.99):
        assert percentile(seen(values), percent) == pytest.approx(8 * percent / 100, rel=1e-4)
    assert percentile(seen(np.zeros(7)), 99) == 0


def test_weights_count_parts_alike_however_many_numbers_they_have() -> None:
    few, many = seen([1.0, 1.0]), seen([4.0] * 1000)
    both = weighted([few, many], [3.0, 1.0])
    assert both.count == pytest.approx(4)
    assert both.counts[np.searchsorted(EDGES, 1.0)] == pytest.approx(3)
    assert (both.least, both.largest) == (1, 4)
    assert percentile(both, 70) == pytest.approx(1, rel=1 / 128)


def test_a_histogram_is_estimated_from_rows_that_stand_for_others() -> None:
    rows = np.array([[1, -4], [0.5, 8]], np.float32)
    found = estimated(rows, np.array([3.0, 2.0]), 8.0)
    whole = seen([1, -4] * 3 + [0.5, 8] * 2)
    np.testing.assert_array_equal(found.counts, whole.counts)
    assert (found.least, found.largest) == (whole.least, whole.largest)
    # The largest number is known, whether its row was sampled or not, and none is larger, whatever was rounded.
    found = estimated(rows, np.array([3.0, 2.0]), 100.0)
    assert (found.count, percentile(found, 100)) == (whole.count + 1, 100)
    found = estimated(rows, np.array([3.0, 2.0]), 7.9)
    assert (found.count, percentile(found, 100)) == (whole.count, 7.9)
