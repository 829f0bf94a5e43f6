from __future__ import annotations

import json

import numpy as np
import pytest

from latentrt.export.parity import PSNR_CAP, Case, Comparison, compare, measure
from latentrt.runtime.errors import ExportError

RNG = np.random.default_rng(0)
REFERENCE = RNG.standard_normal((2, 4, 8, 8)).astype(np.float32)


def test_compare_matches_the_definitions() -> None:
    candidate = REFERENCE + 1e-3 * RNG.standard_normal(REFERENCE.shape).astype(np.float32)
    difference = (candidate.astype(np.float64) - REFERENCE.astype(np.float64)).ravel()
    found = compare(REFERENCE, candidate)
    assert found.max_abs == pytest.approx(np.max(np.abs(difference)), rel=1e-12)
    assert found.relative_l2 == pytest.approx(
        np.sqrt(np.sum(difference**2) / np.sum(REFERENCE.astype(np.float64) ** 2)), rel=1e-12
    )
    peak = float(REFERENCE.max()) - float(REFERENCE.min())
    assert found.psnr_db == pytest.approx(10 * np.log10(peak**2 / np.mean(difference**2)), rel=1e-9)
    assert found.finite


def test_equal_arrays_have_no_error_and_a_psnr_that_json_holds() -> None:
    found = compare(REFERENCE, REFERENCE.copy())
    assert (found.max_abs, found.relative_l2, found.psnr_db) == (0.0, 0.0, PSNR_CAP)
    json.dumps(found.figures(), allow_nan=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["reference", "candidate", "both"])
def test_one_nan_or_infinity_is_never_within_any_bound(bad: float, where: str) -> None:
    reference, candidate = REFERENCE.copy(), REFERENCE.copy()
    if where != "candidate":
        reference[0, 0, 0, 0] = bad
    if where != "reference":
        candidate[0, 0, 0, 0] = bad
    found = compare(reference, candidate)
    assert not found.finite
    assert not found.within(np.inf)


def test_a_nan_figure_is_not_within_a_bound() -> None:
    assert not Comparison(max_abs=0, relative_l2=np.nan, psnr_db=0, finite=True).within(1.0)


def test_an_error_against_zeros_is_infinite_and_zeros_against_zeros_is_none() -> None:
    zeros = np.zeros((3, 3), np.float32)
    assert compare(zeros, zeros).within(0.0)
    assert not compare(zeros, zeros + 1e-9).within(1e30)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ExportError, match="expected shape"):
        compare(REFERENCE, REFERENCE[:1])


def test_measure_keeps_the_worst_output_of_each_case() -> None:
    cases = [Case(name, {}, {"a": REFERENCE, "b": REFERENCE}) for name in ("one", "two")]
    answers = iter([{"a": REFERENCE, "b": REFERENCE * 1.001}, {"a": REFERENCE * 1.002, "b": REFERENCE}])
    figures = measure(lambda feeds: next(answers), cases, name="unet fp32", bound=1e-2)
    assert figures["one"]["relative_l2"] == pytest.approx(1e-3, rel=1e-3)
    assert figures["two"]["relative_l2"] == pytest.approx(2e-3, rel=1e-3)
    assert figures["worst_relative_l2"] == figures["two"]["relative_l2"]


@pytest.mark.parametrize(("factor", "said"), [(1.1, "relative L2 0.1"), (np.nan, "NaN or infinity")])
def test_measure_fails_with_component_output_case_and_figures(factor: float, said: str) -> None:
    case = Case("timestep 981", {}, {"out_sample": REFERENCE})
    with pytest.raises(ExportError) as caught:
        measure(lambda feeds: {"out_sample": REFERENCE * factor}, [case], name="unet fp32", bound=1e-4)
    for word in ("unet fp32", "out_sample", "timestep 981", said):
        assert word in str(caught.value)
