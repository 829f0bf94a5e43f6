"""DPM-Solver, multistep: exponential integrators for the noise; and the choice between these and DPM-Solver++."""

from __future__ import annotations

import math
from typing import Literal

from .exponential_weights import taylor_weights
from .parametrisation import Array, alpha_sigma, combine
from .sampler_loop import Sampler
from .solver_dpmpp import SolverType, dpmpp_multistep
from .solver_multistep import Past, epsilon_of, log_lengths, noise_update, order_of, remember, total_of
from .solver_parts import Levels, NoiseSource, at, draw
from .steps import Steps

AlgorithmType = Literal["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"]

# diffusers subtracts a half from the second derivative's coefficient where its other updates, and k-diffusion's 3M SDE,
# add one; whoever comes from diffusers expects its pictures.
DIFFUSERS_SDE_BEND = 1.0


def dpm_multistep(
    x: Array,
    steps: Steps,
    *,
    algorithm_type: AlgorithmType = "dpmsolver++",
    solver_order: int = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    noise: NoiseSource | None = None,
    levels: Levels = alpha_sigma,
) -> Sampler:
    """Diffusers' `DPMSolverMultistepScheduler`: `dpmpp_multistep` or `dpm_solver_multistep`, by `algorithm_type`."""
    stochastic = algorithm_type.startswith("sde-")
    if algorithm_type.endswith("++"):
        return dpmpp_multistep(
            x,
            steps,
            solver_order=solver_order,
            solver_type=solver_type,
            lower_order_final=lower_order_final,
            euler_at_final=euler_at_final,
            eta=1.0 if stochastic else 0.0,
            bend_shift=DIFFUSERS_SDE_BEND if stochastic else 0.0,
            noise=noise,
            levels=levels,
        )
    return dpm_solver_multistep(
        x,
        steps,
        solver_order=solver_order,
        solver_type=solver_type,
        lower_order_final=lower_order_final,
        euler_at_final=euler_at_final,
        stochastic=stochastic,
        noise=noise,
        levels=levels,
    )


def dpm_solver_multistep(
    x: Array,
    steps: Steps,
    *,
    solver_order: int = 2,
    solver_type: SolverType = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    stochastic: bool = False,
    noise: NoiseSource | None = None,
    levels: Levels = alpha_sigma,
) -> Sampler:
    """DPM-Solver(1, 2, 3), multistep: Lu et al. 2022 (arXiv 2206.00927); its SDE if `stochastic`.

    diffusers refuses to end at sigma 0 here. The limit of a step of first order is the denoised latent, and that is it.
    """
    total, past = total_of(steps), Past()
    for step in steps:
        denoised = yield at(x, step)
        if step.sigma_next == 0:
            x = combine((1.0, denoised))
            continue
        past = remember(past, step.sigma, epsilon_of(x, denoised, step.sigma, levels), solver_order)
        order = order_of(
            step,
            total,
            known=len(past),
            solver_order=solver_order,
            lower_order_final=lower_order_final,
            euler_at_final=euler_at_final,
        )
        h = math.log(step.sigma / step.sigma_next)
        weights = taylor_weights(h, log_lengths(past[:order]), rate=-1.0, midpoint=solver_type == "midpoint")
        term = None
        if stochastic:
            weights = tuple(2 * weight for weight in weights)
            term = levels(step.sigma_next)[1] * math.sqrt(max(math.expm1(2 * h), 0.0)), draw(noise, x)
        x = noise_update(x, step.sigma, step.sigma_next, weights, past, levels=levels, noise=term)
    return x
