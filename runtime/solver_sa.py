"""SA-Solver: a stochastic Adams method whose noise depends on the timestep."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

from .exponential_weights import unified_weights
from .parametrisation import Array, alpha_sigma, combine
from .sampler_loop import Sampler
from .solver_multistep import Past, data_update, epsilon_of, log_lengths, noise_update, remember, total_of
from .solver_parts import Levels, NoiseSource, at, draw
from .steps import Steps

TauFunction: TypeAlias = Callable[[float], float]
"""How stochastic a step is, of its timestep: 0 is the probability flow, 1 the reverse SDE."""


def sa_solver(
    x: Array,
    steps: Steps,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    algorithm_type: Literal["data_prediction", "noise_prediction"] = "data_prediction",
    lower_order_final: bool = True,
    tau: float = 1.0,
    tau_func: TauFunction | None = None,
    noise: NoiseSource | None = None,
    levels: Levels = alpha_sigma,
) -> Sampler:
    """SA-Solver: Xue et al. 2023 (arXiv 2309.05019), Algorithm 1, as in diffusers.

    Predictor (stochastic Adams-Bashforth), evaluation, corrector (Adams-Moulton) with the noise of the predictor. For
    denoised latents, two outputs count as in UniPC with B_1(h).

    Args:
        x: initial latent.
        steps: a step to sigma 0 gives the denoised latent.
        predictor_order: how many outputs the predictor takes.
        corrector_order: how many the corrector takes, the new one included.
        algorithm_type: whether the denoised latent is integrated, or the noise.
        lower_order_final: lower the order of the last steps to how many are left.
        tau: of timesteps from 200 to 800; it is 0 elsewhere.
        tau_func: used instead.
        noise: drawn at every step whatever its tau, as in diffusers, so that a seed's numbers fall to the same steps.
        levels: of the space.
    """
    total, past = total_of(steps), Past()
    of_data = algorithm_type == "data_prediction"
    update = _data_step if of_data else _noise_step
    tau_of = tau_func or (lambda timestep: tau if 200 <= timestep <= 800 else 0.0)
    start, tau_now, order = x, 0.0, 0
    drawn: Array | None = None
    for step in steps:
        denoised = yield at(x, step)
        if step.sigma_next == 0:
            x = combine((1.0, denoised))
            continue
        output = denoised if of_data else epsilon_of(x, denoised, step.sigma, levels)
        known, past = past, remember(past, step.sigma, output, max(predictor_order, corrector_order))
        if known:
            x = update(start, known[0][0], step.sigma, past[:order], tau_now, drawn, levels=levels, new=True)
        left = total - step.index if lower_order_final else total
        start, drawn, tau_now = x, None if noise is None else draw(noise, x), float(tau_of(step.timestep))
        order = min(corrector_order, left + 1, len(past) + 1)
        taken = past[: min(predictor_order, left)]
        x = update(x, step.sigma, step.sigma_next, taken, tau_now, drawn, levels=levels)
    return x


def _data_step(
    x: Array,
    sigma: float,
    sigma_next: float,
    past: Past,
    tau: float,
    drawn: Array | None,
    *,
    levels: Levels,
    new: bool = False,
) -> Array:
    h, rate = math.log(sigma / sigma_next), 1 + tau**2
    weights = _weights(h, past, rate=rate, gain=rate * h, new=new)
    std = levels(sigma_next)[1] * math.sqrt(max(-math.expm1(-2 * tau**2 * h), 0.0))
    decay = math.exp(-(tau**2) * h)
    return data_update(x, sigma, sigma_next, weights, past, levels=levels, decay=decay, noise=_noise_term(std, drawn))


def _noise_step(
    x: Array,
    sigma: float,
    sigma_next: float,
    past: Past,
    tau: float,
    drawn: Array | None,
    *,
    levels: Levels,
    new: bool = False,
) -> Array:
    h = math.log(sigma / sigma_next)
    weights = [(1 + tau**2) * weight for weight in _weights(h, past, rate=-1.0, gain=None, new=new)]
    std = tau * levels(sigma_next)[1] * math.sqrt(max(math.expm1(2 * h), 0.0))
    return noise_update(x, sigma, sigma_next, weights, past, levels=levels, noise=_noise_term(std, drawn))


def _weights(h: float, past: Past, *, rate: float, gain: float | None, new: bool) -> list[float]:
    # One output alone is taken as constant, wherever it is.
    new = new and len(past) > 1
    return unified_weights(h, log_lengths(past[1:] if new else past), new=new, rate=rate, gain=gain)


def _noise_term(std: float, drawn: Array | None) -> tuple[float, Array] | None:
    return None if drawn is None or std == 0 else (std, drawn)
