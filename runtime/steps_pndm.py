"""The steps of pseudo numerical methods: each call of the model is one, as diffusers counts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .errors import UsageError
from .noise_schedule import NoiseSchedule
from .steps import NOT_GIVEN, Given, Step, Steps, sigma_at, whole_timesteps

WARM_UP = 12
"""Steps of the Runge-Kutta warm-up: three times four."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PndmStep(Step):
    """A step of PNDM. Its `sigma` is where the model is called, its `sigma_next` where it leads.

    Attributes:
        before: the level one stride noisier than `sigma`, from which a correction starts once more.
        after: the level one stride cleaner.
        runge_kutta: whether this is one of the steps of the Runge-Kutta warm-up.
    """

    before: float
    after: float
    runge_kutta: bool = False


def pndm_steps(
    schedule: NoiseSchedule,
    count: int,
    *,
    given: Given = NOT_GIVEN,
    set_alpha_to_one: bool = False,
    skip_prk_steps: bool = True,
) -> tuple[PndmStep, ...]:
    """The steps of diffusers' `PNDMScheduler`: one more than asked for, or nine more with the Runge-Kutta warm-up.

    Without it the second step is taken twice: the first time it corrects the first step, which starts once more.

    Args:
        schedule: the checkpoint's.
        count: steps.
        given: timesteps to visit instead; they lead from one to the next.
        set_alpha_to_one: whether the last step ends at a clean latent instead of the lowest timestep.
        skip_prk_steps: whether to do without the Runge-Kutta warm-up.

    Raises:
        UsageError: the warm-up is not possible with these steps.
    """
    timesteps = whole_timesteps(schedule, count, given)
    stride = schedule.num_train_timesteps // count
    earlier = [timesteps[0], *timesteps[:-1]] if given else [t + stride for t in timesteps]
    later = [*timesteps[1:], -1] if given else [t - stride for t in timesteps]

    total = 1 if count == 1 and skip_prk_steps else count + (1 if skip_prk_steps else WARM_UP - 3)

    def level(timestep: int) -> float:
        # Above the last timestep lies only the `before` of the first step, which nothing reads.
        return sigma_at(schedule, min(timestep, schedule.num_train_timesteps - 1), alpha_to_one=set_alpha_to_one)

    def step(index: int, position: int, *, correction: bool = False) -> PndmStep:
        at, before, after = level(timesteps[position]), level(earlier[position]), level(later[position])
        return PndmStep(index, timesteps[position], at, at if correction else after, total, before=before, after=after)

    if not skip_prk_steps:
        if given or count < 4:
            raise UsageError(
                f"skip_prk_steps: expected true with {'given timesteps' if given else f'{count} steps'}, got false. "
                "The Runge-Kutta warm-up takes at least four evenly spaced steps."
            )
        warm_up = _warm_up(timesteps[:4], stride // 2, level, total)
        return (*warm_up, *(step(WARM_UP + i, i + 3) for i in range(count - 3)))
    if count == 1:
        return (step(0, 0),)
    return (step(0, 0), step(1, 1, correction=True), *(step(i + 1, i) for i in range(1, count)))


def _warm_up(timesteps: Sequence[int], half: int, level: Callable[[int], float], total: int) -> list[PndmStep]:
    """Three Runge-Kutta steps of four stages: at the start, twice half a stride on, and at the next timestep."""
    steps: list[PndmStep] = []
    for start, end in pairwise(timesteps):
        middle = end + half
        for timestep, to in ((start, start - half), (middle, middle), (middle, end), (end, end)):
            ends = level(timestep), level(to)
            steps.append(PndmStep(len(steps), timestep, *ends, total, before=ends[0], after=ends[1], runge_kutta=True))
    return steps


def iplms_steps(schedule: NoiseSchedule, count: int, *, given: Given = NOT_GIVEN) -> Steps:
    """The steps of diffusers' `IPNDMScheduler`, whose time runs from 1 to 0: sigma_t is sin^2(time * pi / 2).

    With `trained_betas` these are its sigma_t instead, the last being that of the result.

    Raises:
        UsageError: steps are given, or not as many asked for as there are trained betas.
    """
    if given:
        raise UsageError("timesteps: expected none with iPLMS, got some. Its steps follow from their number.")
    if schedule.beta_schedule == "trained_betas":
        sigma_t = schedule.betas
        if len(sigma_t) != count + 1:
            raise UsageError(
                f"num_inference_steps: expected {len(sigma_t) - 1} with {len(sigma_t)} trained betas, got {count}."
            )
    else:
        time = np.linspace(1, 0, count + 1).astype(np.float32)
        sigma_t = np.sin(time * np.float32(np.pi / 2)) ** 2
    alpha = np.sqrt(np.float32(1) - sigma_t**2)
    timesteps = np.arctan2(sigma_t, alpha) / np.float32(np.pi) * 2
    with np.errstate(divide="ignore"):
        levels = (sigma_t.astype(np.float64) / alpha.astype(np.float64)).tolist()
    return tuple(Step(i, t, levels[i], levels[i + 1], count) for i, t in enumerate(timesteps[:-1].tolist()))
