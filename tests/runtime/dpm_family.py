"""What the tests of the DPM-Solver family share: configs, and parity in float64 and in float32."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
from sampler_oracle import BOUND, COUNTS, STABLE_DIFFUSION, build, check_parity

from latentrt.runtime import noise_schedule
from latentrt.runtime.sampler_names import resolve_sampler
from latentrt.runtime.sampler_spec import SamplerSpec

SPACINGS = ("leading", "linspace", "trailing", "karras", "exponential", "beta")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# Steps asked for and the one to start from, as for image to image: the order has to build up again there.
SLICES = ((20, 7), (5, 4))

# Of scheduler and sampler both in float64, where formulas that agree are 1e-9 apart at most (4e-11 for DEIS of order 3
# at 50 steps, whose own formulas lose digits). Six of the thousand sigmas of Stable Diffusion's schedule differ in the
# last digit of a float32 between PyTorch's square root and NumPy's on some machines; steps that meet one of them were
# 2.4e-7 apart.
FORMULAS = 5e-7


def config_of(spacing: str, **options: Any) -> dict[str, Any]:
    """Stable Diffusion's schedule, spaced so; a flow's if the spacing is "flow"."""
    timesteps = spacing in ("leading", "linspace", "trailing")
    chosen: dict[str, Any] = {"timestep_spacing": spacing} if timesteps else {f"use_{spacing}_sigmas": True}
    if spacing == "flow":
        chosen["prediction_type"] = "flow_prediction"
    return {**STABLE_DIFFUSION, **chosen, **options}


def check(
    sampler: str,
    config: dict[str, Any],
    counts: Sequence[int] = COUNTS,
    *,
    slices: Sequence[tuple[int, int]] = SLICES,
    bound: float | None = BOUND,
    formulas: float = FORMULAS,
    reuse: bool = True,
    **more: Any,
) -> None:
    """`check_parity` at several numbers of steps, with float64 on both sides and with float32.

    Args:
        sampler: its name.
        config: of both sides.
        counts: of steps.
        slices: (steps, first step).
        bound: of float32; None leaves it out, where diffusers' coefficients lose their digits.
        formulas: of float64.
        reuse: whether diffusers' scheduler is made once.
        more: of `check_parity`.
    """
    cls = str(resolve_sampler(sampler).scheduler)
    scheduler = build(cls, config)
    for count, first in (*((count, 0) for count in counts), *slices):
        for double in (True, False):
            limit = formulas if double else bound
            if limit is None:
                continue
            scheduler = scheduler if reuse else build(cls, config)
            check_parity(sampler, config, count, first=first, scheduler=scheduler, double=double, bound=limit, **more)


def missing_options(spec: SamplerSpec) -> set[str]:
    """Options of diffusers' class that a sampler neither has nor leaves to the schedule."""
    known = set(inspect.signature(getattr(diffusers, str(spec.scheduler)).__init__).parameters) - {"self"}
    return known - noise_schedule._READ - set(spec.options)


def unread_options(spec: SamplerSpec) -> set[str]:
    """Options of the schedule that diffusers' class has and a sampler does not read, or the other way round."""
    known = set(inspect.signature(getattr(diffusers, str(spec.scheduler)).__init__).parameters)
    everywhere = {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
    }
    return (known & noise_schedule._READ - everywhere) ^ spec.reads
