"""DDPM: ancestral sampling, the reverse of the forward process."""

from __future__ import annotations

import math
from typing import Any

from .noise_schedule import PredictionType
from .parametrisation import Array, Parametrisation, alpha_sigma
from .sampler_loop import Sampler
from .sampler_spec import correction_of
from .solver_discrete import mix
from .solver_parts import NoiseSource, at, draw
from .steps import Steps

# diffusers' least variance.
_LEAST = 1e-20


def ddpm(
    x: Array,
    steps: Steps,
    *,
    noise: NoiseSource | None = None,
    variance_type: str = "fixed_small",
    prediction_type: PredictionType = "epsilon",
    **clipping: Any,
) -> Sampler:
    """Ancestral sampling, equations 6 and 7 of Ho et al. 2020 (arXiv 2006.11239); it is sent the model's output.

    Args:
        x: initial latent, variance preserving.
        steps: of `ddpm_steps`.
        noise: standard normal numbers; none are drawn at timestep 0.
        variance_type: the posterior's variance ("fixed_small") or that of the forward step ("fixed_large"). The
            variants named log are the same numbers, taken through a logarithm.
        prediction_type: what the model's output is.
        clipping: what `correction_of` reads.
    """
    model, correct = Parametrisation("vp", prediction_type), correction_of(clipping)
    for step in steps:
        output = yield at(x, step)
        alpha, sigma = alpha_sigma(step.sigma)
        alpha_next, sigma_next = alpha_sigma(step.sigma_next)
        beta = 1 - (alpha / alpha_next) ** 2
        posterior = (sigma_next / sigma) ** 2
        variance = beta if variance_type.startswith("fixed_large") else max(posterior * beta, _LEAST)
        added = (math.sqrt(variance), draw(noise, x)) if step.timestep > 0 else None
        weights = {"sample": alpha / alpha_next * posterior, "denoised": alpha_next * beta / sigma**2}
        x = mix(model, x, output, step.sigma, noise=added, correct=correct, **weights)
    return x
