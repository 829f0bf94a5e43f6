"""DPM-Solver and DPM-Solver++, singlestep: blocks of one, two or three evaluations, each over the whole block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from .exponential_weights import phis
from .parametrisation import Array, alpha_sigma, combine
from .sampler_loop import Sampler
from .solver_dpm import DIFFUSERS_SDE_BEND
from .solver_dpmpp import SolverType
from .solver_multistep import Past, data_update, epsilon_of, noise_update, remember, total_of
from .solver_parts import Levels, NoiseSource, at, draw
from .steps import Steps


def dpm_singlestep(
    x: Array,
    steps: Steps,
    *,
    algorithm_type: Literal["dpmsolver++", "dpmsolver", "sde-dpmsolver++"] = "dpmsolver++",
    solver_order: int = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: bool = False,
    noise: NoiseSource | None = None,
    levels: Levels = alpha_sigma,
) -> Sampler:
    """Singlestep DPM-Solver and DPM-Solver++ as diffusers' `DPMSolverSinglestepScheduler` has them.

    Algorithms 4 and 5 of Lu et al. 2022 (arXiv 2206.00927) and Algorithm 1 of arXiv 2211.01095, with the points inside
    a block taken from the schedule, and each evaluation counted as a step: the second and the third of a block start
    anew from where the block started, with one more output to go by.

    Args:
        x: initial latent.
        steps: a step to sigma 0 gives the denoised latent.
        algorithm_type: integrates the denoised latent, the noise, or the denoised latent's SDE.
        solver_order: length of the blocks, 1 to 3.
        solver_type: heun integrates the polynomial through the outputs, midpoint is simpler.
        lower_order_final: let the last blocks be shorter; always so where the steps would not do or end at sigma 0.
        noise: needed for the SDE.
        levels: of the space.
    """
    total, past, start = total_of(steps), Past(), x
    orders = singlestep_orders(
        total, solver_order, lower_order_final=lower_order_final, to_zero=bool(steps) and steps[-1].sigma_next == 0
    )
    of_noise = algorithm_type == "dpmsolver"
    stochastic = algorithm_type == "sde-dpmsolver++"
    rate = -1.0 if of_noise else 2.0 if stochastic else 1.0
    for step in steps:
        denoised = yield at(x, step)
        if step.sigma_next == 0:
            x = combine((1.0, denoised))
            continue
        output = epsilon_of(x, denoised, step.sigma, levels) if of_noise else denoised
        past = remember(past, step.sigma, output, solver_order)
        order = min(orders[step.index], len(past))
        if order == 1:
            start = x
        block = past[:order]
        origin = block[-1][0]
        h = math.log(origin / step.sigma_next)
        weights = _block_weights(
            h,
            [math.log(origin / sigma) for sigma, _ in block[:-1]],
            rate,
            midpoint=solver_type == "midpoint",
            bend_shift=DIFFUSERS_SDE_BEND if stochastic else 0.0,
        )
        if of_noise:
            x = noise_update(start, origin, step.sigma_next, weights, block, levels=levels)
            continue
        term = None
        if stochastic:
            term = levels(step.sigma_next)[1] * math.sqrt(max(-math.expm1(-2 * h), 0.0)), draw(noise, x)
        decay = math.exp(-h) if stochastic else 1.0
        x = data_update(start, origin, step.sigma_next, weights, block, levels=levels, decay=decay, noise=term)
    return x


def _block_weights(
    h: float, offsets: Sequence[float], rate: float, *, midpoint: bool, bend_shift: float
) -> tuple[float, ...]:
    """Weights of the outputs of a block, newest first.

    Args:
        h: length in log sigma from where the block started to where this step ends.
        offsets: from the block's start to its later outputs, newest first.
        rate: see `exponential_weights`.
        midpoint: whether the simpler formulas are used.
        bend_shift: see `taylor_weights`.
    """
    phi_1, phi_2, phi_3 = phis(h, rate)
    if not offsets:
        return (phi_1,)
    if len(offsets) == 1:
        slope = (phi_1 / 2 if midpoint else phi_2) * h / offsets[0]
        return slope, phi_1 - slope
    far, near = offsets
    if midpoint:
        slope = phi_2 * h / far
        return slope, 0.0, phi_1 - slope
    twice = 2 * (phi_3 + bend_shift) * h
    near_weight = (phi_2 * far + twice) / (far - near) * h / near
    far_weight = -(phi_2 * near + twice) / (far - near) * h / far
    return far_weight, near_weight, phi_1 - far_weight - near_weight


def singlestep_orders(total: int, solver_order: int, *, lower_order_final: bool, to_zero: bool) -> list[int]:
    """The order of each step by diffusers' rule: blocks of 1, 2, ... `solver_order`, shorter at the end.

    Args:
        total: steps.
        solver_order: 1 to 3.
        lower_order_final: whether the end may be shorter even if the blocks fit.
        to_zero: whether the last step ends at sigma 0, which is then of first order.
    """
    if not lower_order_final and not to_zero and total % solver_order == 0:
        return list(range(1, solver_order + 1)) * (total // solver_order)
    # The last block is replaced by one of one step less, then of what is left.
    whole = (total - 1) // solver_order
    orders = list(range(1, solver_order + 1)) * whole
    left = total - len(orders)
    orders += [*range(1, left), 1] if left == solver_order > 1 else range(1, left + 1)
    if to_zero:
        orders[-1] = 1
    return orders
