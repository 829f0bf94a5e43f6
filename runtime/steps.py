"""Which noise levels a sampler visits: timestep and sigma of every step, as diffusers' scheduler classes space them.

diffusers has three families that differ in small ways: `ddim_steps` and its like with whole timesteps a fixed stride
apart, `sigma_steps` with fractional timesteps (Euler and its kin), and `dpm_steps`, which spaces one step more and
drops the last. A sigma here is always the noise-to-signal ratio of k-diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .errors import UsageError
from .noise_schedule import FloatArray, NoiseSchedule, TimestepSpacing
from .sigma_spacing import OVER_TRAINING, spread_sigmas


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a sampler.

    Attributes:
        index: position in the whole schedule, from 0. A slice of the steps, as for image to image, keeps it.
        timestep: what the model is told.
        sigma: noise-to-signal ratio at which the step starts; infinite where a schedule with zero terminal SNR does.
        sigma_next: the one at which it ends; 0 is a clean latent. Not always the next step's `sigma`: with linspace
            spacing DDIM and PNDM step to a level which is not the one they go on from.
        total: how many steps the whole schedule has, for solvers that end otherwise than they go on; 0 if not known.
    """

    index: int
    timestep: float
    sigma: float
    sigma_next: float
    total: int = 0


Steps = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """Steps that a caller names instead of counting them. At most one is given.

    Attributes:
        timesteps: falling training timesteps.
        sigmas: falling noise-to-signal ratios, the last of them that of the result, usually 0.
    """

    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None

    def __len__(self) -> int:
        """How many steps they are; 0 for none."""
        return len(self.timesteps or ()) or max(len(self.sigmas or ()) - 1, 0)


NOT_GIVEN = Given()


def ddim_steps(
    schedule: NoiseSchedule, count: int, *, given: Given = NOT_GIVEN, set_alpha_to_one: bool = True
) -> Steps:
    """The steps of diffusers' `DDIMScheduler`: from t to t - num_train_timesteps // count; to the next if given."""
    timesteps = whole_timesteps(schedule, count, given)
    stride = schedule.num_train_timesteps // count
    ends = [*timesteps[1:], -1] if given else [t - stride for t in timesteps]
    return tuple(
        Step(i, t, sigma_at(schedule, t), sigma_at(schedule, end, alpha_to_one=set_alpha_to_one), count)
        for i, (t, end) in enumerate(zip(timesteps, ends, strict=True))
    )


def ddpm_steps(schedule: NoiseSchedule, count: int, *, given: Given = NOT_GIVEN) -> Steps:
    """The steps of diffusers' `DDPMScheduler`: from each timestep to the next, and to a clean latent."""
    return successive_steps(schedule, whole_timesteps(schedule, count, given))


def successive_steps(schedule: NoiseSchedule, timesteps: Sequence[int]) -> Steps:
    """Steps from each of some whole timesteps to the next, and from the last to a clean latent."""
    levels = [*(sigma_at(schedule, t) for t in timesteps), 0.0]
    return tuple(Step(i, t, levels[i], levels[i + 1], len(timesteps)) for i, t in enumerate(timesteps))


def sigma_steps(
    schedule: NoiseSchedule,
    count: int,
    *,
    given: Given = NOT_GIVEN,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    karras_rounds: bool = False,
) -> Steps:
    """The steps of diffusers' `EulerDiscreteScheduler` and its kin; Karras spacing runs between its own extremes.

    Args:
        given: steps to take instead.
        sigma_min: the lowest level of Karras and like spacings before the last, if not that of the lowest timestep.
        sigma_max: the highest level of these, likewise.
        karras_rounds: whether Karras spacing rounds the timesteps that the model is told, as `KDPM2DiscreteScheduler`.
    """
    if given.sigmas is not None:
        return _from_sigmas(schedule, given.sigmas)
    if given.timesteps is not None:
        timesteps = np.asarray(given.timesteps, np.float64)
    else:
        timesteps = spaced_timesteps(schedule, count, schedule.timestep_spacing or "linspace")
    sigmas = np.interp(timesteps, np.arange(schedule.num_train_timesteps), schedule.sigmas)
    if schedule.sigma_spacing != "timesteps" and given.timesteps is None:
        ends = float(sigmas[0]), float(sigmas[-1])
        sigmas = spread_sigmas(schedule, *ends, count, sigma_max=sigma_max, sigma_min=sigma_min)
        timesteps = np.array([schedule.sigma_to_timestep(sigma) for sigma in sigmas])
        if karras_rounds and schedule.sigma_spacing == "karras":
            timesteps = timesteps.round()
    return chain(timesteps.astype(np.float32).astype(np.float64), sigmas, final_sigma(schedule))


def dpm_steps(
    schedule: NoiseSchedule,
    count: int,
    *,
    given: Given = NOT_GIVEN,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    lambda_min_clipped: float = -math.inf,
    karras_rounding: Literal["unless_cosine", "always"] = "unless_cosine",
    repeats_last: bool = False,
) -> Steps:
    """The steps of diffusers' `DPMSolverMultistepScheduler`; Karras' spacing runs between the extremes of training.

    Args:
        given: steps to take instead.
        sigma_min: the lowest level of Karras and like spacings before the last, if not the lowest trained on.
        sigma_max: the highest level of these, likewise.
        lambda_min_clipped: timesteps whose log signal-to-noise ratio is below are left out, as a cosine schedule needs.
        karras_rounding: whether the timesteps of Karras spacing are rounded with a cosine schedule too.
        repeats_last: whether Karras and like spacings that end above 0 end with a step from their lowest level to the
            same, instead of one to the lowest level trained on.
    """
    if given.sigmas is not None:
        return _from_sigmas(schedule, given.sigmas)
    if given.timesteps is not None or schedule.sigma_spacing == "timesteps":
        if given.timesteps is not None:
            timesteps = np.trunc(np.asarray(given.timesteps, np.float64))
        else:
            timesteps = _dpm_timesteps(schedule, count, lambda_min_clipped)
        sigmas = np.interp(timesteps, np.arange(schedule.num_train_timesteps), schedule.sigmas)
    else:
        ends = float(schedule.sigmas[-1]), float(schedule.sigmas[0])
        sigmas = spread_sigmas(schedule, *ends, count, sigma_max=sigma_max, sigma_min=sigma_min)
        timesteps = np.array([schedule.sigma_to_timestep(sigma) for sigma in sigmas])
        # diffusers rounds before it cuts off what is left; DPM-Solver++ does so for Karras alone, and not with the
        # cosine schedule.
        if schedule.sigma_spacing in ("karras", "lu_lambdas"):
            rounded = karras_rounding == "always" or schedule.beta_schedule != "squaredcos_cap_v2"
        else:
            # Not spacings of diffusers: 998.9999 is 999.
            rounded = schedule.sigma_spacing in OVER_TRAINING
        if rounded:
            timesteps = timesteps.round()
        if repeats_last and schedule.final_sigmas_type == "sigma_min":
            return chain(np.trunc(timesteps), sigmas, float(np.float32(sigmas[-1])))
    return chain(np.trunc(timesteps), sigmas, final_sigma(schedule))


def final_sigma(schedule: NoiseSchedule) -> float:
    """Where the last step ends."""
    return float(schedule.sigmas[0]) if schedule.final_sigmas_type == "sigma_min" else 0.0


def chain(timesteps: FloatArray, sigmas: FloatArray, final: float) -> Steps:
    """Steps that each go on where the one before ended; sigmas rounded to float32 as diffusers hands them on."""
    levels = [*sigmas.astype(np.float32).tolist(), final]
    return tuple(Step(i, t, levels[i], levels[i + 1], total=len(timesteps)) for i, t in enumerate(timesteps.tolist()))


def _from_sigmas(schedule: NoiseSchedule, sigmas: Sequence[float]) -> Steps:
    levels = np.asarray(sigmas, np.float64)
    timesteps = np.array([schedule.sigma_to_timestep(sigma) for sigma in levels[:-1]])
    return chain(timesteps.astype(np.float32).astype(np.float64), levels[:-1], float(levels[-1]))


def sigma_at(schedule: NoiseSchedule, timestep: int, *, alpha_to_one: bool = False) -> float:
    """The noise-to-signal ratio of a training timestep; below 0 it is that of timestep 0, or 0 as `alpha_to_one`."""
    if timestep < 0 and alpha_to_one:
        return 0.0
    alpha_cumprod = float(schedule.alphas_cumprod[max(timestep, 0)])
    return math.sqrt((1 - alpha_cumprod) / alpha_cumprod) if alpha_cumprod > 0 else math.inf


def spaced_timesteps(schedule: NoiseSchedule, count: int, spacing: TimestepSpacing) -> FloatArray:
    """Falling timesteps by Table 2 of Lin et al. 2023 (arXiv 2305.08891); fractional with linspace, (count,)."""
    total = schedule.num_train_timesteps
    if spacing == "linspace":
        return np.linspace(0, total - 1, count, dtype=np.float32)[::-1].astype(np.float64)
    if spacing == "leading":
        multiples = np.arange(count)[::-1] * (total // count)
        return _inside(schedule, (multiples + schedule.steps_offset).astype(np.float64))
    # For some counts rounding makes arange one too long; its surplus end would be timestep -1.
    return np.arange(total, 0, -total / count)[:count].round() - 1


def whole_timesteps(schedule: NoiseSchedule, count: int, given: Given = NOT_GIVEN) -> list[int]:
    """Falling whole timesteps, as DDPM, DDIM and PNDM visit them.

    Raises:
        UsageError: sigmas are given, which need not be those of whole timesteps.
    """
    if given.sigmas is not None:
        raise UsageError(
            "sigmas: expected none with a sampler that visits whole timesteps, got some. "
            "Give timesteps, or choose a sampler that steps through sigmas, such as DPM++ 2M."
        )
    if given.timesteps is not None:
        return [int(t) for t in given.timesteps]
    spacing = schedule.timestep_spacing or "leading"
    if spacing == "linspace":
        timesteps = np.linspace(0, schedule.num_train_timesteps - 1, count).round()[::-1]
    else:
        timesteps = spaced_timesteps(schedule, count, spacing)
    return [int(t) for t in timesteps]


def _dpm_timesteps(schedule: NoiseSchedule, count: int, lambda_min_clipped: float) -> FloatArray:
    spacing = schedule.timestep_spacing or "linspace"
    total = schedule.num_train_timesteps - int(np.searchsorted(-schedule.log_sigmas[::-1], lambda_min_clipped))
    if spacing == "linspace":
        return np.linspace(0, total - 1, count + 1).round()[:0:-1].astype(np.float64)
    if spacing == "leading":
        timesteps = np.arange(count + 1)[:0:-1] * (total // (count + 1)) + schedule.steps_offset
        return _inside(schedule, timesteps.astype(np.float64))
    stride = schedule.num_train_timesteps / count
    return np.arange(total, 0, -stride)[:count].round() - 1


def _inside(schedule: NoiseSchedule, timesteps: FloatArray) -> FloatArray:
    last = schedule.num_train_timesteps - 1
    if timesteps[0] > last:
        raise UsageError(
            f"num_inference_steps: expected timesteps up to {last}, got {timesteps[0]:g} for {len(timesteps)} steps "
            f"with steps_offset {schedule.steps_offset}. Take fewer steps."
        )
    return timesteps
