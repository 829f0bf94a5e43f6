"""The samplers by name, in every spelling users know: A1111, k-diffusion and ComfyUI, diffusers' classes.

A sampler is an entry in `SAMPLERS`: its solver, the space of its latents, how its steps are spaced, and which of the
solver's options can be set. Adding one is adding a line there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from .errors import UsageError
from .sampler_spec import SIGMA_SPACINGS, TIMESTEP_SPACINGS, SamplerSpec
from .sampler_specs_discrete import DISCRETE_SAMPLERS
from .sampler_specs_dpm import DPM_SAMPLERS
from .sampler_specs_flow import FLOW_SAMPLERS
from .sampler_specs_k import K_SAMPLERS

SAMPLERS: tuple[SamplerSpec, ...] = (*DISCRETE_SAMPLERS, *K_SAMPLERS, *DPM_SAMPLERS, *FLOW_SAMPLERS)

SCHEDULES: tuple[str, ...] = (*TIMESTEP_SPACINGS, *SIGMA_SPACINGS)
"""Spacings that `resolve_schedule` knows beside "default", which is the checkpoint's own."""

_SCHEDULE_ALIASES = {
    "align_your_steps": "ays",
    "polyexponential": "exponential",  # k-diffusion's, at its usual rho of 1
    "uniform": "linspace",
    "normal": "linspace",
}


def _key(name: str) -> str:
    """A name without case, spaces and punctuation; "++" and "pp" are the same."""
    plain = name.casefold().replace("++", "pp").removeprefix("sample_").removeprefix("k_").removesuffix("_gpu")
    return re.sub(r"[^a-z0-9]", "", plain).removesuffix("sampler")


def _by_key(specs: Sequence[SamplerSpec]) -> Mapping[str, SamplerSpec]:
    """By every spelling. The first of a class is the one that the class's name stands for."""
    table: dict[str, SamplerSpec] = {}
    for spec in specs:
        own = replace(spec, preset={**spec.preset, **spec.named}) if spec.named else spec
        for spelling in (spec.name, spec.label, *spec.aliases):
            table.setdefault(_key(spelling), own)
        if spec.scheduler is not None:
            table.setdefault(_key(spec.scheduler), spec)
    return MappingProxyType(table)


_BY_KEY = _by_key(SAMPLERS)
_SCHEDULE_BY_KEY = {_key(name): name for name in SCHEDULES} | {
    _key(alias): name for alias, name in _SCHEDULE_ALIASES.items()
}


def resolve_sampler(name: str) -> SamplerSpec:
    """The sampler of this name, for instance "DPM++ 2M", "dpmpp_2m" or "DPMSolverMultistepScheduler".

    A spacing may follow, as in "DPM++ 2M Karras"; it is then in the answer's `schedule`.

    Raises:
        UsageError: if there is no such sampler; the message lists the nearest names.
    """
    key = _key(name)
    if key in _BY_KEY:
        return _BY_KEY[key]
    for suffix, spacing in _SCHEDULE_BY_KEY.items():
        if key.endswith(suffix) and key.removesuffix(suffix) in _BY_KEY:
            return replace(_BY_KEY[key.removesuffix(suffix)], schedule=spacing)
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
    if _key(name) in _SCHEDULE_BY_KEY:
        return _SCHEDULE_BY_KEY[_key(name)]
    near = difflib.get_close_matches(_key(name), SCHEDULES, cutoff=0.4) or SCHEDULES
    raise UsageError(
        f"schedule: expected one of {', '.join(near)}, got {name!r}. All schedules: default, {', '.join(SCHEDULES)}."
    )


def _nearest(key: str) -> list[str]:
    near = difflib.get_close_matches(key, _BY_KEY, n=6, cutoff=0.4) or list(_BY_KEY)
    return list(dict.fromkeys(_BY_KEY[match].label for match in near))
