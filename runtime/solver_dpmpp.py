"""DPM-Solver++, multistep: exponential integrators for the denoised latent."""

from __future__ import annotations

import math
from typing import Literal

from .exponential_weights import taylor_weights
from .parametrisation import Array, alpha_sigma, combine
from .sampler_loop import Sampler
from .solver_multistep import Past, data_update, log_lengths, order_of, remember, total_of
from .solver_parts import BrownianSource, Levels, NoiseSource, add_brownian, at
from .steps import Steps

SolverType = Literal["midpoint", "heun"]


def dpmpp_multistep(
    x: Array,
    steps: Steps,
    *,
    solver_order: int = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    eta: float = 0.0,
    s_noise: float = 1.0,
    bend_shift: float = 0.0,
    noise: NoiseSource | None = None,
    brownian: BrownianSource | None = None,
    levels: Levels = alpha_sigma,
) -> Sampler:
    """DPM-Solver++(1M, 2M, 3M) and their SDE: Lu et al. 2022 (arXiv 2211.01095), Algorithm 2 and section 5.

    With `eta` it is k-diffusion's `sample_dpmpp_2m_sde`. Where each step's order is lowered, see `order_of`.

    Args:
        x: initial latent.
        steps: a step to sigma 0 gives the denoised latent.
        solver_order: 1, 2 or 3.
        solver_type: how the second order takes the slope, see `taylor_weights`.
        lower_order_final: lower the order of the last two of fewer than 15 steps.
        euler_at_final: lower that of the last.
        eta: 0 is the probability flow, 1 the reverse SDE.
        s_noise: factor of the noise.
        bend_shift: see `taylor_weights`.
        noise: needed with `eta`; not drawn for a step to sigma 0.
        brownian: increments to use instead.
        levels: of the space.
    """
    total, past = total_of(steps), Past()
    for step in steps:
        denoised = yield at(x, step)
        if step.sigma_next == 0:
            x = combine((1.0, denoised))
            continue
        past = remember(past, step.sigma, denoised, solver_order)
        order = order_of(
            step,
            total,
            known=len(past),
            solver_order=solver_order,
            lower_order_final=lower_order_final,
            euler_at_final=euler_at_final,
        )
        h = math.log(step.sigma / step.sigma_next)
        weights = taylor_weights(
            h, log_lengths(past[:order]), rate=1 + eta, midpoint=solver_type == "midpoint", bend_shift=bend_shift
        )
        x = data_update(
            x, step.sigma, step.sigma_next, weights, past, levels=levels, decay=math.exp(-eta * h) if eta else 1.0
        )
        if eta:
            std = levels(step.sigma_next)[1] * math.sqrt(max(-math.expm1(-2 * eta * h), 0.0))
            x = add_brownian(x, s_noise * std, step.sigma, step.sigma_next, noise=noise, brownian=brownian)
    return x
