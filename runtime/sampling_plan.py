"""From a checkpoint's schedule, a sampler and a number of steps to a running sampler.

plan = plan_sampling(NoiseSchedule.from_config(config), resolve_sampler("DPM++ 2M Karras"), 20)
noise = batch_noise(seed, batch_size)
sampler = start_sampler(plan, plan.init_noise_sigma * noise(shape), noise=noise)
for result in drive(sampler, predict):
    ...
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from .errors import ConfigError, UsageError
from .noise_schedule import NoiseSchedule
from .parametrisation import Array, Parametrisation, combine
from .sampler_loop import Between, Sampler, with_model
from .sampler_names import resolve_schedule
from .sampler_options import read_options
from .sampler_spec import TIMESTEP_SPACINGS, SamplerSpec, never
from .solver_parts import BrownianSource, NoiseSource
from .steps import Given, Steps


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """What is to be done, before there is a latent.

    Attributes:
        sampler: the sampler.
        schedule: the checkpoint's, spaced as chosen, as the sampler's class of diffusers reads it.
        model: how the model's output is read.
        steps: equal to diffusers' timesteps and sigmas; PLMS has one more than asked for. Image to image takes a slice.
        init_noise_sigma: what standard normal noise is multiplied by to be the initial latent, as in diffusers.
        options: of the sampler, from the config and the caller.
    """

    sampler: SamplerSpec
    schedule: NoiseSchedule
    model: Parametrisation
    steps: Steps
    init_noise_sigma: float
    options: Mapping[str, Any] = field(default_factory=dict)

    def sliced(self, first: int, end: int | None = None) -> SamplingPlan:
        """The plan with the steps of these positions only, which keep their index."""
        return dataclasses.replace(self, steps=self.steps[first:end])

    @property
    def takes_noise(self) -> bool:
        """Whether it draws noise while it runs."""
        return self.sampler.takes_noise(self.options)

    def add_noise(self, clean: Array, noise: Array) -> Array:
        """Clean latents noised to the level at which the first step starts, as diffusers' `add_noise`."""
        alpha, sigma = self.model.levels(self.steps[0].sigma)
        return combine((alpha, clean), (sigma, noise))


def plan_sampling(
    schedule: NoiseSchedule,
    sampler: SamplerSpec,
    num_inference_steps: int,
    *,
    spacing: str | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
) -> SamplingPlan:
    """Choose the steps.

    Args:
        schedule: the checkpoint's.
        sampler: of `resolve_sampler`.
        num_inference_steps: from 1 to the number of training timesteps; not looked at if steps are given.
        spacing: one of `SCHEDULES`; overrides that of the sampler's name, which overrides the checkpoint's.
        timesteps: falling training timesteps to visit instead of spaced ones.
        sigmas: falling noise-to-signal ratios instead, the last that of the result (0 for a clean latent).
        options: of the sampler, by diffusers' names; override the config's.

    Raises:
        UsageError: if the number of steps, the spacing or an option is not possible with this sampler.
        ConfigError: if the checkpoint's schedule is not possible with this sampler.
    """
    read = schedule.as_read_by(sampler.reads)
    spaced = with_spacing(read, resolve_schedule(spacing) or sampler.schedule, sampler)
    given = _checked_given(spaced, timesteps, sigmas, flow=sampler.space == "flow")
    count = len(given) or _checked_count(spaced, num_inference_steps)
    values = read_options(
        sampler.options,
        schedule.options,
        {**sampler.preset, **(options or {})},
        own_class=schedule.class_name is not None and schedule.class_name == sampler.scheduler,
        sampler=sampler.label,
    )
    steps = sampler.steps(spaced, count, given=given, **_options_to("steps", sampler, values))
    if sampler.model is not None:
        model = sampler.model(spaced, values)
    else:
        flow = spaced.sigma_spacing == "flow" or spaced.prediction_type == "flow_prediction"
        model = Parametrisation("flow" if flow else sampler.space, spaced.prediction_type)
    if math.isinf(steps[0].sigma) and model.prediction_type == "epsilon":
        raise ConfigError(
            f"prediction_type: expected v_prediction for {sampler.label} from zero terminal SNR, got "
            f"{model.prediction_type}. Choose leading spacing, or a checkpoint trained with v prediction."
        )
    return SamplingPlan(
        sampler=sampler,
        schedule=spaced,
        model=model,
        steps=steps,
        init_noise_sigma=_init_noise_sigma(model, spaced, steps),
        options=values,
    )


def with_spacing(schedule: NoiseSchedule, name: str | None, sampler: SamplerSpec) -> NoiseSchedule:
    """The schedule with its steps spaced by one of `SCHEDULES`; unchanged for None.

    Karras and exponential spacing keep the timestep spacing of the checkpoint, which sets their extremes for Euler.

    Raises:
        UsageError: if the sampler cannot be spaced so.
    """
    spacing = resolve_schedule(name)
    if spacing is None:
        return schedule
    if spacing not in sampler.spacings:
        *first, last = sampler.spacings or ("default",)
        expected = f"{', '.join(first)} or {last}" if first else last
        raise UsageError(
            f"schedule: expected {expected} for {sampler.label}, got {spacing}. "
            "Choose one of these, or a sampler that steps through sigmas, such as DPM++ 2M."
        )
    if spacing in TIMESTEP_SPACINGS:
        return schedule.replace(timestep_spacing=spacing, sigma_spacing="timesteps")
    return schedule.replace(sigma_spacing=spacing)


def _checked_count(schedule: NoiseSchedule, count: int) -> int:
    most = schedule.num_train_timesteps
    whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
    if not (whole and 1 <= count <= most):
        raise UsageError(
            f"num_inference_steps: expected a whole number from 1 to {most}, got {count!r}. 20 to 30 are usual."
        )
    return int(count)


def _checked_given(
    schedule: NoiseSchedule, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None, *, flow: bool
) -> Given:
    if timesteps is not None and sigmas is not None:
        raise UsageError("sigmas: expected none beside timesteps, got both. Give one of them.")
    # The timesteps of a flow run from 1, not from 0.
    last = schedule.num_train_timesteps - (0 if flow else 1)
    for name, values, least, low, high in (
        ("timesteps", timesteps, 1, 0.0, float(last)),
        ("sigmas", sigmas, 2, 0.0, math.inf),
    ):
        if values is None:
            continue
        row = [float(value) for value in values]
        falling = all(a > b for a, b in pairwise(row))
        if len(row) < least or not falling or not all(low <= value <= high and value < math.inf for value in row):
            raise UsageError(
                f"{name}: expected at least {least} falling numbers from {low:g} to {high:g}, got {list(values)!r}."
            )
    return Given(
        timesteps=None if timesteps is None else tuple(float(t) for t in timesteps),
        sigmas=None if sigmas is None else tuple(float(s) for s in sigmas),
    )


def _options_to(taker: str, sampler: SamplerSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name, option in sampler.options.items() if option.to == taker}


def _init_noise_sigma(model: Parametrisation, schedule: NoiseSchedule, steps: Steps) -> float:
    if model.space in ("vp", "flow"):
        return 1.0
    sigma_max = max(step.sigma for step in steps)
    if model.space == "edm":
        return math.hypot(sigma_max, 1.0)
    return math.sqrt(sigma_max**2 + 1) if schedule.timestep_spacing == "leading" else sigma_max


def start_sampler(
    plan: SamplingPlan,
    latents: Array,
    *,
    noise: NoiseSource | None = None,
    brownian: BrownianSource | None = None,
    between: Between | None = None,
) -> Sampler:
    """A running sampler that yields the model's calls, is sent its raw output, and returns the final latent.

    Args:
        plan: of `plan_sampling`.
        latents: noise times `plan.init_noise_sigma`, (b, 4, h/8, w/8), float32. Never written to.
        noise: where a stochastic sampler takes its noise from; go on with the one that drew the initial latents.
        brownian: for the samplers whose noise is that of a Brownian motion; without it they take independent noise.
        between: changes the latents between steps, for inpainting.

    Raises:
        UsageError: if noise is needed and missing.
    """
    sampler, schedule = plan.sampler, plan.schedule
    options = {**_options_to("solver", sampler, plan.options), **sampler.from_schedule(schedule)}
    # Options that are supported in one value only are not the solver's to know.
    options = {name: value for name, value in options.items() if not _settled(sampler, name)}
    if plan.takes_noise and noise is None:
        raise UsageError(f"noise: expected a source of noise for {sampler.label}, got None. Pass it, or eta=0.")
    if sampler.takes_noise is not never:
        options["noise"] = noise
    if sampler.brownian:
        options["brownian"] = brownian
    if sampler.takes_levels:
        options["levels"] = plan.model.levels
    return with_model(
        sampler.solver(latents, plan.steps, **options),
        model=plan.model,
        quantity=sampler.quantity,
        sigma_to_timestep=_timestep_of(plan),
        correct=sampler.correction(plan.options) if sampler.correction else None,
        between=between,
    )


def _settled(sampler: SamplerSpec, name: str) -> bool:
    return name in sampler.options and len(sampler.options[name].choices) == 1


def _timestep_of(plan: SamplingPlan) -> Callable[[float], float]:
    """What the model is told at a noise level between steps."""
    continuous = plan.options.get("timestep_type") == "continuous" and plan.model.prediction_type == "v_prediction"
    if plan.model.space == "edm" or continuous:
        return lambda sigma: 0.25 * math.log(sigma)
    if plan.model.space == "flow":
        return lambda sigma: plan.model.levels(sigma)[1] * plan.schedule.num_train_timesteps
    return plan.schedule.sigma_to_timestep
