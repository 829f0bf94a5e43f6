"""Improved pseudo numerical methods: Adams-Bashforth formulas from the first step on, with as many values as there are.

Both follow section 3.3 and appendix of Zhang and Chen 2022 (arXiv 2204.13902), who dropped the warm-up of PNDM.
"""

from __future__ import annotations

import math

from .parametrisation import Array, alpha_sigma, combine
from .sampler_loop import Sampler
from .solver_parts import at
from .solver_pndm import ADAMS_BASHFORTH
from .steps import Steps


def iplms(x: Array, steps: Steps) -> Sampler:
    """Fourth order in variance-preserving latents: diffusers' `IPNDMScheduler`, and iPLMS of v-diffusion.

    It is sent the noise. From pure noise, where that says nothing of the clean latent, the first step takes it as 0.
    """
    values: list[Array] = []
    for step in steps:
        epsilon = yield at(x, step)
        values = [epsilon, *values[:3]]
        alpha_next, sigma_next = alpha_sigma(step.sigma_next)
        if math.isinf(step.sigma):
            ratio, gain = 0.0, sigma_next
        else:
            alpha, sigma = alpha_sigma(step.sigma)
            ratio = alpha_next / alpha
            gain = sigma_next - ratio * sigma
        weights = zip(ADAMS_BASHFORTH[len(values) - 1], values, strict=True)
        x = combine((ratio, x), *((gain * weight, value) for weight, value in weights))
    return x


def ipndm(x: Array, steps: Steps, *, max_order: int = 4) -> Sampler:
    """ComfyUI's `sample_ipndm`: the same formulas for the slope (x - denoised) / sigma of k-diffusion's latents.

    A step to sigma 0 gives the denoised latent.

    Args:
        x: initial latent, variance exploding.
        steps: between sigmas.
        max_order: how many slopes are used at most, from 1 (Euler) to 4.
    """
    slopes: list[Array] = []
    for step in steps:
        denoised = yield at(x, step)
        if step.sigma_next == 0:
            x = denoised.astype(x.dtype)
            continue
        slopes = [combine((1 / step.sigma, x), (-1 / step.sigma, denoised)), *slopes[: max_order - 1]]
        change = step.sigma_next - step.sigma
        weights = zip(ADAMS_BASHFORTH[len(slopes) - 1], slopes, strict=True)
        x = combine((1.0, x), *((change * weight, slope) for weight, slope in weights))
    return x
