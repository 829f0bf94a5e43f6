"""Steps of k-diffusion's samplers that are spaced in ways of their own: Euler's options in diffusers, and restarts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from .errors import UsageError
from .noise_schedule import NoiseSchedule
from .sigma_spacing import exponential_sigmas, karras_sigmas
from .steps import NOT_GIVEN, Given, Step, Steps, chain, final_sigma, sigma_steps, spaced_timesteps
from .steps_edm import noise_conditions

Restarts = Mapping[float, tuple[int, int, float]]
"""{sigma: (restart_steps, restart_times, restart_max)}: from this sigma up to `restart_max` and down again, so often.

The way down has one step less than `restart_steps`, which is how Xu et al. and A1111 count.
"""


def euler_steps(
    schedule: NoiseSchedule,
    count: int,
    *,
    given: Given = NOT_GIVEN,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    interpolation_type: Literal["linear", "log_linear"] = "linear",
    timestep_type: Literal["discrete", "continuous"] = "discrete",
) -> Steps:
    """The steps of diffusers' `EulerDiscreteScheduler`.

    Args:
        schedule: the checkpoint's.
        count: of steps. With log_linear and continuous there is one more, as in diffusers.
        given: steps to take instead.
        sigma_min: as in `sigma_steps`.
        sigma_max: as in `sigma_steps`.
        interpolation_type: log_linear spaces sigmas evenly in log sigma between the extremes of training, whatever
            the timesteps that the model is told; the last step then ends at the lowest of them, not at 0.
        timestep_type: continuous tells a model of v prediction 0.25 * ln(sigma), as in Karras et al. 2022; it does not
            matter to others.

    Raises:
        UsageError: if timesteps are given that would be continuous.
    """
    continuous = timestep_type == "continuous" and schedule.prediction_type == "v_prediction"
    if continuous and given.timesteps is not None:
        raise UsageError(
            "timesteps: expected none for a checkpoint of continuous timesteps, got some. Give sigmas instead."
        )
    if interpolation_type == "log_linear" and given.sigmas is None:
        lowest, highest = float(schedule.sigmas[0]), float(schedule.sigmas[-1])
        if schedule.sigma_spacing == "timesteps" or given.timesteps is not None:
            steps = _log_linear(schedule, count, given, every=continuous)
        else:
            sigma_min, sigma_max = sigma_min or lowest, sigma_max or highest
            steps = sigma_steps(schedule, count, sigma_min=sigma_min, sigma_max=sigma_max)
    else:
        steps = sigma_steps(schedule, count, given=given, sigma_min=sigma_min, sigma_max=sigma_max)
    if not continuous:
        return steps
    told = noise_conditions(np.array([step.sigma for step in steps]))
    return tuple(dataclasses.replace(step, timestep=t) for step, t in zip(steps, told.tolist(), strict=True))


def _log_linear(schedule: NoiseSchedule, count: int, given: Given, *, every: bool) -> Steps:
    sigmas = exponential_sigmas(float(schedule.sigmas[-1]), float(schedule.sigmas[0]), count + 1)
    if every:
        return chain(np.zeros(count + 1), sigmas, final_sigma(schedule))
    if given.timesteps is None:
        timesteps = spaced_timesteps(schedule, count, schedule.timestep_spacing or "linspace")
    else:
        timesteps = np.asarray(given.timesteps, np.float64)
    return chain(timesteps.astype(np.float32).astype(np.float64), sigmas[:-1], float(np.float32(sigmas[-1])))


def restart_steps(
    schedule: NoiseSchedule, count: int, *, given: Given = NOT_GIVEN, restart_list: Restarts | None = None
) -> Steps:
    """Steps with restarts: Xu et al. 2023 (arXiv 2306.14878), chosen as by A1111's sampler.

    Without a list and with 20 steps or more, sigma 0.1 goes back to 2 once in 9 steps, or from 36 steps on twice in a
    quarter of the steps, and the rest are Karras' between the first sigma and the last but one. All together are
    `count` steps.

    Args:
        schedule: the checkpoint's.
        count: of steps; restarts in a list come on top.
        given: steps to take instead, between which restarts are put.
        restart_list: restarts, each at the step nearest to its sigma and from the step nearest to its highest. {} for
            none.

    Raises:
        UsageError: if the list is not of this form.
    """
    steps = sigma_steps(schedule, count, given=given)
    if restart_list is None:
        restarts: Restarts = {}
        if count >= 20:
            again, times = (9, 1) if count < 36 else (count // 4, 2)
            sigmas = karras_sigmas(steps[0].sigma, steps[-1].sigma, count - again * times)
            steps = chain(_timesteps(schedule, sigmas.tolist()), sigmas, steps[-1].sigma_next)
            restarts = {0.1: (again + 1, times, 2.0)}
    else:
        restarts = _checked_restarts(restart_list)
    ordered = tuple(_with_restarts(schedule, steps, restarts)) if restarts else steps
    return tuple(dataclasses.replace(step, index=i, total=len(ordered)) for i, step in enumerate(ordered))


def _with_restarts(schedule: NoiseSchedule, steps: Steps, restarts: Restarts) -> Iterator[Step]:
    levels = np.array([*(step.sigma for step in steps), steps[-1].sigma_next])

    def nearest(sigma: float) -> int:
        return int(np.abs(levels - sigma).argmin())

    at_level = {nearest(sigma): restart for sigma, restart in restarts.items()}
    for i, step in enumerate(steps, start=1):
        yield step
        count, times, most = at_level.get(i, (0, 0, 0.0))
        first = nearest(most)
        if first < i:
            sigmas = karras_sigmas(float(levels[first]), float(levels[i]), count)
            # `chain` rounds both ends to the levels that they are: any difference would be taken for another restart.
            *way, _ = chain(_timesteps(schedule, sigmas.tolist()), sigmas, 0.0)
            for _ in range(times):
                yield from way


def _timesteps(schedule: NoiseSchedule, sigmas: list[float]) -> Any:
    return np.array([schedule.sigma_to_timestep(sigma) for sigma in sigmas], np.float32).astype(np.float64)


def _checked_restarts(restarts: Any) -> Restarts:
    try:
        checked = {float(sigma): (int(a), int(b), float(most)) for sigma, (a, b, most) in restarts.items()}
    except (AttributeError, TypeError, ValueError) as err:
        raise UsageError(
            f"restart_list: expected {{sigma: (steps, times, highest sigma)}}, got {restarts!r}. "
            "For instance {0.1: (10, 1, 2)}."
        ) from err
    for sigma, (steps, times, most) in checked.items():
        if not (steps >= 2 and times >= 0 and 0 <= sigma < most < math.inf):
            raise UsageError(
                f"restart_list: expected at least 2 steps and a highest sigma above {sigma:g}, got "
                f"{(steps, times, most)}. For instance {{0.1: (10, 1, 2)}}."
            )
    return checked
