"""Noise levels spread by a rule: between two extremes, or over the noise levels that a model was trained on.

Each function gives falling noise-to-signal ratios without the final zero, float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from .beta_distribution import beta_ppf
from .errors import UsageError
from .noise_schedule import FloatArray, NoiseSchedule


def karras_sigmas(sigma_max: float, sigma_min: float, count: int, *, rho: float = 7.0) -> FloatArray:
    """Equation 5 of Karras et al. 2022 (arXiv 2206.00364)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.asarray((high + np.linspace(0, 1, count) * (low - high)) ** rho, np.float64)


def exponential_sigmas(sigma_max: float, sigma_min: float, count: int) -> FloatArray:
    """Equal ratios from `sigma_max` to `sigma_min`: k-diffusion's `get_sigmas_exponential`."""
    return np.asarray(np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), count)), np.float64)


def beta_sigmas(sigma_max: float, sigma_min: float, count: int) -> FloatArray:
    """Percent points of Beta(0.6, 0.6) between the extremes: Lee et al. 2024 (arXiv 2407.12173), as in diffusers."""
    shares = np.array([beta_ppf(p, 0.6, 0.6) for p in (1 - np.linspace(0, 1, count)).tolist()])
    return sigma_min + shares * (sigma_max - sigma_min)


BETWEEN: Mapping[str, Callable[[float, float, int], FloatArray]] = {
    "karras": karras_sigmas,
    "exponential": exponential_sigmas,
    "beta": beta_sigmas,
}
"""Rules between two extremes, f(sigma_max, sigma_min, count)."""


def sgm_uniform_sigmas(
    schedule: NoiseSchedule, count: int, *, sigma_max: float | None = None, sigma_min: float | None = None
) -> FloatArray:
    """Timesteps an equal stride apart, the last of count + 1 left out: "SGM uniform" of Stability AI's models.

    A sigma between two timesteps is linear in log sigma, as k-diffusion's `t_to_sigma`.
    """
    high = float(schedule.sigmas[-1]) if sigma_max is None else sigma_max
    low = float(schedule.sigmas[0]) if sigma_min is None else sigma_min
    ends = schedule.sigma_to_timestep(high), schedule.sigma_to_timestep(low)
    timesteps = np.linspace(*ends, count + 1)[:-1]
    return np.exp(np.interp(timesteps, np.arange(schedule.num_train_timesteps), schedule.log_sigmas))


# Sabour et al. 2024 (arXiv 2404.14507): the levels published for ten steps, the last of which ends at 0 instead.
_ALIGN_YOUR_STEPS: Mapping[str, tuple[float, ...]] = {
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}


def align_your_steps_sigmas(
    schedule: NoiseSchedule, count: int, *, sigma_max: float | None = None, sigma_min: float | None = None
) -> FloatArray:
    """Levels optimised for Stable Diffusion 1.5 ("ays") or XL ("ays_sdxl"): Sabour et al. 2024 (arXiv 2404.14507).

    Between the published ones log sigma is linear in the position, as its authors describe; count + 1 levels are made
    and the last left out, as ComfyUI does. A1111 makes count levels, the last at 0.029.

    Raises:
        UsageError: if an extreme is asked for, which a table does not have.
    """
    for name, value in (("sigma_max", sigma_max), ("sigma_min", sigma_min)):
        if value is not None:
            raise UsageError(
                f"{name}: expected none with schedule {schedule.sigma_spacing}, got {value!r}. Leave it out."
            )
    table = np.log(_ALIGN_YOUR_STEPS[schedule.sigma_spacing])
    positions = np.linspace(0, len(table) - 1, count + 1)[:-1]
    return np.exp(np.interp(positions, np.arange(len(table)), table))


def lu_lambdas_sigmas(
    schedule: NoiseSchedule, count: int, *, sigma_max: float | None = None, sigma_min: float | None = None
) -> FloatArray:
    """Equal steps of log sigma between the extremes of training: section 3.3 of Lu et al. 2022 (arXiv 2206.00927)."""
    high = float(schedule.log_sigmas[-1]) if sigma_max is None else math.log(sigma_max)
    low = float(schedule.log_sigmas[0]) if sigma_min is None else math.log(sigma_min)
    return np.exp(np.linspace(high, low, count))


OVER_TRAINING: Mapping[str, Callable[..., FloatArray]] = {
    "lu_lambdas": lu_lambdas_sigmas,
    "sgm_uniform": sgm_uniform_sigmas,
    "ays": align_your_steps_sigmas,
    "ays_sdxl": align_your_steps_sigmas,
}
"""Rules over a schedule's own noise levels, f(schedule, count, sigma_max=..., sigma_min=...)."""


def spread_sigmas(
    schedule: NoiseSchedule,
    high: float,
    low: float,
    count: int,
    *,
    sigma_max: float | None = None,
    sigma_min: float | None = None,
) -> FloatArray:
    """The levels of a schedule whose `sigma_spacing` is not "timesteps".

    Args:
        schedule: names the rule.
        high: where a rule between two extremes starts with this sampler.
        low: where it ends.
        count: levels.
        sigma_max: replaces the start of every rule that has one.
        sigma_min: replaces the end likewise.

    Raises:
        UsageError: there is no such rule, or it has no extremes.
    """
    name = schedule.sigma_spacing
    if name in BETWEEN:
        return BETWEEN[name](high if sigma_max is None else sigma_max, low if sigma_min is None else sigma_min, count)
    if name in OVER_TRAINING:
        return OVER_TRAINING[name](schedule, count, sigma_max=sigma_max, sigma_min=sigma_min)
    raise UsageError(f"schedule: expected one of {', '.join([*BETWEEN, *OVER_TRAINING])}, got {name}.")
