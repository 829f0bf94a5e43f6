"""Weights of exponential integrators, against quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from latentrt.runtime.exponential_weights import adams_weights, phis, taylor_weights, unified_weights


def integral(f: Callable[[float], float], h: float, rate: float) -> float:
    """Of rate * exp(-rate * (h - v)) * f(v) for v from 0 to h, by Gauss and Legendre."""
    points, weights = np.polynomial.legendre.leggauss(30)
    v = (points + 1) * h / 2
    values = rate * np.exp(-rate * (h - v)) * np.array([f(x) for x in v])
    return float(values @ weights * h / 2)


@pytest.mark.parametrize("rate", [1.0, 2.0, 1.7, -1.0])
@pytest.mark.parametrize("h", [0.02, 0.3, 2.5])
@pytest.mark.parametrize("lengths", [(), (0.4,), (0.4, 0.7), (0.4, 0.7, 0.2)])
@pytest.mark.parametrize("new", [True, False])
def test_polynomials_are_integrated_exactly(new: bool, lengths: tuple[float, ...], h: float, rate: float) -> None:
    nodes = [*([h] if new else []), *(-sum(lengths[:i]) for i in range(len(lengths) + 1))]
    weights = unified_weights(h, lengths, new=new, rate=rate)
    np.testing.assert_array_equal(weights, adams_weights(h, nodes, rate=rate))
    for power in range(len(nodes)):
        exact = integral(lambda v, power=power: v**power, h, rate)  # type: ignore[misc]
        assert sum(w * x**power for w, x in zip(weights, nodes, strict=True)) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("rate", [1.0, 2.0, -1.0])
@pytest.mark.parametrize("h", [0.02, 0.3, 2.5])
def test_taylor_weights(h: float, rate: float) -> None:
    def moment(power: int) -> float:
        return integral(lambda v: v**power, h, rate)

    assert taylor_weights(h, (), rate=rate) == pytest.approx([moment(0)])
    assert taylor_weights(h, (0.4,), rate=rate) == pytest.approx([moment(0) + moment(1) / 0.4, -moment(1) / 0.4])
    slope = moment(0) * h / 2 / 0.4
    assert taylor_weights(h, (0.4,), rate=rate, midpoint=True) == pytest.approx([moment(0) + slope, -slope])
    # The parabola through three outputs, a + b v + c v^2, with half of c's term.
    newest, middle, oldest = 1.3, -0.4, 0.9
    c, b, a = np.polyfit([0.0, -0.4, -1.1], [newest, middle, oldest], 2)
    expected = a * moment(0) + b * moment(1) + c * moment(2) / 2
    assert np.dot(taylor_weights(h, (0.4, 0.7), rate=rate), (newest, middle, oldest)) == pytest.approx(expected)


def test_a_step_of_no_length_changes_nothing() -> None:
    assert phis(0.0, 1.0) == (0.0, 0.0, 0.0)
    for weights in (
        taylor_weights(0.0, (0.4,)),
        taylor_weights(0.0, (0.4, 0.7)),
        unified_weights(0.0, (0.4, 0.7)),
        unified_weights(0.0, (0.4,), gain=0.0),
    ):
        np.testing.assert_allclose(weights, 0, atol=1e-17)


def test_digits_of_short_steps() -> None:
    h = 1e-4
    phi_1, phi_2, _ = phis(h, 1.0)
    assert phi_1 == pytest.approx(h - h**2 / 2 + h**3 / 6, rel=1e-12)
    assert phi_2 == pytest.approx(h / 2 - h**2 / 6, rel=1e-7)
    assert phis(h, -1.0)[0] == pytest.approx(-math.expm1(h), rel=1e-15)
