"""Solvers for rectified flows. They are sent the model's output, the velocity from the clean latent to the noise."""

from __future__ import annotations

import math

from .parametrisation import Array, Parametrisation, combine
from .sampler_loop import Evaluation, Sampler
from .solver_parts import NoiseSource, at, draw
from .steps import Steps

_FLOW = Parametrisation("flow", "flow_prediction")


def flow_euler(
    x: Array, steps: Steps, *, stochastic_sampling: bool = False, noise: NoiseSource | None = None
) -> Sampler:
    """Euler's method for dx = v dt: Liu et al. 2022 (arXiv 2209.03003), Algorithm 1.

    Args:
        x: initial latent, (1 - t) * clean + t * noise.
        steps: of `flow_steps`.
        stochastic_sampling: whether each step goes to the clean latent and from there back with new noise.
        noise: for that.
    """
    for step in steps:
        velocity = yield at(x, step)
        _, t = _FLOW.levels(step.sigma)
        alpha_next, t_next = _FLOW.levels(step.sigma_next)
        if stochastic_sampling:
            x = combine((alpha_next, x), (-alpha_next * t, velocity), (t_next, draw(noise, x)))
        else:
            x = combine((1.0, x), (t_next - t, velocity))
    return x


def flow_heun(
    x: Array,
    steps: Steps,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise: NoiseSource | None = None,
) -> Sampler:
    """Heun's method for dx = v dt; a step to t = 0 is one of Euler's. As diffusers' `FlowMatchHeunDiscreteScheduler`.

    Its churn differs from that of Karras et al. 2022: noise is added after the model was called, not before.

    Args:
        x: initial latent, (1 - t) * clean + t * noise.
        steps: of `flow_steps`.
        s_churn: how much noise is added, over all steps.
        s_tmin: least t at which it is.
        s_tmax: greatest t at which it is.
        s_noise: standard deviation of the noise, for a scale of 1.
        noise: for that.
    """
    for step, following in zip(steps, (*steps[1:], None), strict=False):
        velocity = yield at(x, step)
        _, t = _FLOW.levels(step.sigma)
        _, t_next = _FLOW.levels(step.sigma_next)
        calls = 2 * step.total - 1
        gamma = min(s_churn / calls, math.sqrt(2) - 1) if s_churn > 0 and s_tmin <= t <= s_tmax else 0.0
        churned = t * (1 + gamma)
        start = x
        if gamma > 0:
            start = combine((1.0, x), (s_noise * math.sqrt(churned**2 - t**2), draw(noise, x)))
        change = t_next - churned
        slope = t / churned if churned > 0 else 1.0
        ahead = combine((1.0, start), (change * slope, velocity))
        if t_next == 0:
            x = ahead
            continue
        told = following.timestep if following is not None else None
        again = yield Evaluation(ahead, step.sigma_next, told, step.index, x)
        if gamma > 0:
            # diffusers draws once more and does not use it; the next step's noise must be the same.
            draw(noise, x)
        x = combine((1.0, start), (0.5 * change * slope, velocity), (0.5 * change, again))
    return x
