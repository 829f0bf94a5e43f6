"""What a model predicts (epsilon, v or the sample), turned into the denoised latent that solvers work with, and back.

Two spaces of latents: "vp" is variance preserving, x = alpha * x_0 + sigma_t * noise with alpha^2 + sigma_t^2 = 1, and
what a Stable Diffusion U-Net takes; "ve" is variance exploding, x = x_0 + sigma * noise. Everywhere `sigma` is the
noise-to-signal ratio, the same number in both.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .noise_schedule import PredictionType

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Space = Literal["vp", "ve"]


def alpha_sigma(sigma: float) -> tuple[float, float]:
    """Variance-preserving (alpha, sigma) of a noise-to-signal ratio, which may be infinite."""
    alpha = 1 / math.sqrt(1 + sigma**2)
    return alpha, (sigma * alpha if sigma < math.inf else 1.0)


def to_denoised(prediction: Array, sample: Array, sigma: float, prediction_type: PredictionType) -> Array:
    """The clean latent a model's output stands for; `sample` is the model's input, variance preserving."""
    alpha, sigma_t = alpha_sigma(sigma)
    if prediction_type == "epsilon":
        return (sample - sigma_t * prediction) / alpha
    if prediction_type == "v_prediction":
        return alpha * sample - sigma_t * prediction
    return prediction


def from_denoised(denoised: Array, sample: Array, sigma: float, prediction_type: PredictionType) -> Array:
    """The inverse of `to_denoised`: the output a model would give."""
    alpha, sigma_t = alpha_sigma(sigma)
    if prediction_type == "epsilon":
        return (sample - alpha * denoised) / sigma_t
    if prediction_type == "v_prediction":
        return (alpha * sample - denoised) / sigma_t
    return denoised


def scale_model_input(sample: Array, sigma: float, space: Space) -> Array:
    """The model's input for a sampler's latent: of unit variance, whatever space the sampler works in."""
    return sample if space == "vp" else sample * alpha_sigma(sigma)[0]
