"""DDIM: steps between training timesteps along the posterior of a non-Markovian forward process."""

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


def ddim(
    x: Array,
    steps: Steps,
    *,
    eta: float = 0.0,
    noise: NoiseSource | None = None,
    prediction_type: PredictionType = "epsilon",
    use_clipped_model_output: bool = False,
    **clipping: Any,
) -> Sampler:
    """DDIM, equations 12 and 16 of Song et al. 2021 (arXiv 2010.02502); it is sent the model's output.

    Args:
        x: initial latent, variance preserving.
        steps: of `ddim_steps`.
        eta: 0 is deterministic, 1 adds as much noise as DDPM.
        noise: needed where eta is above 0.
        prediction_type: what the model's output is.
        use_clipped_model_output: whether the noise is predicted anew from a clipped x_0, as in Glide.
        clipping: what `correction_of` reads.
    """
    model, correct = Parametrisation("vp", prediction_type), correction_of(clipping)
    for step in steps:
        output = yield at(x, step)
        alpha, sigma = alpha_sigma(step.sigma)
        alpha_next, sigma_next = alpha_sigma(step.sigma_next)
        std = eta * sigma_next / sigma * math.sqrt(max(1 - (alpha / alpha_next) ** 2, 0.0))
        direction = math.sqrt(max(sigma_next**2 - std**2, 0.0))
        if use_clipped_model_output:
            ratio = direction / sigma
            weights = {"sample": ratio, "denoised": alpha_next - ratio * alpha}
        else:
            weights = {"denoised": alpha_next, "epsilon": direction}
        added = (std, draw(noise, x)) if eta > 0 else None
        x = mix(model, x, output, step.sigma, noise=added, correct=correct, **weights)
    return x
