"""What the tests of samplers share: diffusers' scheduler step by step, and a problem with a known solution."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch

from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.parametrisation import Array, Parametrisation
from latentrt.runtime.sampler_loop import Evaluation, drive
from latentrt.runtime.sampler_names import resolve_sampler
from latentrt.runtime.sampling_plan import plan_sampling, start_sampler
from latentrt.runtime.steps import Step, Steps

SHAPE = (2, 4, 8, 8)
# float32 on both sides with different order of operations; diffusers computes its coefficients in float32 too, where
# exp(-h) - 1 and 1 - a_t / a_prev lose digits at 50 steps.
BOUND = 1e-5

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
COUNTS = (1, 2, 5, 20, 50)


def build(scheduler: str, config: Mapping[str, Any]) -> Any:
    """A diffusers scheduler, with those of the options that it knows."""
    cls = getattr(diffusers, scheduler)
    known = set(inspect.signature(cls.__init__).parameters)
    return cls(**{name: value for name, value in config.items() if name in known})


def predict(sample: Array, timestep: float) -> Array:
    """A smooth nonlinear function of sample and timestep, float32, standing in for a U-Net."""
    mixed = 0.7 * sample + 0.2 * np.roll(sample, 1, axis=-1) + 0.1 * np.roll(sample, 1, axis=1)
    return np.asarray(np.tanh(mixed + np.sin(timestep / 200)) + 0.3 * mixed, np.float32)


class _DoubleTorch:
    """torch, in which float32 is float64: some schedulers round samples to it on the way."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@dataclass(frozen=True)
class Call:
    """One call of diffusers' `step`: what the model was told and gave, and the sample afterwards."""

    timestep: float
    model_input: Array
    prediction: Array
    sample: Array


def run_diffusers(
    scheduler: Any,
    latents: Array,
    noise: Iterator[Array],
    *,
    first_call: int = 0,
    double: bool = False,
    **step_options: Any,
) -> list[Call]:
    """Every call from `first_call` on, with the noise that would have been drawn taken from `noise`.

    `double` has a scheduler that computes its coefficients from its `sigmas` do so in float64.
    """
    if double:
        scheduler.sigmas = scheduler.sigmas.double()
    dtype = torch.float64 if double else torch.float32
    if hasattr(scheduler, "set_begin_index"):
        # Else diffusers looks the first timestep up and, where rounding gives it twice, starts at the second and
        # runs off the end: DPM-Solver++ with Karras spacing and the cosine schedule.
        scheduler.set_begin_index(first_call)

    def drawn(*_: Any, **__: Any) -> torch.Tensor:
        return torch.from_numpy(next(noise).copy()).to(dtype)

    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = drawn
    module = sys.modules[type(scheduler).__module__]
    patched = mock.patch.object(module, "randn_tensor", drawn) if hasattr(module, "randn_tensor") else nullcontext()
    sample = torch.from_numpy(np.asarray(latents).copy()).to(dtype)
    calls = []
    with patched, mock.patch.object(module, "torch", _DoubleTorch()) if double else nullcontext():
        for timestep in scheduler.timesteps[first_call:]:
            scaled = (
                scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
            )
            model_input = scaled.numpy().copy()
            prediction = predict(model_input, float(timestep))
            output = torch.from_numpy(prediction).to(dtype)
            sample = scheduler.step(output, timestep, sample, **step_options).prev_sample
            calls.append(Call(float(timestep), model_input, prediction, sample.numpy().copy()))
    return calls


def relative_l2(actual: Array, expected: Array) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def check_parity(
    sampler: str,
    config: dict[str, Any],
    count: int,
    *,
    bound: float = BOUND,
    options: Mapping[str, Any] | None = None,
    step_options: Mapping[str, Any] | None = None,
    set_timesteps: Mapping[str, Any] | None = None,
    dtype: Any = np.float32,
    timestep_tolerance: float = 1.2e-7,
    timestep_slack: float = 1e-6,
    first: int = 0,
    scheduler: Any = None,
    double: bool = False,
) -> float:
    """Feed diffusers' model outputs to the sampler; compare timesteps, model inputs and latents after every call.

    Args:
        sampler: a name that `resolve_sampler` knows.
        config: of the scheduler, for both sides.
        count: steps.
        bound: on the relative L2 of every array.
        options: of `plan_sampling`.
        step_options: of diffusers' `step`.
        set_timesteps: replaces the number of steps, for instance timesteps=[...]; passed to `plan_sampling` too.
        dtype: of our latents; float64 shows what is rounding and what is not.
        timestep_tolerance: relative, on what the model is told.
        timestep_slack: absolute, for timesteps near 0.
        first: step to start from, as for image to image; the initial latents are then compared too.
        scheduler: of `build`, to use again: some take a fifth of a second to make.
        double: compare in float64 on both sides, where only the formulas count.

    Returns:
        The worst relative L2 of latents.
    """
    dtype = np.float64 if double else dtype
    spec = resolve_sampler(sampler)
    assert spec.scheduler is not None
    if spec.name == "tcd" and "eta" not in (options or {}):
        # The default of the scheduler's `step`; ours is 0, what diffusers' pipelines pass.
        options, step_options = {**(options or {}), "eta": 0.3}, {**(step_options or {}), "eta": 0.3}
    scheduler = build(spec.scheduler, config) if scheduler is None else scheduler
    scheduler.set_timesteps(**({"num_inference_steps": count} if set_timesteps is None else dict(set_timesteps)))
    plan = plan_sampling(NoiseSchedule.from_config(config), spec, count, options=options, **dict(set_timesteps or {}))
    assert plan.init_noise_sigma == pytest.approx(float(getattr(scheduler, "init_noise_sigma", 1.0)), rel=3e-7)
    rng = np.random.default_rng(count)
    latents = np.asarray(plan.init_noise_sigma * rng.standard_normal(SHAPE), np.float32)
    noise = rng.standard_normal((4 * len(scheduler.timesteps) + 4, *SHAPE), np.float32)
    first_call = first * getattr(scheduler, "order", 1)
    if first:
        plan = plan.sliced(first)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first_call)
        clean = rng.standard_normal(SHAPE, np.float32)
        latents = plan.add_noise(clean, noise[-1])
        pair = torch.from_numpy(clean), torch.from_numpy(noise[-1])
        at_first = scheduler.timesteps[first_call : first_call + 1]
        # The flow-matching classes have another name and order for it, IPNDM has none.
        if hasattr(scheduler, "add_noise"):
            assert relative_l2(latents, scheduler.add_noise(*pair, at_first).numpy()) <= bound
        elif hasattr(scheduler, "scale_noise"):
            assert relative_l2(latents, scheduler.scale_noise(pair[0], at_first, pair[1]).numpy()) <= bound
    expected = run_diffusers(
        scheduler, latents, iter(noise), first_call=first_call, double=double, **dict(step_options or {})
    )

    queue = iter(noise)
    start = latents.astype(dtype)
    running = start_sampler(plan, start, noise=(lambda _: next(queue)) if plan.takes_noise else None)
    untouched = start.copy()
    calls = iter(expected)
    made: list[Call] = []

    def replay(evaluation: Evaluation) -> Array:
        call = next(calls)
        made.append(call)
        # Fractional timesteps come out of a logarithm: one float32 ulp.
        assert evaluation.timestep == pytest.approx(call.timestep, rel=timestep_tolerance, abs=timestep_slack)
        assert evaluation.sample.dtype == dtype
        assert relative_l2(evaluation.sample, call.model_input) <= bound
        return call.prediction.astype(dtype)

    worst = 0.0
    indices = []
    for result in drive(running, replay):
        indices.append(result.index)
        assert result.latents.dtype == dtype
        worst = max(worst, relative_l2(result.latents, made[-1].sample))
        assert worst <= bound, (result.index, worst)
    assert indices == [step.index for step in plan.steps]
    assert next(calls, None) is None, "diffusers calls the model more often"
    np.testing.assert_array_equal(start, untouched)
    return worst


MEAN, SPREAD = 0.4, 0.6
START = np.array([[[[8.0, -3.0, 0.5, 14.0]]]])
SIGMA_MAX, SIGMA_MIN = 14.6, 0.03


def log_spaced(count: int, sigma_max: float = SIGMA_MAX, sigma_min: float = SIGMA_MIN) -> Steps:
    """Steps of equal ratio."""
    sigmas = np.geomspace(sigma_max, sigma_min, count + 1).tolist()
    return tuple(Step(i, 0.0, sigmas[i], sigmas[i + 1]) for i in range(count))


def gaussian_error(solver: Callable[..., Any], steps: Steps, *, space: Any, quantity: Any = "denoised") -> float:
    """Distance from the exact flow of data drawn from N(MEAN, SPREAD^2), whose denoiser is known."""
    model = Parametrisation(space)

    def denoise(evaluation: Evaluation) -> Array:
        variance, noise = SPREAD**2, evaluation.sigma**2
        alpha, sigma_t = model.levels(evaluation.sigma)
        x = evaluation.sample / alpha
        denoised = (variance * x + noise * MEAN) / (variance + noise)
        return denoised if quantity == "denoised" else (evaluation.sample - alpha * denoised) / sigma_t

    first, last = steps[0].sigma, steps[-1].sigma_next
    shrink = math.sqrt((SPREAD**2 + last**2) / (SPREAD**2 + first**2))
    exact = MEAN + (START - MEAN) * shrink
    at_start, at_end = (model.levels(s)[0] for s in (first, last))
    *_, result = drive(solver(START * at_start, steps), denoise)
    return float(np.linalg.norm(result.latents / at_end - exact))


def check_order(
    solver: Callable[..., Any],
    order: float,
    *,
    space: Any,
    quantity: Any = "denoised",
    counts: tuple[int, ...] = (160, 320, 640),
    rel: float = 0.05,
) -> None:
    """Halving the steps' length divides the error by 2^order."""
    errors = [gaussian_error(solver, log_spaced(count), space=space, quantity=quantity) for count in counts]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=rel)
