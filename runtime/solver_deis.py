"""DEIS: Adams-Bashforth for the noise, exact in log sigma."""

from __future__ import annotations

import math

from .exponential_weights import unified_weights
from .parametrisation import Array, alpha_sigma, combine
from .sampler_loop import Sampler
from .solver_multistep import Past, epsilon_of, log_lengths, noise_update, order_of, remember, total_of
from .solver_parts import Levels, at
from .steps import Steps


def deis(
    x: Array, steps: Steps, *, solver_order: int = 2, lower_order_final: bool = True, levels: Levels = alpha_sigma
) -> Sampler:
    """DEIS with polynomials in log rho: Zhang and Chen 2023 (arXiv 2204.13902), equation 15 and section 3.3.

    rho is the noise-to-signal ratio. In log rho its integrals are those of an exponential integrator in lambda, so that
    this is a multistep DPM-Solver which interpolates.
    """
    total, past = total_of(steps), Past()
    for step in steps:
        denoised = yield at(x, step)
        if step.sigma_next == 0:
            x = combine((1.0, denoised))
            continue
        past = remember(past, step.sigma, epsilon_of(x, denoised, step.sigma, levels), solver_order)
        order = order_of(step, total, known=len(past), solver_order=solver_order, lower_order_final=lower_order_final)
        h = math.log(step.sigma / step.sigma_next)
        weights = unified_weights(h, log_lengths(past[:order]), rate=-1.0)
        x = noise_update(x, step.sigma, step.sigma_next, weights, past, levels=levels)
    return x
