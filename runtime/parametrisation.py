"""What a model predicts, and in which space a sampler's latents are, as linear forms of latent and model output.

Four spaces, each x = alpha * x_0 + sigma_t * noise. Everywhere `sigma` is the noise-to-signal ratio sigma_t / alpha,
the same number in all of them:

- "vp", variance preserving: alpha^2 + sigma_t^2 = 1, what a Stable Diffusion U-Net takes;
- "ve", variance exploding: alpha = 1, k-diffusion's space;
- "flow", rectified flow: alpha + sigma_t = 1;
- "edm": variance exploding with the preconditioning of Karras et al. 2022, Table 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from .noise_schedule import PredictionType

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Space = Literal["vp", "ve", "flow", "edm"]
Quantity = Literal["denoised", "epsilon", "output"]
Form = tuple[float, float]


def alpha_sigma(sigma: float) -> tuple[float, float]:
    """Variance-preserving (alpha, sigma_t) of a noise-to-signal ratio, which may be infinite."""
    alpha = 1 / math.sqrt(1 + sigma**2)
    return alpha, (sigma * alpha if sigma < math.inf else 1.0)


@dataclass(frozen=True, slots=True)
class Parametrisation:
    """How a model's output is to be read.

    Attributes:
        space: of the sampler's latents.
        prediction_type: what the output is.
        sigma_data: standard deviation of the data, for the space "edm" alone.
    """

    space: Space = "vp"
    prediction_type: PredictionType = "epsilon"
    sigma_data: float = 0.5

    def levels(self, sigma: float) -> tuple[float, float]:
        """(alpha, sigma_t) of the latents at a noise-to-signal ratio, which is finite but for "vp" and "flow"."""
        if self.space == "vp":
            return alpha_sigma(sigma)
        if self.space == "flow":
            alpha = 1 / (1 + sigma)
            return alpha, (sigma * alpha if sigma < math.inf else 1.0)
        return 1.0, sigma

    def input_scale(self, sigma: float) -> float:
        """What a latent is multiplied by to be the model's input, which has unit variance but for "flow"."""
        if self.space == "ve":
            return alpha_sigma(sigma)[0]
        return 1 / math.hypot(sigma, self.sigma_data) if self.space == "edm" else 1.0

    def form(self, quantity: Quantity, sigma: float) -> Form:
        """(a, b) such that the quantity is a * latent + b * output at this noise level."""
        if quantity == "output":
            return 0.0, 1.0
        return self._denoised(sigma) if quantity == "denoised" else self._epsilon(sigma)

    def _denoised(self, sigma: float) -> Form:
        alpha, sigma_t = self.levels(sigma)
        kind = self.prediction_type
        if kind == "sample":
            return 0.0, 1.0
        if self.space == "edm":
            total = sigma**2 + self.sigma_data**2
            out = sigma * self.sigma_data / math.sqrt(total)
            return self.sigma_data**2 / total, (-out if kind == "v_prediction" else out)
        if kind == "epsilon":
            return 1 / alpha, -sigma_t / alpha
        if kind == "flow_prediction":
            return 1.0, -sigma_t
        scale, noise = alpha_sigma(sigma)
        # v is of the variance-preserving latent, which is `scale` times this one in the space "ve".
        return (scale, -noise) if self.space == "vp" else (scale * self.input_scale(sigma), -noise)

    def _epsilon(self, sigma: float) -> Form:
        alpha, sigma_t = self.levels(sigma)
        kind = self.prediction_type
        if kind == "epsilon" and self.space != "edm":
            return 0.0, 1.0
        if kind == "flow_prediction":
            return 1.0, alpha
        if kind == "v_prediction" and self.space in ("vp", "ve"):
            scale, noise = alpha_sigma(sigma)
            return (noise, scale) if self.space == "vp" else (noise * self.input_scale(sigma), scale)
        a, b = self._denoised(sigma)
        return (1 - alpha * a) / sigma_t, -alpha * b / sigma_t


def combine(*terms: tuple[float, Array]) -> Array:
    """The linear combination of arrays of one shape, in a new array: the one hot operation of every sampler.

    The result has the dtype of the first array: put the latent first.
    """
    (weight, array), *rest = terms
    total: Array
    if weight == 1 and rest:  # as Euler's step of a flow and every addition of noise: two operations instead of three
        (weight, other), *rest = rest
        total = np.multiply(other, weight, dtype=array.dtype, casting="same_kind")
        total += array
    else:
        total = array * weight
    if rest:
        scratch = np.empty_like(total)
        for weight, array in rest:
            np.multiply(array, weight, out=scratch)
            total += scratch
    return total


def apply_form(form: Form, latents: Array, output: Array) -> Array:
    """The quantity of a form; the output itself, not a copy, where the form is (0, 1)."""
    a, b = form
    if a == 0:
        return output if b == 1 else output * b
    return combine((a, latents), (b, output))


def to_denoised(prediction: Array, sample: Array, sigma: float, prediction_type: PredictionType) -> Array:
    """The clean latent a model's output stands for; `sample` is the model's input, variance preserving."""
    return apply_form(Parametrisation("vp", prediction_type).form("denoised", sigma), sample, prediction)


def from_denoised(denoised: Array, sample: Array, sigma: float, prediction_type: PredictionType) -> Array:
    """The inverse of `to_denoised`: the output a model would give."""
    a, b = Parametrisation("vp", prediction_type).form("denoised", sigma)
    return combine((-a / b, sample), (1 / b, denoised))
