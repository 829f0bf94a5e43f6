"""Samplers of distilled few-step models: a jump to the clean latent, and noise back to the next level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .noise_schedule import PredictionType
from .parametrisation import Array, Parametrisation, alpha_sigma
from .sampler_loop import Sampler
from .sampler_spec import correction_of
from .solver_discrete import mix
from .solver_parts import NoiseSource, at, draw
from .steps import Steps
from .steps_consistency import TcdStep

# The standard deviation of the data in the boundary conditions, as LCM's authors set it.
_SIGMA_DATA = 0.5


def lcm(
    x: Array,
    steps: Steps,
    *,
    noise: NoiseSource | None = None,
    timestep_scaling: float = 10.0,
    prediction_type: PredictionType = "epsilon",
    **clipping: Any,
) -> Sampler:
    """Multistep latent consistency sampling, Algorithm 3 of Luo et al. 2023 (arXiv 2310.04378).

    It is sent the model's output. The consistency function is c_skip * x + c_out * x_0, which is x at timestep 0.

    Args:
        x: initial latent, variance preserving.
        steps: of `lcm_steps`.
        noise: standard normal numbers; none are drawn in a step that ends at sigma 0.
        timestep_scaling: what a timestep is multiplied by in the boundary conditions.
        prediction_type: what the model's output is.
        clipping: what `correction_of` reads.
    """
    model, correct = Parametrisation("vp", prediction_type), correction_of(clipping)
    for step in steps:
        output = yield at(x, step)
        scaled = step.timestep * timestep_scaling
        total = scaled**2 + _SIGMA_DATA**2
        alpha_next, sigma_next = alpha_sigma(step.sigma_next)
        weights = {"sample": alpha_next * _SIGMA_DATA**2 / total, "denoised": alpha_next * scaled / math.sqrt(total)}
        added = (sigma_next, draw(noise, x)) if sigma_next > 0 else None
        x = mix(model, x, output, step.sigma, noise=added, correct=correct, **weights)
    return x


def tcd(
    x: Array,
    steps: Sequence[TcdStep],
    *,
    noise: NoiseSource | None = None,
    prediction_type: PredictionType = "epsilon",
) -> Sampler:
    """Strategic stochastic sampling, Algorithm 4 of Zheng et al. 2024 (arXiv 2402.19159).

    It is sent the model's output. Each step goes down past its end, to `sigma_down`, and noise brings it back up.

    Args:
        x: initial latent, variance preserving.
        steps: of `tcd_steps`, which hold gamma.
        noise: standard normal numbers; none are drawn where a step ends at its `sigma_down`.
        prediction_type: what the model's output is.
    """
    model = Parametrisation("vp", prediction_type)
    for step in steps:
        output = yield at(x, step)
        alpha_down, noise_down = alpha_sigma(step.sigma_down)
        alpha_next, _ = alpha_sigma(step.sigma_next)
        back = alpha_next / alpha_down
        added = (math.sqrt(1 - back**2), draw(noise, x)) if step.sigma_next > step.sigma_down else None
        x = mix(model, x, output, step.sigma, noise=added, denoised=alpha_next, epsilon=back * noise_down)
    return x
