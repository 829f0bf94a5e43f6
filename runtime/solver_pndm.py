"""Pseudo numerical methods: multistep and Runge-Kutta formulas for the noise, carried over by DDIM's exact step."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import UsageError
from .noise_schedule import PredictionType
from .parametrisation import Array, Parametrisation, alpha_sigma, apply_form, combine
from .sampler_loop import Sampler
from .solver_parts import at
from .steps_pndm import PndmStep

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Weights of equally spaced values, the newest first, by how many there are."""

_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


def pndm(x: Array, steps: Sequence[PndmStep], *, prediction_type: PredictionType = "epsilon") -> Sampler:
    """PNDM, Algorithm 2 of Liu et al. 2022 (arXiv 2202.09778), or PLMS, the same without its Runge-Kutta warm-up.

    It is sent the model's output. The formulas are applied to that, as in diffusers: for a model that predicts v not
    quite what the paper does. Each call of the model counts as a step (see `pndm_steps`).

    Without the warm-up, the second of the steps given, whichever it is, corrects the first: latent-diffusion's PLMS
    begins so, with an improved Euler step, and diffusers does it for image to image too, where the steps are a slice.

    Args:
        x: initial latent, variance preserving.
        steps: of `pndm_steps`, or a slice of them.
        prediction_type: what the model's output is.

    Raises:
        UsageError: a slice starts within a step of the warm-up.
    """
    told = Parametrisation("vp", prediction_type)
    # diffusers refuses a model that predicts the sample; what to extrapolate is then the noise, as in the paper.
    model = Parametrisation("vp", "epsilon") if prediction_type == "sample" else told
    outputs: list[Array] = []
    stages: list[Array] = []
    start, sigma = x, steps[0].sigma if steps else 0.0
    if steps and steps[0].runge_kutta and steps[0].index % 4:
        raise UsageError(
            f"steps: expected a slice that does not divide a Runge-Kutta step, got one from step {steps[0].index}. "
            "Set skip_prk_steps to true for image to image."
        )
    for position, step in enumerate(steps):
        output = yield at(x, step)
        if model is not told:
            output = apply_form(told.form("epsilon", step.sigma), x, output)
        to = step.sigma_next
        if step.runge_kutta:
            if len(stages) in (0, 4):
                stages, start, sigma = [], x, step.sigma
                outputs = [output, *outputs]
            stages.append(output)
            mean = tuple(zip(_RUNGE_KUTTA, stages, strict=True)) if len(stages) == 4 else ((1.0, output),)
        elif position == 1:
            sigma, to = step.before, step.sigma
            mean = ((0.5, output), (0.5, outputs[0]))
        else:
            start, sigma, to = x, step.sigma, step.after
            outputs = [output, *outputs[:3]]
            mean = tuple(zip(ADAMS_BASHFORTH[len(outputs) - 1], outputs, strict=True))
        x = _carried(model, start, sigma, to, mean)
    return x


def _carried(
    model: Parametrisation, x: Array, sigma: float, sigma_next: float, mean: Sequence[tuple[float, Array]]
) -> Array:
    """DDIM's step with the noise that a weighted mean of outputs stands for, in one linear combination."""
    alpha, sigma_t = alpha_sigma(sigma)
    alpha_next, sigma_t_next = alpha_sigma(sigma_next)
    ratio = alpha_next / alpha
    gain = sigma_t_next - ratio * sigma_t
    of_x, of_mean = model.form("epsilon", sigma)
    return combine((ratio + gain * of_x, x), *((gain * of_mean * weight, output) for weight, output in mean))
