"""Samplers as generators: each yields where it needs the denoiser, is sent its answer, and returns the final latent.

A solver knows sigmas and denoised latents only; what the model predicts is added around it (`sampler_loop.py`).

Latents are carried in the space of the diffusers class of the same sampler, so that they can be compared after every
step: variance preserving for DDIM, PLMS and DPM-Solver++, variance exploding for Euler (see `parametrisation.py`).
Arrays keep their dtype, usually float32; coefficients are computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy.typing as npt

from .errors import UsageError
from .noise_schedule import PredictionType
from .parametrisation import Array, alpha_sigma, from_denoised, to_denoised
from .sampler_loop import Evaluation, Sampler
from .steps import Step, Steps

NoiseSource: TypeAlias = Callable[[tuple[int, ...]], npt.NDArray[Any]]
"""Draws standard normal numbers of the given shape, as `torch_rng.batch_noise` does."""


def ddim(x: Array, steps: Steps, *, eta: float = 0.0, noise: NoiseSource | None = None) -> Sampler:
    """DDIM, equations 12 and 16 of Song et al. 2021 (arXiv 2010.02502); `eta` 0 is deterministic, 1 is DDPM."""
    for step in steps:
        denoised = yield _at(x, step)
        alpha, sigma = alpha_sigma(step.sigma)
        alpha_next, sigma_next = alpha_sigma(step.sigma_next)
        std = eta * sigma_next / sigma * math.sqrt(max(1 - (alpha / alpha_next) ** 2, 0.0))
        epsilon = (x - alpha * denoised) / sigma
        x = alpha_next * denoised + math.sqrt(max(sigma_next**2 - std**2, 0.0)) * epsilon
        if std > 0:
            x = x + std * _draw(noise, x)
    return x


def plms(x: Array, steps: Steps, *, extrapolate: PredictionType = "epsilon") -> Sampler:
    """Pseudo linear multistep: Liu et al. 2022 (arXiv 2202.09778), equations 9 and 12, as in latent-diffusion.

    Its first step is an improved Euler step of two evaluations, each of which counts as a step (see `plms_steps`).

    Args:
        x: initial latent, variance preserving.
        steps: of `plms_steps`.
        extrapolate: which quantity the Adams-Bashforth formula is applied to: epsilon in the paper; diffusers applies
            it to the model's output, whatever that is.
    """
    outputs: list[Array] = []
    start = x
    for step in steps:
        correction = step.index == 1
        sigma = step.sigma_next if correction else step.sigma
        denoised = yield Evaluation(x, sigma, step.timestep, step.index, x)
        output = from_denoised(denoised, x, sigma, extrapolate)
        if correction:
            mean: Array = 0.5 * (output + outputs[-1])
        else:
            start, outputs = x, [*outputs[-3:], output]
            mean = _adams_bashforth(outputs)
        x = _transfer(start, to_denoised(mean, start, step.sigma, extrapolate), step)
    return x


def euler(x: Array, steps: Steps) -> Sampler:
    """Euler's method on the probability flow: Algorithm 2 of Karras et al. 2022 (arXiv 2206.00364) without churn."""
    for step in steps:
        denoised = yield _at(x, step)
        # x + (sigma_next - sigma) * (x - denoised) / sigma, without the cancellation at large sigma
        x = denoised + step.sigma_next / step.sigma * (x - denoised)
    return x


def euler_ancestral(
    x: Array, steps: Steps, *, eta: float = 1.0, s_noise: float = 1.0, noise: NoiseSource | None = None
) -> Sampler:
    """Euler steps past the next noise level and noise back up to it: k-diffusion's `sample_euler_ancestral`."""
    for step in steps:
        denoised = yield _at(x, step)
        sigma_down, sigma_up = ancestral_step(step.sigma, step.sigma_next, eta=eta)
        x = denoised + sigma_down / step.sigma * (x - denoised)
        if sigma_up > 0:
            x = x + s_noise * sigma_up * _draw(noise, x)
    return x


def dpmpp_2m(x: Array, steps: Steps, *, lower_order_final: bool = True, euler_at_final: bool = False) -> Sampler:
    """DPM-Solver++(2M), Algorithm 2 of Lu et al. 2022 (arXiv 2211.01095), midpoint form.

    The last step is of first order if it ends at sigma 0, if `euler_at_final`, or if `lower_order_final` and there are
    fewer than 15 steps.
    """
    previous: tuple[float, Array] | None = None
    for step in steps:
        denoised = yield _at(x, step)
        last = step is steps[-1]
        first_order = last and (step.sigma_next == 0 or euler_at_final or (lower_order_final and step.index < 14))
        slope = denoised
        if previous is not None and not first_order:
            sigma_previous, denoised_previous = previous
            inverse_r = math.log(step.sigma / step.sigma_next) / math.log(sigma_previous / step.sigma)
            slope = denoised + 0.5 * inverse_r * (denoised - denoised_previous)
        x = _transfer(x, slope, step)
        previous = step.sigma, denoised
    return x


def ancestral_step(sigma: float, sigma_next: float, *, eta: float = 1.0) -> tuple[float, float]:
    """(sigma_down, sigma_up): how far to step down, and how much noise to add, to end at `sigma_next`."""
    sigma_up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    return math.sqrt(sigma_next**2 - sigma_up**2), sigma_up


def _at(x: Array, step: Step) -> Evaluation:
    return Evaluation(x, step.sigma, step.timestep, step.index, x)


def _transfer(x: Array, denoised: Array, step: Step) -> Array:
    """The exact solution from one variance-preserving level to the next if the denoised latent stayed as it is."""
    alpha, sigma = alpha_sigma(step.sigma)
    alpha_next, sigma_next = alpha_sigma(step.sigma_next)
    ratio = sigma_next / sigma
    return ratio * x + (alpha_next - ratio * alpha) * denoised


_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def _adams_bashforth(outputs: list[Array]) -> Array:
    """The explicit multistep formula of as many orders as there are outputs, the newest last, up to four."""
    weights = _ADAMS_BASHFORTH[len(outputs) - 1]
    total = weights[0] * outputs[-1]
    for weight, output in zip(weights[1:], reversed(outputs[:-1]), strict=True):
        total = total + weight * output
    return total


def _draw(noise: NoiseSource | None, x: Array) -> Array:
    if noise is None:
        raise UsageError("noise: expected a source of noise for a stochastic sampler, got None. Pass noise=.")
    return noise(x.shape)
