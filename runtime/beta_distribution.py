"""Percent points of the beta distribution, for the noise levels named after it; SciPy is not needed at run time."""

from __future__ import annotations

import math

_TERMS = 200
_ROUNDS = 60


def beta_ppf(p: float, a: float, b: float) -> float:
    """The x in [0, 1] below which the share p of a Beta(a, b) distribution lies, to about 1e-14 relative.

    Newton's method on log I_x(a, b) as a function of log x, which is concave or convex throughout (by b < 1 or b > 1),
    so that no bracket is needed.

    Args:
        p: a probability; 0 and 1 give the ends.
        a: first shape, above 0.
        b: second shape, above 0.
    """
    if p <= 0 or p >= 1:
        return 0.0 if p <= 0 else 1.0
    if p > regularised_incomplete_beta(0.5, a, b):
        return 1 - _lower_half(1 - p, b, a)
    return _lower_half(p, a, b)


def _lower_half(p: float, a: float, b: float) -> float:
    """The percent point, if it is at most 0.5."""
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    log_x = min((math.log(p * a) + log_beta) / a, math.log(0.5))
    for _ in range(_ROUNDS):
        x = math.exp(log_x)
        share = regularised_incomplete_beta(x, a, b)
        log_density = (a - 1) * log_x + (b - 1) * math.log1p(-x) - log_beta
        change = math.log(p / share) * share / math.exp(log_x + log_density)
        log_x = min(log_x + change, math.log(0.5))
        if abs(change) < 1e-15:
            break
    return math.exp(log_x)


def regularised_incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), the share of a Beta(a, b) distribution below x: the series 8.17.22 of the NIST DLMF around 0."""
    if x > 0.5:
        return 1 - regularised_incomplete_beta(1 - x, b, a)
    if x <= 0:
        return 0.0
    factor, total = 1.0, 1 / a
    for n in range(1, _TERMS):
        factor *= (n - b) / n * x
        term = factor / (a + n)
        total += term
        if abs(term) < 1e-17 * abs(total):
            break
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) - log_beta) * total
