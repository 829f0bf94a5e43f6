"""LMS: the linear multistep method of Adams and Bashforth for steps of unequal length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .parametrisation import Array, combine
from .sampler_loop import Sampler
from .solver_parts import at
from .steps import Steps


def lms(x: Array, steps: Steps, *, order: int = 4) -> Sampler:
    """k-diffusion's `sample_lms`: epsilon as a polynomial in sigma through the last evaluations. Asks for epsilon.

    The first steps are of as high an order as there are evaluations, wherever the steps start. (diffusers, starting in
    the middle for image to image, takes weights of full order for the few evaluations it has.)
    """
    points, weights = (row.tolist() for row in np.polynomial.legendre.leggauss((order + 1) // 2))
    newest: list[tuple[float, Array]] = []
    for step in steps:
        epsilon = yield at(x, step)
        newest = [(step.sigma, epsilon), *newest[: order - 1]]
        half = (step.sigma_next - step.sigma) / 2
        nodes = [step.sigma + half * (1 + point) for point in points]
        sigmas = [sigma for sigma, _ in newest]
        lagrange = ([_lagrange(sigmas, i, node) for node in nodes] for i in range(len(sigmas)))
        # Gauss' quadrature is exact for polynomials of this degree.
        terms = [half * sum(w * value for w, value in zip(weights, values, strict=True)) for values in lagrange]
        x = combine((1.0, x), *((term, epsilon) for term, (_, epsilon) in zip(terms, newest, strict=True)))
    return x


def _lagrange(sigmas: Sequence[float], which: int, at_sigma: float) -> float:
    """The polynomial that is 1 at one of the sigmas and 0 at the others."""
    value = 1.0
    for i, sigma in enumerate(sigmas):
        if i != which:
            value *= (at_sigma - sigma) / (sigmas[which] - sigma)
    return value
