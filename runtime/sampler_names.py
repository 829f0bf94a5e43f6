"""The samplers by name, in every spelling users know: A1111, k-diffusion and ComfyUI, diffusers' classes.

A sampler is an entry in `SAMPLERS`: its solver, the space of its latents, how its steps are spaced, and which of the
solver's options can be set. Adding one is adding a line there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, get_args

from .errors import UsageError
from .noise_schedule import NoiseSchedule, PredictionType, SigmaSpacing, TimestepSpacing
from .parametrisation import Space
from .sampler_loop import Sampler
from .samplers import ddim, dpmpp_2m, euler, euler_ancestral, plms
from .steps import Steps, ddim_steps, dpm_steps, plms_steps, sigma_steps


@dataclass(frozen=True, kw_only=True)
class SamplerSpec:
    """What is known of a sampler.

    Attributes:
        name: k-diffusion's and ComfyUI's name, used in files and on the command line.
        label: A1111's name, for people.
        scheduler: diffusers' class.
        solver: the generator function, `solver(x, steps, **options)`.
        steps: the spacing of diffusers' class, `steps(schedule, num_inference_steps)`.
        space: in which its latents are, see `samplers`.
        eta: the default of its stochasticity; None if it has no such option.
        from_schedule: options of the solver that the checkpoint's schedule sets.
        schedule: spacing that came with the name, as in "DPM++ 2M Karras"; None leaves it to the checkpoint.
    """

    name: str
    label: str
    scheduler: str
    solver: Callable[..., Sampler]
    steps: Callable[[NoiseSchedule, int], Steps]
    space: Space
    eta: float | None = None
    from_schedule: Callable[[NoiseSchedule], Mapping[str, Any]] = lambda _: {}
    schedule: str | None = None


def _final_order(schedule: NoiseSchedule) -> Mapping[str, Any]:
    return {"lower_order_final": schedule.lower_order_final, "euler_at_final": schedule.euler_at_final}


def _extrapolated(schedule: NoiseSchedule) -> Mapping[str, PredictionType]:
    # diffusers extrapolates v for a v model; it takes no model that predicts the sample, for which epsilon is right.
    return {"extrapolate": "v_prediction" if schedule.prediction_type == "v_prediction" else "epsilon"}


SAMPLERS: tuple[SamplerSpec, ...] = (
    SamplerSpec(
        name="ddim", label="DDIM", scheduler="DDIMScheduler", solver=ddim, steps=ddim_steps, space="vp", eta=0.0
    ),
    SamplerSpec(
        name="plms",
        label="PLMS",
        scheduler="PNDMScheduler",
        solver=plms,
        steps=plms_steps,
        space="vp",
        from_schedule=_extrapolated,
    ),
    SamplerSpec(
        name="euler", label="Euler", scheduler="EulerDiscreteScheduler", solver=euler, steps=sigma_steps, space="ve"
    ),
    SamplerSpec(
        name="euler_ancestral",
        label="Euler a",
        scheduler="EulerAncestralDiscreteScheduler",
        solver=euler_ancestral,
        steps=sigma_steps,
        space="ve",
        eta=1.0,
    ),
    SamplerSpec(
        name="dpmpp_2m",
        label="DPM++ 2M",
        scheduler="DPMSolverMultistepScheduler",
        solver=dpmpp_2m,
        steps=dpm_steps,
        space="vp",
        from_schedule=_final_order,
    ),
)

SCHEDULES: tuple[str, ...] = (*get_args(TimestepSpacing), *get_args(SigmaSpacing)[1:])
"""Spacings that `resolve_schedule` knows beside "default", which is the checkpoint's own."""

_SPACING_SUFFIXES = get_args(SigmaSpacing)[1:]
_ALIASES = {"pndm": "plms"}


def _key(name: str) -> str:
    """A name without case, spaces and punctuation; "++" and "pp" are the same."""
    return re.sub(r"[^a-z0-9]", "", name.casefold().replace("++", "pp").removeprefix("sample_"))


_BY_KEY: Mapping[str, SamplerSpec] = MappingProxyType(
    {_key(spelling): spec for spec in SAMPLERS for spelling in (spec.name, spec.label, spec.scheduler)}
    | {alias: spec for alias, name in _ALIASES.items() for spec in SAMPLERS if spec.name == name}
)


def resolve_sampler(name: str) -> SamplerSpec:
    """The sampler of this name, for instance "DPM++ 2M", "dpmpp_2m" or "DPMSolverMultistepScheduler".

    A spacing may follow, as in "DPM++ 2M Karras"; it is then in the answer's `schedule`.

    Raises:
        UsageError: if there is no such sampler; the message lists the nearest names.
    """
    key = _key(name)
    if key in _BY_KEY:
        return _BY_KEY[key]
    for spacing in _SPACING_SUFFIXES:
        if key.endswith(spacing) and key.removesuffix(spacing) in _BY_KEY:
            return replace(_BY_KEY[key.removesuffix(spacing)], schedule=spacing)
    raise UsageError(
        f"sampler: expected one of {', '.join(_nearest(key))}, got {name!r}. "
        f"All samplers: {', '.join(spec.label for spec in SAMPLERS)}."
    )


def resolve_schedule(name: str | None) -> str | None:
    """The spacing of this name, one of `SCHEDULES`; None for None and for "default": the checkpoint's own.

    Raises:
        UsageError: if there is no such spacing; the message lists the nearest names.
    """
    if name is None or _key(name) in ("default", "automatic"):
        return None
    if _key(name) in SCHEDULES:
        return _key(name)
    near = difflib.get_close_matches(_key(name), SCHEDULES, cutoff=0.4) or SCHEDULES
    raise UsageError(
        f"schedule: expected one of {', '.join(near)}, got {name!r}. All schedules: default, {', '.join(SCHEDULES)}."
    )


def _nearest(key: str) -> list[str]:
    near = difflib.get_close_matches(key, _BY_KEY, n=6, cutoff=0.4) or list(_BY_KEY)
    return list(dict.fromkeys(_BY_KEY[match].label for match in near))
