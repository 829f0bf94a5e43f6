"""Which noise levels a sampler visits: timestep and sigma of every step, as diffusers' scheduler classes space them.

diffusers has three families that differ in small ways, so there are three functions: `ddim_steps` (and `plms_steps`)
with whole timesteps a fixed stride apart, `sigma_steps` with fractional timesteps (Euler), and `dpm_steps`, which
spaces one step more and drops the last. A sigma here is always the noise-to-signal ratio of k-diffusion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .errors import ConfigError, UsageError
from .noise_schedule import FloatArray, NoiseSchedule, TimestepSpacing


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a sampler.

    Attributes:
        index: position in the whole schedule, from 0. A slice of the steps, as for image to image, keeps it.
        timestep: what the model is told.
        sigma: noise-to-signal ratio at which the step starts; infinite where a schedule with zero terminal SNR does.
        sigma_next: the one at which it ends; 0 is a clean latent. Not always the next step's `sigma`: with linspace
            spacing DDIM and PLMS step to a level which is not the one they go on from.
    """

    index: int
    timestep: float
    sigma: float
    sigma_next: float


Steps = tuple[Step, ...]


def ddim_steps(schedule: NoiseSchedule, num_inference_steps: int) -> Steps:
    """The steps of diffusers' `DDIMScheduler`: from t to t - num_train_timesteps // num_inference_steps."""
    timesteps = _whole_timesteps(schedule, num_inference_steps)
    stride = schedule.num_train_timesteps // num_inference_steps
    alpha_to_one = schedule.set_alpha_to_one is not False
    return tuple(
        Step(i, t, _sigma_at(schedule, t), _sigma_at(schedule, t - stride, alpha_to_one=alpha_to_one))
        for i, t in enumerate(timesteps)
    )


def plms_steps(schedule: NoiseSchedule, num_inference_steps: int) -> Steps:
    """The steps of diffusers' `PNDMScheduler` without Runge-Kutta warm-up: one more than asked for.

    The first step is taken twice: step 1 is evaluated at its own end, the second timestep, and corrects step 0.

    Raises:
        ConfigError: if the checkpoint wants the Runge-Kutta warm-up.
    """
    if not schedule.skip_prk_steps:
        raise ConfigError(
            "skip_prk_steps: expected true, got false. PNDM's Runge-Kutta steps are not supported; "
            "set it to true, or choose another sampler."
        )
    timesteps = _whole_timesteps(schedule, num_inference_steps)
    stride = schedule.num_train_timesteps // num_inference_steps
    alpha_to_one = schedule.set_alpha_to_one is True

    def level(timestep: int) -> float:
        return _sigma_at(schedule, timestep, alpha_to_one=alpha_to_one)

    pairs = [(t, level(t), level(t - stride)) for t in timesteps]
    if len(timesteps) > 1:
        pairs.insert(1, (timesteps[1], level(timesteps[1] + stride), level(timesteps[1])))
    return tuple(Step(i, *pair) for i, pair in enumerate(pairs))


def sigma_steps(schedule: NoiseSchedule, num_inference_steps: int) -> Steps:
    """The steps of diffusers' `EulerDiscreteScheduler`; Karras spacing runs between its own extremes."""
    timesteps = _timesteps(schedule, num_inference_steps, schedule.timestep_spacing or "linspace")
    sigmas = np.interp(timesteps, np.arange(schedule.num_train_timesteps), schedule.sigmas)
    if schedule.sigma_spacing != "timesteps":
        sigmas = _respaced(schedule, float(sigmas[0]), float(sigmas[-1]), num_inference_steps)
        timesteps = np.array([schedule.sigma_to_timestep(sigma) for sigma in sigmas])
    return _chain(schedule, timesteps.astype(np.float32).astype(np.float64), sigmas)


def dpm_steps(schedule: NoiseSchedule, num_inference_steps: int) -> Steps:
    """The steps of diffusers' `DPMSolverMultistepScheduler`; Karras' spacing runs between the extremes of training."""
    if schedule.sigma_spacing == "timesteps":
        timesteps = _dpm_timesteps(schedule, num_inference_steps)
        sigmas = np.interp(timesteps, np.arange(schedule.num_train_timesteps), schedule.sigmas)
    else:
        extremes = float(schedule.sigmas[-1]), float(schedule.sigmas[0])
        sigmas = _respaced(schedule, *extremes, num_inference_steps)
        timesteps = np.array([schedule.sigma_to_timestep(sigma) for sigma in sigmas])
        # diffusers rounds for Karras alone, and not with the cosine schedule, before it cuts off what is left.
        if schedule.sigma_spacing == "karras" and schedule.beta_schedule != "squaredcos_cap_v2":
            timesteps = timesteps.round()
    return _chain(schedule, np.trunc(timesteps), sigmas)


def karras_sigmas(sigma_max: float, sigma_min: float, count: int, *, rho: float = 7.0) -> FloatArray:
    """Equation 5 of Karras et al. 2022 (arXiv 2206.00364), without the final zero."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.asarray((high + np.linspace(0, 1, count) * (low - high)) ** rho, np.float64)


def exponential_sigmas(sigma_max: float, sigma_min: float, count: int) -> FloatArray:
    """Equal ratios from `sigma_max` to `sigma_min`: k-diffusion's `get_sigmas_exponential` without the final zero."""
    return np.asarray(np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), count)), np.float64)


def _respaced(schedule: NoiseSchedule, sigma_max: float, sigma_min: float, count: int) -> FloatArray:
    spacing = karras_sigmas if schedule.sigma_spacing == "karras" else exponential_sigmas
    return spacing(sigma_max, sigma_min, count)


def _chain(schedule: NoiseSchedule, timesteps: FloatArray, sigmas: FloatArray) -> Steps:
    """Steps that each go on where the one before ended; sigmas rounded to float32 as diffusers hands them on."""
    final = float(schedule.sigmas[0]) if schedule.final_sigmas_type == "sigma_min" else 0.0
    levels = [*sigmas.astype(np.float32).tolist(), final]
    return tuple(Step(i, t, levels[i], levels[i + 1]) for i, t in enumerate(timesteps.tolist()))


def _sigma_at(schedule: NoiseSchedule, timestep: int, *, alpha_to_one: bool = False) -> float:
    if timestep < 0 and alpha_to_one:
        return 0.0
    alpha_cumprod = float(schedule.alphas_cumprod[max(timestep, 0)])
    return math.sqrt((1 - alpha_cumprod) / alpha_cumprod) if alpha_cumprod > 0 else math.inf


def _timesteps(schedule: NoiseSchedule, count: int, spacing: TimestepSpacing) -> FloatArray:
    """Falling timesteps by Table 2 of Lin et al. 2023; fractional with linspace, (count,)."""
    total = schedule.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(0, total - 1, count, dtype=np.float32)[::-1].astype(np.float64)
    if spacing == "leading":
        multiples = np.arange(count)[::-1] * (total // count)
        return _inside(schedule, (multiples + schedule.steps_offset).astype(np.float64))
    # For some counts rounding makes arange one too long; its surplus end would be timestep -1.
    return np.arange(total, 0, -total / count)[:count].round() - 1


def _whole_timesteps(schedule: NoiseSchedule, count: int) -> list[int]:
    if schedule.sigma_spacing != "timesteps":
        raise UsageError(
            f"schedule: expected leading, linspace or trailing, got {schedule.sigma_spacing}. DDIM and PLMS visit "
            "training timesteps only; choose one of these spacings, or a sampler that steps through sigmas."
        )
    spacing = schedule.timestep_spacing or "leading"
    if spacing == "linspace":
        timesteps = np.linspace(0, schedule.num_train_timesteps - 1, count).round()[::-1]
    else:
        timesteps = _timesteps(schedule, count, spacing)
    return [int(t) for t in timesteps]


def _dpm_timesteps(schedule: NoiseSchedule, count: int) -> FloatArray:
    spacing = schedule.timestep_spacing or "linspace"
    total = schedule.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(0, total - 1, count + 1).round()[:0:-1].astype(np.float64)
    if spacing == "leading":
        timesteps = np.arange(count + 1)[:0:-1] * (total // (count + 1)) + schedule.steps_offset
        return _inside(schedule, timesteps.astype(np.float64))
    return _timesteps(schedule, count, spacing)


def _inside(schedule: NoiseSchedule, timesteps: FloatArray) -> FloatArray:
    last = schedule.num_train_timesteps - 1
    if timesteps[0] > last:
        raise UsageError(
            f"num_inference_steps: expected timesteps up to {last}, got {timesteps[0]:g} for {len(timesteps)} steps "
            f"with steps_offset {schedule.steps_offset}. Take fewer steps."
        )
    return timesteps
