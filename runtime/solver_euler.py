"""Euler's method and its ancestral form."""

from __future__ import annotations

from .parametrisation import Array, combine
from .sampler_loop import Sampler
from .solver_parts import NoiseSource, add_noise, ancestral_step, at, churned
from .steps import Steps


def euler(x: Array, steps: Steps, *, noise: NoiseSource | None = None, **churn: float) -> Sampler:
    """Euler's method on the probability flow: Algorithm 2 of Karras et al. 2022 (arXiv 2206.00364), first order.

    k-diffusion's `sample_euler`; `churn` is s_churn, s_tmin, s_tmax and s_noise of `solver_parts.churned`.
    """
    for step in steps:
        start = churned(x, step, steps, noise=noise, **churn)
        denoised = yield start
        # x + (sigma_next - sigma) * (x - denoised) / sigma, without the cancellation at large sigma
        ratio = step.sigma_next / start.sigma
        x = combine((ratio, start.sample), (1 - ratio, denoised))
    return x


def euler_ancestral(
    x: Array, steps: Steps, *, eta: float = 1.0, s_noise: float = 1.0, noise: NoiseSource | None = None
) -> Sampler:
    """Euler steps past the next noise level and noise back up to it: k-diffusion's `sample_euler_ancestral`."""
    for step in steps:
        denoised = yield at(x, step)
        sigma_down, sigma_up = ancestral_step(step.sigma, step.sigma_next, eta=eta)
        ratio = sigma_down / step.sigma
        x = combine((ratio, x), (1 - ratio, denoised))
        x = add_noise(x, s_noise * sigma_up, noise)
    return x
