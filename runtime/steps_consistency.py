"""The steps of distilled few-step models: some of those that a model was distilled with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import UsageError
from .noise_schedule import NoiseSchedule
from .steps import NOT_GIVEN, Given, Step, Steps, sigma_at, successive_steps, whole_timesteps


@dataclass(frozen=True, kw_only=True, slots=True)
class TcdStep(Step):
    """A step of trajectory consistency distillation.

    Attributes:
        sigma_down: the level that the model jumps to, from which noise leads back up to `sigma_next`.
    """

    sigma_down: float


def lcm_steps(
    schedule: NoiseSchedule,
    count: int,
    *,
    given: Given = NOT_GIVEN,
    original_inference_steps: int = 50,
    strength: float = 1.0,
) -> Steps:
    """The steps of diffusers' `LCMScheduler`; the last ends at a clean latent.

    Args:
        schedule: the checkpoint's.
        count: steps.
        given: timesteps to visit instead.
        original_inference_steps: how many steps the model was distilled with.
        strength: below 1, the share of them that is left, from the end, as for image to image.

    Raises:
        UsageError: there are not that many steps.
    """
    return successive_steps(schedule, _distilled_timesteps(schedule, count, given, original_inference_steps, strength))


def tcd_steps(
    schedule: NoiseSchedule,
    count: int,
    *,
    given: Given = NOT_GIVEN,
    original_inference_steps: int = 50,
    strength: float = 1.0,
    eta: float = 0.3,
) -> tuple[TcdStep, ...]:
    """The steps of diffusers' `TCDScheduler`; the last ends at the level of timestep 0.

    Args:
        schedule: the checkpoint's.
        count: steps.
        given: timesteps to visit instead.
        original_inference_steps: how many steps the model was distilled with.
        strength: below 1, the share of them that is left, from the end, as for image to image.
        eta: gamma of the paper: the share of the next timestep that is gone down in excess.

    Raises:
        UsageError: there are not that many steps.
    """
    timesteps = _distilled_timesteps(schedule, count, given, original_inference_steps, strength)
    steps = []
    for i, (timestep, following) in enumerate(zip(timesteps, [*timesteps[1:], 0], strict=True)):
        # The product is one of float32 numbers in diffusers, which can make it the next whole number.
        down = int(np.float32(1 - eta) * np.float32(following))
        start, end, sigma_down = (sigma_at(schedule, t) for t in (timestep, following, down))
        steps.append(TcdStep(i, timestep, start, end, len(timesteps), sigma_down=sigma_down))
    return tuple(steps)


def _distilled_timesteps(
    schedule: NoiseSchedule, count: int, given: Given, original_steps: int, strength: float
) -> list[int]:
    """Falling timesteps at even positions among those of the distillation: section 4.3 of arXiv 2310.04378."""
    total = schedule.num_train_timesteps
    if given:
        timesteps = whole_timesteps(schedule, count, given)
        return timesteps[count - min(int(count * strength), count) :] or timesteps[-1:]
    if original_steps > total:
        raise UsageError(
            f"original_inference_steps: expected at most {total}, got {original_steps}. It cannot be more than the "
            "timesteps of the training."
        )
    left = int(original_steps * strength)
    if count > left:
        raise UsageError(
            f"num_inference_steps: expected at most {left}, original_inference_steps ({original_steps}) times "
            f"strength ({strength:g}), got {count}. Take fewer steps or raise one of these."
        )
    originals = np.arange(left, 0, -1) * (total // original_steps) - 1
    positions = np.floor(np.linspace(0, left, count, endpoint=False)).astype(np.int64)
    return [int(t) for t in originals[positions]]
