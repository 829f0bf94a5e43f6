"""Heun's method, the improved Euler method of second order, and restart sampling with it."""

from __future__ import annotations

import math

from .parametrisation import Array, combine
from .sampler_loop import Evaluation, Sampler
from .solver_parts import NoiseSource, add_noise, churned
from .steps import Step, Steps


def heun(x: Array, steps: Steps, *, noise: NoiseSource | None = None, **churn: float) -> Sampler:
    """Algorithm 2 of Karras et al. 2022 (arXiv 2206.00364): k-diffusion's `sample_heun`. Asks for epsilon.

    A step to sigma 0 is one of Euler. `churn` is s_churn, s_tmin, s_tmax and s_noise of `solver_parts.churned`.
    """
    for step, following in zip(steps, (*steps[1:], None), strict=False):
        start = churned(x, step, steps, noise=noise, **churn)
        epsilon = yield start
        x = yield from _heun_step(x, start, epsilon, step, following)
    return x


def restart(x: Array, steps: Steps, *, s_noise: float = 1.0, noise: NoiseSource | None = None) -> Sampler:
    """Restart sampling, Algorithm 1 of Xu et al. 2023 (arXiv 2306.14878), with steps of `heun`. Asks for epsilon.

    Noise is added wherever a step starts above the level at which the one before it ended, as `restart_steps` has it.
    """
    reached = steps[0].sigma if steps else 0.0
    for step, following in zip(steps, (*steps[1:], None), strict=False):
        renoised = x
        if step.sigma > reached:
            renoised = add_noise(x, s_noise * math.sqrt(step.sigma**2 - reached**2), noise)
        start = Evaluation(renoised, step.sigma, step.timestep, step.index, x)
        epsilon = yield start
        x = yield from _heun_step(x, start, epsilon, step, following)
        reached = step.sigma_next
    return x


def _heun_step(x: Array, start: Evaluation, epsilon: Array, step: Step, following: Step | None) -> Sampler:
    """The rest of a step: `x` is the latent before churn, `epsilon` the answer to `start`."""
    length = step.sigma_next - start.sigma
    if step.sigma_next == 0:
        return combine((1.0, start.sample), (length, epsilon))
    end = combine((1.0, start.sample), (length, epsilon))
    # What the model is told here is what the next step tells it, which may have been rounded.
    same = following is not None and following.sigma == step.sigma_next
    timestep = following.timestep if following is not None and same else None
    epsilon_end = yield Evaluation(end, step.sigma_next, timestep, step.index, x)
    return combine((1.0, start.sample), (length / 2, epsilon), (length / 2, epsilon_end))
