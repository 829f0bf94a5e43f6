"""From a checkpoint's schedule, a sampler and a number of steps to a running sampler.

plan = plan_sampling(NoiseSchedule.from_config(config), resolve_sampler("DPM++ 2M Karras"), 20)
noise = batch_noise(seed, batch_size)
sampler = start_sampler(plan, plan.init_noise_sigma * noise(shape), noise=noise)
for result in drive(sampler, predict):
    ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np

from .errors import ConfigError, UsageError
from .noise_schedule import NoiseSchedule, TimestepSpacing
from .parametrisation import Array
from .sampler_loop import Sampler, with_model
from .sampler_names import SamplerSpec, resolve_schedule
from .samplers import NoiseSource
from .steps import Steps


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """What is to be done, before there is a latent.

    Attributes:
        sampler: the sampler.
        schedule: the checkpoint's, spaced as chosen.
        steps: equal to diffusers' timesteps and sigmas; PLMS has one more than asked for. Image to image takes a slice.
        init_noise_sigma: what standard normal noise is multiplied by to be the initial latent, as in diffusers.
    """

    sampler: SamplerSpec
    schedule: NoiseSchedule
    steps: Steps
    init_noise_sigma: float


def plan_sampling(
    schedule: NoiseSchedule, sampler: SamplerSpec, num_inference_steps: int, *, spacing: str | None = None
) -> SamplingPlan:
    """Choose the steps.

    Args:
        schedule: the checkpoint's.
        sampler: of `resolve_sampler`.
        num_inference_steps: from 1 to the number of training timesteps.
        spacing: one of `SCHEDULES`; overrides that of the sampler's name, which overrides the checkpoint's.

    Raises:
        UsageError: if the number of steps or the spacing is not possible with this sampler.
        ConfigError: if the checkpoint's schedule is not possible with this sampler.
    """
    most = schedule.num_train_timesteps
    whole = isinstance(num_inference_steps, int | np.integer) and not isinstance(num_inference_steps, bool)
    if not (whole and 1 <= num_inference_steps <= most):
        raise UsageError(
            f"num_inference_steps: expected a whole number from 1 to {most}, got {num_inference_steps!r}. "
            "20 to 30 are usual."
        )
    spaced = with_spacing(schedule, resolve_schedule(spacing) or sampler.schedule)
    steps = sampler.steps(spaced, int(num_inference_steps))
    if math.isinf(steps[0].sigma) and schedule.prediction_type != "v_prediction":
        raise ConfigError(
            f"prediction_type: expected v_prediction for {sampler.label} from zero terminal SNR, got "
            f"{schedule.prediction_type}. Choose leading spacing, or a checkpoint trained with v prediction."
        )
    return SamplingPlan(
        sampler=sampler, schedule=spaced, steps=steps, init_noise_sigma=_init_noise_sigma(sampler, spaced, steps)
    )


def with_spacing(schedule: NoiseSchedule, name: str | None) -> NoiseSchedule:
    """The schedule with its steps spaced by one of `SCHEDULES`; unchanged for None.

    Karras and exponential spacing keep the timestep spacing of the checkpoint, which sets their extremes for Euler.
    """
    spacing = resolve_schedule(name)
    if spacing is None:
        return schedule
    if spacing in get_args(TimestepSpacing):
        return schedule.replace(timestep_spacing=spacing, sigma_spacing="timesteps")
    return schedule.replace(sigma_spacing=spacing)


def _init_noise_sigma(sampler: SamplerSpec, schedule: NoiseSchedule, steps: Steps) -> float:
    if sampler.space == "vp":
        return 1.0
    sigma_max = max(step.sigma for step in steps)
    return math.sqrt(sigma_max**2 + 1) if schedule.timestep_spacing == "leading" else sigma_max


def start_sampler(
    plan: SamplingPlan, latents: Array, *, noise: NoiseSource | None = None, eta: float | None = None
) -> Sampler:
    """A running sampler that yields the model's calls, is sent its raw output, and returns the final latent.

    Args:
        plan: of `plan_sampling`.
        latents: noise times `plan.init_noise_sigma`, (b, 4, h/8, w/8), float32. Never written to.
        noise: where a stochastic sampler takes its noise from; go on with the one that drew the initial latents.
        eta: how stochastic; None takes the sampler's default.

    Raises:
        UsageError: if `eta` is given to a sampler without one or is not in [0, 1], or if noise is needed and missing.
    """
    sampler, schedule = plan.sampler, plan.schedule
    options = dict(sampler.from_schedule(schedule))
    if sampler.eta is None:
        if eta is not None:
            raise UsageError(f"eta: expected None for {sampler.label}, which adds no noise, got {eta}. Leave it out.")
    else:
        options |= {"eta": _checked_eta(sampler.eta if eta is None else eta), "noise": noise}
        if options["eta"] > 0 and noise is None:
            raise UsageError(f"noise: expected a source of noise for {sampler.label}, got None. Pass it, or eta=0.")
    return with_model(
        sampler.solver(latents, plan.steps, **options),
        space=sampler.space,
        prediction_type=schedule.prediction_type,
        sigma_to_timestep=schedule.sigma_to_timestep,
    )


def _checked_eta(eta: float) -> float:
    if not 0 <= eta <= 1:
        raise UsageError(f"eta: expected a number from 0 to 1, got {eta}. 0 adds no noise.")
    return eta
