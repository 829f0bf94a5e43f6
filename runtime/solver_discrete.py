"""What the samplers over training timesteps share: one linear combination for reading the model and for the step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError
from .noise_schedule import NoiseSchedule
from .parametrisation import Array, Parametrisation, apply_form, combine
from .sampler_loop import Correction


def variance_preserving(schedule: NoiseSchedule, _options: Mapping[str, Any]) -> Parametrisation:
    """How these samplers read a model.

    Raises:
        ConfigError: the model is one of a rectified flow.
    """
    kind = schedule.prediction_type
    if kind == "flow_prediction":
        raise ConfigError(
            "prediction_type: expected epsilon, v_prediction or sample for a sampler over training timesteps, got "
            "flow_prediction. Choose Flow Euler, or a sampler that steps through sigmas."
        )
    return Parametrisation("vp", kind)


def reads_output(schedule: NoiseSchedule) -> Mapping[str, Any]:
    """For `from_schedule`: what a solver must know that is sent the model's output as it is."""
    return {"prediction_type": schedule.prediction_type}


def mix(
    model: Parametrisation,
    x: Array,
    output: Array,
    sigma: float,
    *,
    sample: float = 0.0,
    denoised: float = 0.0,
    epsilon: float = 0.0,
    noise: tuple[float, Array] | None = None,
    correct: Correction | None = None,
) -> Array:
    """One linear combination for sample * x + denoised * x_0 + epsilon * predicted noise + new noise.

    Args:
        model: says what x_0 and the noise are in terms of `x` and `output`.
        x: latent at `sigma`.
        output: the model's, there.
        sigma: noise-to-signal ratio.
        sample: coefficient of x.
        denoised: coefficient of x_0.
        epsilon: coefficient of the predicted noise.
        noise: standard deviation and standard normal numbers to add.
        correct: changes x_0, but not the noise that goes with it: diffusers clips so.
    """
    to_denoised, to_epsilon = model.form("denoised", sigma), model.form("epsilon", sigma)
    of_x, of_output = sample + epsilon * to_epsilon[0], epsilon * to_epsilon[1]
    added = () if noise is None or noise[0] == 0 else (noise,)
    if correct is None:
        return combine((of_x + denoised * to_denoised[0], x), (of_output + denoised * to_denoised[1], output), *added)
    return combine((of_x, x), (of_output, output), (denoised, correct(apply_form(to_denoised, x, output))), *added)
