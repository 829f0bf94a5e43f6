"""The loop around every sampler: names to running samplers, the model's parametrisation, leaving early, slices."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from sampler_oracle import BOUND, SHAPE, STABLE_DIFFUSION, build, check_parity, predict, relative_l2

from latentrt.runtime.errors import UsageError
from latentrt.runtime.noise import batch_noise
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.parametrisation import Array, Parametrisation, alpha_sigma, from_denoised, to_denoised
from latentrt.runtime.sampler_loop import Evaluation, drive, with_model
from latentrt.runtime.sampler_names import SAMPLERS, resolve_sampler
from latentrt.runtime.sampling_plan import SamplingPlan, plan_sampling, start_sampler


def keys_of(spec: Any) -> set[str]:
    """The options of a sampler's diffusers class; none where diffusers has none, or lacks what it needs here."""
    if spec.scheduler is None:
        return set()
    return set(inspect.signature(getattr(diffusers, spec.scheduler).__init__).parameters) - {"self"}


@pytest.mark.parametrize(
    "sampler", [s.name for s in SAMPLERS if {"beta_schedule", "timestep_spacing"} <= keys_of(s) and not s.preset]
)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("count", [7, 30])
def test_beta_schedules(sampler: str, beta_schedule: str, count: int) -> None:
    config = {"beta_schedule": beta_schedule, "clip_sample": False, "timestep_spacing": "leading"}
    config |= {"skip_prk_steps": True, "beta_start": 0.0001, "beta_end": 0.02}
    # Between two steps DPM2 finds its timestep by logarithms, which diffusers takes in float32.
    tolerance, slack = (1e-6, 2e-4) if sampler.startswith("dpm_2") else (1.2e-7, 1e-6)
    config |= {"prediction_type": "v_prediction"}
    check_parity(sampler, config, count, timestep_tolerance=tolerance, timestep_slack=slack)


def test_the_same_seed_gives_the_ancestral_noise_of_pytorch() -> None:
    config = STABLE_DIFFUSION
    scheduler = build("EulerAncestralDiscreteScheduler", config)
    scheduler.set_timesteps(6)
    generator = torch.Generator("cpu").manual_seed(11)
    sample = torch.randn((1, *SHAPE[1:]), generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        prediction = predict(scheduler.scale_model_input(sample, timestep).numpy(), float(timestep))
        sample = scheduler.step(torch.from_numpy(prediction), timestep, sample, generator=generator).prev_sample

    plan = plan_sampling(NoiseSchedule.from_config(config), resolve_sampler("Euler a"), 6)
    noise = batch_noise(11, 1)
    latents = np.float32(plan.init_noise_sigma) * noise((1, *SHAPE[1:]))
    # Here the two models are each called with their own latents, so differences are carried on.
    assert relative_l2(run_to_end(plan, latents, noise=noise), sample.numpy()) <= 2 * BOUND


def model(evaluation: Evaluation) -> Array:
    assert evaluation.timestep is not None
    return predict(evaluation.sample, evaluation.timestep)


def run_to_end(plan: SamplingPlan, latents: Array, **options: Any) -> Array:
    *_, last = drive(start_sampler(plan, latents, **options), model)
    return last.latents


@pytest.mark.parametrize("spec", [s for s in SAMPLERS if "leading" in s.spacings], ids=lambda spec: spec.name)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_parametrisation_is_only_a_parametrisation(spec: Any, prediction_type: Any) -> None:
    """The same denoiser, said in epsilon and in another form, gives the same latents."""
    if spec.name == "plms" and prediction_type == "v_prediction":
        pytest.skip("diffusers' PNDM extrapolates v itself for such a model, which is another method")
    latents = np.random.default_rng(0).standard_normal(SHAPE)
    final = []
    for kind in ("epsilon", prediction_type):
        schedule = NoiseSchedule.from_config(STABLE_DIFFUSION | {"prediction_type": kind})
        plan = plan_sampling(schedule, spec, 12, spacing="leading")

        def say(evaluation: Evaluation, kind: Any = kind) -> Array:
            sample, sigma = evaluation.sample, evaluation.sigma
            return from_denoised(to_denoised(model(evaluation), sample, sigma, "epsilon"), sample, sigma, kind)

        rng = np.random.default_rng(1)
        *_, last = drive(start_sampler(plan, plan.init_noise_sigma * latents, noise=rng.standard_normal), say)
        final.append(last.latents)
    np.testing.assert_allclose(final[1], final[0], rtol=1e-9, atol=1e-9)


def test_the_loop_returns_the_last_latents_and_can_be_left() -> None:
    plan = plan_sampling(NoiseSchedule.from_config(STABLE_DIFFUSION), resolve_sampler("euler"), 4)
    latents = np.ones(SHAPE, np.float32)
    running = start_sampler(plan, latents)
    loop = drive(running, model)
    next(loop)
    loop.close()
    with pytest.raises(StopIteration):
        next(running)

    def returned() -> Any:
        return (yield from drive(start_sampler(plan, latents), model))

    generator, seen = returned(), []
    try:
        while True:
            seen.append(next(generator).latents)
    except StopIteration as done:
        np.testing.assert_array_equal(done.value, seen[-1])
    assert len(seen) == 4


def test_no_steps_leave_the_latents_as_they_are() -> None:
    latents = np.ones(SHAPE, np.float32)
    for spec in SAMPLERS:
        plan = plan_sampling(NoiseSchedule.from_config(STABLE_DIFFUSION), spec, 4)
        running = start_sampler(dataclasses.replace(plan, steps=()), latents, noise=np.ones)
        assert list(drive(running, model)) == []


def test_a_slice_of_the_steps_goes_the_same_way() -> None:
    """Image to image starts in the middle, as DPM-Solver++ does there with a first-order step."""
    plan = plan_sampling(NoiseSchedule.from_config(STABLE_DIFFUSION), resolve_sampler("euler"), 6)
    results = list(drive(start_sampler(plan, np.ones(SHAPE, np.float32)), model))
    rest = list(drive(start_sampler(plan.sliced(3), results[2].latents), model))
    assert [result.index for result in rest] == [3, 4, 5]
    np.testing.assert_array_equal(rest[-1].latents, results[-1].latents)


def test_an_evaluation_between_two_steps_gets_its_timestep_from_sigma() -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)

    def between(x: Array) -> Any:
        denoised = yield Evaluation(x, float(schedule.sigmas[400]), None, 0, x)
        return denoised

    running = with_model(
        between(np.ones(SHAPE)),
        model=Parametrisation("ve", "sample"),
        sigma_to_timestep=schedule.sigma_to_timestep,
    )
    evaluation = next(running)
    assert evaluation.timestep == pytest.approx(400, abs=1e-3)
    np.testing.assert_allclose(evaluation.sample, alpha_sigma(evaluation.sigma)[0], rtol=1e-12)


def test_a_prediction_of_another_shape_is_refused() -> None:
    plan = plan_sampling(NoiseSchedule.from_config(STABLE_DIFFUSION), resolve_sampler("ddim"), 2)
    running = start_sampler(plan, np.ones(SHAPE, np.float32))
    next(running)
    with pytest.raises(UsageError, match=r"prediction: expected shape \(2, 4, 8, 8\), got \(1, 4, 8, 8\)"):
        running.send(np.ones((1, 4, 8, 8), np.float32))
