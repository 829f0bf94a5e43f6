"""What is known of a sampler; the tables of `sampler_specs_*.py` hold one of these for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .noise_schedule import NoiseSchedule
from .parametrisation import Array, Parametrisation, Quantity, Space
from .sampler_loop import Correction, Sampler
from .sampler_options import Option, flag, number
from .steps import Steps

TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
SIGMA_SPACINGS = ("karras", "exponential", "beta", "sgm_uniform", "ays", "ays_sdxl")


def never(_options: Mapping[str, Any]) -> bool:
    """For `takes_noise`: the solver has no such argument."""
    return False


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """What is known of a sampler.

    Attributes:
        name: k-diffusion's and ComfyUI's name, used in files and on the command line.
        label: A1111's name, for people.
        scheduler: diffusers' class; None if it has none for this sampler.
        aliases: other names it is known by.
        solver: the generator function, `solver(x, steps, **options)`. It is also passed `noise` if it takes noise,
            `brownian` if `brownian`, and `levels` if `takes_levels`.
        steps: the spacing of diffusers' class, `steps(schedule, count, given=..., **options)`.
        space: in which its latents are; "flow" instead where the schedule is one of flow sigmas.
        quantity: what the solver is sent at each evaluation.
        options: by diffusers' name.
        reads: the config's options that diffusers' class knows and that are read by the schedule.
        spacings: those that can be asked for by name.
        takes_noise: whether it draws noise with these options.
        brownian: whether its noise is that of one Brownian motion, queried between sigmas.
        takes_levels: whether the solver works in several spaces.
        from_schedule: options of the solver that the checkpoint's schedule sets.
        model: how the model's output is to be read, if not by `space` and the schedule's prediction type.
        correction: how denoised latents are changed, from the options; None for no change.
        preset: values of options that belong to the name, such as sde-dpmsolver++ for DPM++ 2M SDE.
        named: values that its own names stand for, whatever a config says; asked for by diffusers' class, the config's
            count.
        schedule: spacing that came with the name, as in "DPM++ 2M Karras"; None leaves it to the checkpoint.
    """

    name: str
    label: str
    scheduler: str | None
    solver: Callable[..., Sampler]
    steps: Callable[..., Steps]
    space: Space
    aliases: tuple[str, ...] = ()
    quantity: Quantity = "denoised"
    options: Mapping[str, Option] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    spacings: tuple[str, ...] = (*TIMESTEP_SPACINGS, *SIGMA_SPACINGS)
    takes_noise: Callable[[Mapping[str, Any]], bool] = never
    brownian: bool = False
    takes_levels: bool = False
    from_schedule: Callable[[NoiseSchedule], Mapping[str, Any]] = lambda _: {}
    model: Callable[[NoiseSchedule, Mapping[str, Any]], Parametrisation] | None = None
    correction: Callable[[Mapping[str, Any]], Correction | None] | None = None
    preset: Mapping[str, Any] = field(default_factory=dict)
    named: Mapping[str, Any] = field(default_factory=dict)
    schedule: str | None = None


def always(_options: Mapping[str, Any]) -> bool:
    """For `takes_noise`."""
    return True


def with_eta(options: Mapping[str, Any]) -> bool:
    """For `takes_noise`: whether eta is above 0."""
    return bool(options["eta"] > 0)


SIGMA_READS = frozenset(
    {
        "timestep_spacing",
        "steps_offset",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
    }
)
"""Options that most of diffusers' classes read."""

THRESHOLDING: Mapping[str, Option] = {
    "thresholding": flag(False, to="correct"),
    "dynamic_thresholding_ratio": number(0.995, 0, 1, to="correct"),
    "sample_max_value": number(1.0, 1e-6, to="correct"),
}

CLIPPING: Mapping[str, Option] = {
    "clip_sample": flag(False, to="correct"),
    "clip_sample_range": number(1.0, 0, to="correct"),
}

CHURN: Mapping[str, Option] = {
    "s_churn": number(0.0, 0, in_config=False),
    "s_tmin": number(0.0, 0, in_config=False),
    "s_tmax": number(math.inf, 0, in_config=False),
    "s_noise": number(1.0, 0, in_config=False),
}
"""Noise added before an evaluation: Algorithm 2 of Karras et al. 2022 (arXiv 2206.00364)."""


def with_churn(options: Mapping[str, Any]) -> bool:
    """For `takes_noise`: whether there is churn."""
    return bool(options["s_churn"] > 0)


def correction_of(options: Mapping[str, Any]) -> Correction | None:
    """Dynamic thresholding or clipping, whichever the options ask for; thresholding first, as diffusers."""
    if options.get("thresholding"):
        from .thresholding import dynamic_threshold

        ratio, most = float(options["dynamic_thresholding_ratio"]), float(options["sample_max_value"])
        return lambda denoised: dynamic_threshold(denoised, ratio=ratio, sample_max_value=most)
    if options.get("clip_sample"):
        limit = float(options["clip_sample_range"])

        def clip(denoised: Array) -> Array:
            clipped: Array = denoised.clip(-limit, limit)
            return clipped

        return clip
    return None
