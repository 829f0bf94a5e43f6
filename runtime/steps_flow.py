"""The steps of rectified flows: shifted levels t in [0, 1], as diffusers' flow-matching classes have them."""

from __future__ import annotations

import math

import numpy as np

from .errors import UsageError
from .noise_schedule import FloatArray, NoiseSchedule
from .sigma_spacing import BETWEEN
from .steps import NOT_GIVEN, Given, Step, Steps


def flow_steps(
    schedule: NoiseSchedule,
    count: int,
    *,
    given: Given = NOT_GIVEN,
    shift: float = 1.0,
    use_dynamic_shifting: bool = False,
    mu: float | None = None,
    image_seq_len: int | None = None,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
    time_shift_type: str = "exponential",
    shift_terminal: float | None = None,
    invert_sigmas: bool = False,
) -> Steps:
    """The steps of diffusers' `FlowMatchEulerDiscreteScheduler`, and of its Heun form, which has fewer options.

    Args:
        schedule: how many timesteps there are, and the rule of the levels.
        count: steps.
        given: timesteps or sigmas to take instead. Sigmas are sigma_t in [0, 1], the last that of the result. They are
            shifted like others; timesteps are told to the model as they are, but the levels they stand for are shifted.
        shift: s of t -> s t / (1 + (s - 1) t), equation 23 of Esser et al. 2024 (arXiv 2403.03206).
        use_dynamic_shifting: shift by `mu` instead, which depends on the size of the picture.
        mu: logarithm of the dynamic shift, or the shift itself if `time_shift_type` is "linear".
        image_seq_len: how many tokens the picture has; gives `mu` where that is None.
        base_shift: mu of a picture of `base_image_seq_len` tokens.
        max_shift: mu of a picture of `max_image_seq_len` tokens.
        base_image_seq_len: see `base_shift`.
        max_image_seq_len: see `max_shift`.
        time_shift_type: "exponential" or "linear".
        shift_terminal: where the last level before the result is stretched to.
        invert_sigmas: whether time runs from noise at 0 to the result at 1.

    Raises:
        UsageError: the dynamic shift lacks `mu`, or sigmas are above 1.
    """
    total = schedule.num_train_timesteps
    if use_dynamic_shifting and mu is None:
        if image_seq_len is None:
            raise UsageError(
                "mu: expected a number with use_dynamic_shifting, got None. Pass mu, or image_seq_len for it."
            )
        slope = (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len)
        mu = base_shift + slope * (image_seq_len - base_image_seq_len)

    def shifted(t: FloatArray) -> FloatArray:
        if mu is None or not use_dynamic_shifting:
            return shift * t / (1 + (shift - 1) * t)
        factor = math.exp(mu) if time_shift_type == "exponential" else mu
        return factor / (factor + (1 / t - 1))

    final = 0.0
    if given.sigmas is not None:
        if given.sigmas[0] > 1:
            raise UsageError(f"sigmas: expected numbers from 0 to 1 with a flow, got {given.sigmas[0]:g}. Scale them.")
        *levels, final = given.sigmas
        sigmas = np.array(levels, np.float32).astype(np.float64)
    elif given.timesteps is not None:
        sigmas = np.array(given.timesteps, np.float32).astype(np.float64) / total
    else:
        ends = np.array([1.0, np.float32(1 / total)])
        # diffusers shifts the ends when it is made, and then again what lies between them.
        high, low = ends if use_dynamic_shifting else shifted(ends).astype(np.float32).astype(np.float64)
        sigmas = np.linspace(high * total, low * total, count) / total
    sigmas = shifted(sigmas)
    # One step alone has nothing to stretch; diffusers divides by 0.
    if shift_terminal and sigmas[-1] < 1:
        sigmas = 1 - (1 - sigmas) * ((1 - shift_terminal) / (1 - sigmas[-1]))
    if schedule.sigma_spacing in BETWEEN:
        sigmas = BETWEEN[schedule.sigma_spacing](float(sigmas[0]), float(sigmas[-1]), count)
    sigmas = sigmas.astype(np.float32)
    timesteps = sigmas * np.float32(total)
    if given.timesteps is not None and not invert_sigmas:
        timesteps = np.array(given.timesteps, np.float32)
    if invert_sigmas:
        sigmas, final = np.float32(1) - sigmas, 1 - final
        timesteps = sigmas * np.float32(total)
    ratios = [_ratio(t) for t in [*sigmas.tolist(), final]]
    return tuple(Step(i, t, ratios[i], ratios[i + 1], count) for i, t in enumerate(timesteps.tolist()))


def _ratio(t: float) -> float:
    """Noise-to-signal ratio of the level t of a rectified flow."""
    return t / (1 - t) if t < 1 else math.inf
