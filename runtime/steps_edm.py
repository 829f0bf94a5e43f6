"""Steps and model of diffusers' EDM classes: the noise levels and the preconditioning of Karras et al. 2022."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from .errors import ConfigError, UsageError
from .noise_schedule import FloatArray, NoiseSchedule
from .parametrisation import Parametrisation
from .sampler_options import Option, number, one_of
from .sigma_spacing import exponential_sigmas, karras_sigmas
from .steps import NOT_GIVEN, Given, Steps, chain

# Below this, the least step in log sigma between float32 levels would be lost.
_LEAST = 1e-6

EDM_OPTIONS: Mapping[str, Option] = {
    "sigma_min": number(0.002, _LEAST, to="steps"),
    "sigma_max": number(80.0, _LEAST, to="steps"),
    "sigma_data": number(0.5, _LEAST, to="model"),
    "sigma_schedule": one_of("karras", "exponential", to="steps"),
    "rho": number(7.0, _LEAST, to="steps"),
}
"""Those of all EDM classes, with diffusers' defaults."""


def edm_steps(
    schedule: NoiseSchedule,
    count: int,
    *,
    given: Given = NOT_GIVEN,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_schedule: Literal["karras", "exponential"] = "karras",
    rho: float = 7.0,
) -> Steps:
    """The steps of diffusers' `EDMEulerScheduler`; the training timesteps do not matter, only sigmas.

    Args:
        schedule: the checkpoint's; its own sigma spacing, if Karras' or exponential, replaces `sigma_schedule`.
        count: of steps.
        given: sigmas to take instead. (diffusers' argument of that name is positions from 0 to 1 between the extremes.)
        sigma_min: the lowest level, before 0 or, with `final_sigmas_type` sigma_min, at the end.
        sigma_max: the highest.
        sigma_schedule: rule between them.
        rho: exponent of Karras' rule.

    Raises:
        UsageError: if timesteps are given, or the extremes are not in order.
    """
    if given.timesteps is not None:
        raise UsageError("timesteps: expected none for an EDM sampler, got some. Give sigmas instead.")
    if given.sigmas is not None:
        sigmas, final = np.asarray(given.sigmas[:-1], np.float64), float(given.sigmas[-1])
    else:
        if not sigma_min < sigma_max:
            raise UsageError(f"sigma_max: expected more than sigma_min {sigma_min:g}, got {sigma_max:g}. Change one.")
        rule = schedule.sigma_spacing if schedule.sigma_spacing != "timesteps" else sigma_schedule
        sigmas = (
            exponential_sigmas(sigma_max, sigma_min, count)
            if rule == "exponential"
            else karras_sigmas(sigma_max, sigma_min, count, rho=rho)
        )
        final = float(np.float32(sigmas[-1])) if schedule.final_sigmas_type == "sigma_min" else 0.0
    return chain(noise_conditions(sigmas), sigmas, final)


def edm_model(schedule: NoiseSchedule, options: Mapping[str, Any]) -> Parametrisation:
    """How an EDM model's output is read; "epsilon" and "v_prediction" differ in its sign alone, as in diffusers.

    Raises:
        ConfigError: if it is neither.
    """
    if schedule.prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(
            f"prediction_type: expected epsilon or v_prediction for an EDM model, got {schedule.prediction_type}. "
            "Choose another sampler."
        )
    return Parametrisation("edm", schedule.prediction_type, float(options["sigma_data"]))


def noise_conditions(sigmas: FloatArray) -> FloatArray:
    """What a model conditioned on the noise level is told: c_noise of Karras et al. 2022, Table 1."""
    timesteps = [0.25 * math.log(sigma) for sigma in sigmas.tolist()]
    return np.array(timesteps, np.float32).astype(np.float64)
