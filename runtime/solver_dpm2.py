"""DPM2: the midpoint method, the midpoint being taken in log sigma, and its ancestral form."""

from __future__ import annotations

import math

from .parametrisation import Array, combine
from .sampler_loop import Evaluation, Sampler
from .solver_parts import NoiseSource, add_noise, ancestral_step, at, churned
from .steps import Steps


def dpm2(x: Array, steps: Steps, *, noise: NoiseSource | None = None, **churn: float) -> Sampler:
    """k-diffusion's `sample_dpm_2`: after DPM-Solver-2 of Lu et al. 2022 (arXiv 2206.00927). Asks for epsilon.

    A step to sigma 0 is one of Euler. `churn` is s_churn, s_tmin, s_tmax and s_noise of `solver_parts.churned`.
    """
    for step in steps:
        start = churned(x, step, steps, noise=noise, **churn)
        epsilon = yield start
        x = yield from _midpoint_step(x, start, epsilon, step.sigma_next)
    return x


def dpm2_ancestral(
    x: Array, steps: Steps, *, eta: float = 1.0, s_noise: float = 1.0, noise: NoiseSource | None = None
) -> Sampler:
    """Steps of `dpm2` past the next noise level and noise back up to it: `sample_dpm_2_ancestral`. Asks for epsilon."""
    for step in steps:
        start = at(x, step)
        epsilon = yield start
        sigma_down, sigma_up = ancestral_step(step.sigma, step.sigma_next, eta=eta)
        x = yield from _midpoint_step(x, start, epsilon, sigma_down)
        x = add_noise(x, s_noise * sigma_up, noise)
    return x


def _midpoint_step(x: Array, start: Evaluation, epsilon: Array, sigma_next: float) -> Sampler:
    """The rest of a step: `x` is the latent before churn, `epsilon` the answer to `start`."""
    if sigma_next > 0:
        middle = math.sqrt(start.sigma * sigma_next)
        between = combine((1.0, start.sample), (middle - start.sigma, epsilon))
        epsilon = yield Evaluation(between, middle, None, start.step_index, x)
    return combine((1.0, start.sample), (sigma_next - start.sigma, epsilon))
