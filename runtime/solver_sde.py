"""DPM-Solver++ with noise, as k-diffusion has it: 2S ancestral, SDE and 3M SDE, over variance exploding latents.

All start from the exact solution for a denoised latent that stays as it is, x * (s' / s) + denoised * (1 - s' / s),
where s' is the level stepped down to before noise is added.
"""

from __future__ import annotations

import math

from .exponential_weights import taylor_weights
from .parametrisation import Array, combine
from .sampler_loop import Evaluation, Sampler
from .solver_multistep import log_lengths, remember
from .solver_parts import BrownianSource, NoiseSource, add_brownian, add_noise, ancestral_step, at
from .steps import Steps


def dpmpp_2s_ancestral(
    x: Array, steps: Steps, *, eta: float = 1.0, s_noise: float = 1.0, noise: NoiseSource | None = None
) -> Sampler:
    """DPM-Solver++(2S), Algorithm 1 of Lu et al. 2022 (arXiv 2211.01095), with ancestral noise.

    k-diffusion's `sample_dpmpp_2s_ancestral`. A step to sigma 0 is one of Euler.
    """
    for step in steps:
        denoised = yield at(x, step)
        sigma_down, sigma_up = ancestral_step(step.sigma, step.sigma_next, eta=eta)
        if sigma_down > 0:
            middle = math.sqrt(step.sigma * sigma_down)
            ratio = middle / step.sigma
            between = combine((ratio, x), (1 - ratio, denoised))
            denoised = yield Evaluation(between, middle, None, step.index, x)
        ratio = sigma_down / step.sigma
        x = combine((ratio, x), (1 - ratio, denoised))
        x = add_noise(x, s_noise * sigma_up, noise)
    return x


def dpmpp_sde(
    x: Array,
    steps: Steps,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
    noise: NoiseSource | None = None,
    brownian: BrownianSource | None = None,
) -> Sampler:
    """DPM-Solver++, stochastic, of second order: k-diffusion's `sample_dpmpp_sde`.

    Args:
        x: initial latent, variance exploding.
        steps: a step to sigma 0 is one of Euler.
        eta: 0 is deterministic, 1 the SDE.
        s_noise: standard deviation of the noise.
        r: where in log sigma the second evaluation is, as a share of the step.
        noise: without `brownian`, both evaluations of a step draw independent noise.
        brownian: increments from the start of a step to its middle, and from the start to the end.
    """
    for step in steps:
        denoised = yield at(x, step)
        if step.sigma_next == 0:
            x = denoised
            continue
        middle = step.sigma ** (1 - r) * step.sigma_next**r
        sigma_down, sigma_up = ancestral_step(step.sigma, middle, eta=eta)
        ratio = sigma_down / step.sigma
        between = combine((ratio, x), (1 - ratio, denoised))
        between = add_brownian(between, s_noise * sigma_up, step.sigma, middle, noise=noise, brownian=brownian)
        denoised_middle = yield Evaluation(between, middle, None, step.index, x)

        sigma_down, sigma_up = ancestral_step(step.sigma, step.sigma_next, eta=eta)
        ratio, weight = sigma_down / step.sigma, 1 / (2 * r)
        x = combine(
            (ratio, x),
            ((1 - ratio) * weight, denoised_middle),
            *([((1 - ratio) * (1 - weight), denoised)] if weight != 1 else []),
        )
        x = add_brownian(x, s_noise * sigma_up, step.sigma, step.sigma_next, noise=noise, brownian=brownian)
    return x


def dpmpp_3m_sde(
    x: Array,
    steps: Steps,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: NoiseSource | None = None,
    brownian: BrownianSource | None = None,
) -> Sampler:
    """DPM-Solver++(3M), stochastic: k-diffusion's `sample_dpmpp_3m_sde`.

    The denoised latent is a parabola in log sigma through the last three evaluations, of which the bend has half of
    Taylor's weight, as in the code of DPM-Solver's authors: it is of second order. A step to sigma 0 is one of Euler.
    """
    newest: list[tuple[float, Array]] = []
    for step in steps:
        denoised = yield at(x, step)
        if step.sigma_next == 0:
            x = denoised
            continue
        newest = remember(newest, step.sigma, denoised, 3)
        h = math.log(step.sigma / step.sigma_next)
        weights = taylor_weights(h, log_lengths(newest), rate=1 + eta)
        terms = ((weight, value) for weight, (_, value) in zip(weights, newest, strict=True))
        x = combine((math.exp(-(1 + eta) * h), x), *terms)
        std = step.sigma_next * math.sqrt(-math.expm1(-2 * eta * h))
        x = add_brownian(x, s_noise * std, step.sigma, step.sigma_next, noise=noise, brownian=brownian)
    return x
