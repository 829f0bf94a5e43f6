"""Steps of the DPM-Solver family beside those of `steps.dpm_steps`: rectified flow, and DEIS' and UniPC's ends.

A flow's level s is in [0, 1], alpha = 1 - s and sigma_t = s; its noise-to-signal ratio is s / (1 - s).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from .errors import ConfigError, UsageError
from .noise_schedule import FloatArray, NoiseSchedule
from .steps import NOT_GIVEN, Given, Step, Steps, dpm_steps, final_sigma
from .steps_edm import edm_steps

TimeShift = Literal["exponential", "linear"]

# The level of a flow below 1, where there would be no signal, that float32 knows.
_HIGHEST_LEVEL = np.float32(1 - 2.0**-24)
# How far below 1 diffusers' UniPC puts a first level of 1.
_FLOW_EPSILON = 1e-6


def dpm_multistep_steps(
    schedule: NoiseSchedule,
    count: int,
    *,
    given: Given = NOT_GIVEN,
    lambda_min_clipped: float = -math.inf,
    karras_rounding: Literal["unless_cosine", "always"] = "unless_cosine",
    repeats_last: bool = False,
    flow_shift: float = 1.0,
    use_dynamic_shifting: bool = False,
    time_shift_type: TimeShift = "exponential",
    mu: float | None = None,
) -> Steps:
    """The steps of diffusers' `DPMSolverMultistepScheduler`, and with some changes of most of its kin.

    Args:
        schedule: the checkpoint's; "flow" as its `sigma_spacing` makes these the steps of a rectified flow.
        count: of steps.
        given: steps to take instead.
        lambda_min_clipped: as in `dpm_steps`.
        karras_rounding: as in `dpm_steps`.
        repeats_last: as in `dpm_steps`, for a flow too.
        flow_shift: how much more noise a flow's timesteps hold: Esser et al. 2024 (arXiv 2403.03206), equation 23.
        use_dynamic_shifting: whether `mu` may be given.
        time_shift_type: as in `shift_of`.
        mu: sets the shift for this run, for instance by the size of the picture.

    Raises:
        UsageError: if timesteps are given for a flow, or `mu` where it is not allowed.
    """
    shift = shift_of(flow_shift, use_dynamic_shifting=use_dynamic_shifting, time_shift_type=time_shift_type, mu=mu)
    if schedule.sigma_spacing != "flow":
        return dpm_steps(
            schedule,
            count,
            given=given,
            lambda_min_clipped=lambda_min_clipped,
            karras_rounding=karras_rounding,
            repeats_last=repeats_last,
        )
    if given != NOT_GIVEN:
        return _given_flow_steps(schedule, given)
    levels = 1.0 - np.linspace(1, 1 / schedule.num_train_timesteps, count + 1)
    levels = (shift * levels / (1 + (shift - 1) * levels))[:0:-1]
    if schedule.final_sigmas_type == "zero":
        return flow_chain(schedule, levels, 0.0)
    if repeats_last:
        return flow_chain(schedule, levels, float(levels[-1]))
    # diffusers takes the lowest noise-to-signal ratio trained on for a level.
    return flow_chain(schedule, levels, final_sigma(schedule))


def flow_chain(schedule: NoiseSchedule, levels: FloatArray, final: float) -> Steps:
    """Steps between a flow's levels, rounded to float32 as diffusers hands them on.

    Timesteps are whole, cut off before that rounding.
    """
    timesteps = np.trunc(levels * schedule.num_train_timesteps).tolist()
    rounded = np.append(levels, final).astype(np.float32).clip(max=_HIGHEST_LEVEL).tolist()
    ratios = [level / (1 - level) for level in rounded]
    return tuple(Step(i, t, ratios[i], ratios[i + 1], total=len(timesteps)) for i, t in enumerate(timesteps))


def _given_flow_steps(schedule: NoiseSchedule, given: Given) -> Steps:
    if given.sigmas is None:
        raise UsageError("timesteps: expected none for a flow's schedule, got some. Give sigmas, as noise over signal.")
    ratios = given.sigmas
    total = len(ratios) - 1
    timesteps = [float(int(r / (1 + r) * schedule.num_train_timesteps)) for r in ratios[:-1]]
    return tuple(Step(i, t, ratios[i], ratios[i + 1], total=total) for i, t in enumerate(timesteps))


def shift_of(flow_shift: float, *, use_dynamic_shifting: bool, time_shift_type: TimeShift, mu: float | None) -> float:
    """The shift of a flow's levels: e^mu, or mu if `time_shift_type` is linear, where there is one.

    Raises:
        UsageError: if `mu` is given and the checkpoint does not shift dynamically.
    """
    if mu is None:
        return flow_shift
    if not use_dynamic_shifting:
        raise UsageError(f"mu: expected none without use_dynamic_shifting, got {mu!r}. Set flow_shift instead.")
    return math.exp(mu) if time_shift_type == "exponential" else mu


def deis_steps(
    schedule: NoiseSchedule,
    count: int,
    *,
    given: Given = NOT_GIVEN,
    lambda_min_clipped: float = -math.inf,
    flow_shift: float = 1.0,
    use_dynamic_shifting: bool = False,
    time_shift_type: TimeShift = "exponential",
    mu: float | None = None,
) -> Steps:
    """The steps of diffusers' `DEISMultistepScheduler` and `SASolverScheduler`, which never end at sigma 0.

    They end at the lowest level trained on; with Karras and like spacings, the last step does not change the level.
    """
    return dpm_multistep_steps(
        schedule.replace(final_sigmas_type="sigma_min"),
        count,
        given=given,
        lambda_min_clipped=lambda_min_clipped,
        karras_rounding="always",
        repeats_last=True,
        flow_shift=flow_shift,
        use_dynamic_shifting=use_dynamic_shifting,
        time_shift_type=time_shift_type,
        mu=mu,
    )


def unipc_steps(
    schedule: NoiseSchedule,
    count: int,
    *,
    given: Given = NOT_GIVEN,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    flow_shift: float = 1.0,
    use_dynamic_shifting: bool = False,
    time_shift_type: TimeShift = "exponential",
    mu: float | None = None,
    shift_terminal: float | None = None,
) -> Steps:
    """The steps of diffusers' `UniPCMultistepScheduler`.

    Args:
        schedule: the checkpoint's.
        count: of steps.
        given: steps to take instead.
        sigma_min: the lowest level of Karras and like spacings before the last, if not the lowest trained on.
        sigma_max: the highest level of these, likewise.
        flow_shift: as in `dpm_multistep_steps`.
        use_dynamic_shifting: whether `mu` has to be given.
        time_shift_type: as in `shift_of`.
        mu: as in `shift_of`.
        shift_terminal: stretches a flow's levels so that the last one before the end is this.

    Raises:
        UsageError: if `mu` is missing or not allowed, or timesteps are given for a flow.
        ConfigError: if there is a `shift_terminal` without a flow.
    """
    flow = schedule.sigma_spacing == "flow"
    if shift_terminal is not None and not flow:
        raise ConfigError(f"shift_terminal: expected none without use_flow_sigmas, got {shift_terminal!r}. Remove it.")
    if use_dynamic_shifting and mu is None:
        raise UsageError("mu: expected a number for a checkpoint with use_dynamic_shifting, got None. Give one.")
    shift = shift_of(flow_shift, use_dynamic_shifting=use_dynamic_shifting, time_shift_type=time_shift_type, mu=mu)
    if not flow:
        return dpm_steps(
            schedule,
            count,
            given=given,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            karras_rounding="always",
            repeats_last=True,
        )
    if given != NOT_GIVEN:
        return _given_flow_steps(schedule, given)
    levels = np.linspace(1, 1 / schedule.num_train_timesteps, count + 1)[:-1]
    levels = shift / (shift + (1 / levels - 1)) if use_dynamic_shifting else shift * levels / (1 + (shift - 1) * levels)
    if shift_terminal:
        levels = 1 - (1 - levels) / ((1 - levels[-1]) / (1 - shift_terminal))
    if abs(levels[0] - 1) < _FLOW_EPSILON:
        levels[0] -= _FLOW_EPSILON
    return flow_chain(schedule, levels, float(levels[-1]) if schedule.final_sigmas_type == "sigma_min" else 0.0)


def edm_multistep_steps(schedule: NoiseSchedule, count: int, *, given: Given = NOT_GIVEN, **options: Any) -> Steps:
    """The steps of diffusers' `EDMDPMSolverMultistepScheduler`: `edm_steps`, but one alone ends at `sigma_min`.

    Args:
        schedule: the checkpoint's.
        count: of steps.
        given: sigmas to take instead.
        options: of `edm_steps`.
    """
    steps = edm_steps(schedule, count, given=given, **options)
    if schedule.final_sigmas_type == "zero" or given.sigmas is not None:
        return steps
    return (*steps[:-1], replace(steps[-1], sigma_next=float(np.float32(options["sigma_min"]))))
