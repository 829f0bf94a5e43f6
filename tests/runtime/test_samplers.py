"""Every sampler against diffusers' scheduler after every step, and against its order of convergence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch

from latentrt.runtime.errors import UsageError
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.parametrisation import Array, alpha_sigma, from_denoised, to_denoised
from latentrt.runtime.sampler_loop import Evaluation, drive, with_model
from latentrt.runtime.sampler_names import SAMPLERS, resolve_sampler
from latentrt.runtime.samplers import ddim, dpmpp_2m, euler, euler_ancestral, plms
from latentrt.runtime.sampling_plan import SamplingPlan, plan_sampling, start_sampler
from latentrt.runtime.steps import Step, Steps
from latentrt.runtime.torch_rng import batch_noise

# diffusers hands NumPy 2 torch tensors in a way that torch does not take yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

SHAPE = (2, 4, 8, 8)
# float32 on both sides with different order of operations; diffusers computes its coefficients in float32 too, where
# exp(-h) - 1 and 1 - a_t / a_prev lose digits at 50 steps. Measured over the matrix: 3.0e-6 at most.
BOUND = 1e-5

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}

CLASSES = {
    "ddim": "DDIMScheduler",
    "plms": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}


def build(sampler: str, config: Mapping[str, Any]) -> Any:
    """The diffusers class of a sampler, with those of the options that it knows."""
    cls = getattr(diffusers, CLASSES[sampler])
    known = cls._get_init_keys(cls)
    options = {name: value for name, value in config.items() if name in known}
    return cls(**options, **({"skip_prk_steps": True} if sampler == "plms" else {}))


def predict(sample: Array, timestep: float) -> Array:
    """A smooth nonlinear function of sample and timestep, float32, standing in for a U-Net."""
    mixed = 0.7 * sample + 0.2 * np.roll(sample, 1, axis=-1) + 0.1 * np.roll(sample, 1, axis=1)
    return np.asarray(np.tanh(mixed + np.sin(timestep / 200)) + 0.3 * mixed, np.float32)


def run_diffusers(
    scheduler: Any, latents: Array, noise: Array, *, eta: float
) -> Iterator[tuple[float, Array, Array, Array]]:
    """(timestep, model input, prediction, latents afterwards) of every step; `noise[i]` is that of step i."""
    if hasattr(scheduler, "set_begin_index"):
        # Else diffusers looks the first timestep up and, where rounding gives it twice, starts at the second and
        # runs off the end: DPM-Solver++ with Karras spacing and the cosine schedule.
        scheduler.set_begin_index(0)
    sample = torch.from_numpy(np.asarray(latents))
    for i, timestep in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(sample, timestep).numpy()
        prediction = predict(model_input, float(timestep))
        output = torch.from_numpy(prediction)
        drawn = torch.from_numpy(noise[i])
        if isinstance(scheduler, diffusers.DDIMScheduler):
            options = {"variance_noise": drawn} if eta > 0 else {}
            sample = scheduler.step(output, timestep, sample, eta=eta, **options).prev_sample
        elif isinstance(scheduler, diffusers.EulerAncestralDiscreteScheduler):
            module = "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor"
            with mock.patch(module, lambda *_, drawn=drawn, **__: drawn):
                sample = scheduler.step(output, timestep, sample).prev_sample
        else:
            sample = scheduler.step(output, timestep, sample).prev_sample
        yield float(timestep), model_input, prediction, sample.numpy()


def relative_l2(actual: Array, expected: Array) -> float:
    """||actual - expected|| / ||expected||, in float64."""
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


SPACINGS = {
    "ddim": ("leading", "linspace", "trailing"),
    "plms": ("leading", "linspace", "trailing"),
    "euler": ("leading", "linspace", "trailing", "karras", "exponential"),
    "euler_ancestral": ("leading", "linspace", "trailing"),
    "dpmpp_2m": ("leading", "linspace", "trailing", "karras", "exponential"),
}
# diffusers' own limits: PNDM and Euler ancestral raise for a model that predicts the sample.
NO_SAMPLE_PREDICTION = ("plms", "euler_ancestral")


def config_of(spacing: str, **options: Any) -> dict[str, Any]:
    respaced = spacing in ("karras", "exponential")
    chosen = {f"use_{spacing}_sigmas": True} if respaced else {"timestep_spacing": spacing}
    return {**STABLE_DIFFUSION, **chosen, **options}


def check_parity(sampler: str, config: dict[str, Any], count: int, *, eta: float = 0.0, bound: float = BOUND) -> float:
    """Feed diffusers' model outputs to the sampler; compare timesteps, model inputs and latents after every step."""
    scheduler = build(sampler, config)
    scheduler.set_timesteps(count)
    plan = plan_sampling(NoiseSchedule.from_config(config), resolve_sampler(sampler), count)
    assert plan.init_noise_sigma == pytest.approx(float(scheduler.init_noise_sigma), rel=3e-7)
    rng = np.random.default_rng(count)
    latents = np.asarray(float(scheduler.init_noise_sigma) * rng.standard_normal(SHAPE), np.float32)
    noise = rng.standard_normal((len(scheduler.timesteps), *SHAPE), np.float32)
    expected = list(run_diffusers(scheduler, latents, noise, eta=eta))

    queue = iter(noise)
    takes_eta = sampler == "ddim"
    running = start_sampler(plan, latents, noise=lambda _: next(queue), eta=eta if takes_eta else None)
    untouched = latents.copy()
    worst = 0.0

    def replay(evaluation: Evaluation) -> Array:
        timestep, model_input, prediction, _ = expected[evaluation.step_index]
        # Fractional timesteps come out of a logarithm: one float32 ulp.
        assert evaluation.timestep == pytest.approx(timestep, rel=1.2e-7, abs=1e-6)
        assert evaluation.sample.dtype == np.float32
        assert relative_l2(evaluation.sample, model_input) <= bound
        return prediction

    results = list(drive(running, replay))
    assert [result.index for result in results] == list(range(len(expected)))
    for result, (_, _, _, after) in zip(results, expected, strict=True):
        assert result.latents.dtype == np.float32
        worst = max(worst, relative_l2(result.latents, after))
    assert worst <= bound
    np.testing.assert_array_equal(latents, untouched)
    return worst


MATRIX = [
    (sampler, spacing, prediction_type)
    for sampler, spacings in SPACINGS.items()
    for spacing, prediction_type in itertools.product(spacings, ("epsilon", "v_prediction", "sample"))
    if not (prediction_type == "sample" and sampler in NO_SAMPLE_PREDICTION)
]


@pytest.mark.parametrize(("sampler", "spacing", "prediction_type"), MATRIX)
@pytest.mark.parametrize("count", [1, 2, 5, 20, 50])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_latents_after_every_step(
    sampler: str, spacing: str, prediction_type: str, count: int, steps_offset: int
) -> None:
    check_parity(sampler, config_of(spacing, prediction_type=prediction_type, steps_offset=steps_offset), count)


@pytest.mark.parametrize("sampler", [spec.name for spec in SAMPLERS])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("count", [7, 30])
def test_beta_schedules(sampler: str, beta_schedule: str, count: int) -> None:
    config = {"beta_schedule": beta_schedule, "clip_sample": False, "timestep_spacing": "leading"}
    check_parity(sampler, config | {"prediction_type": "v_prediction"}, count)


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_dpm_solver_rounds_timesteps_by_the_beta_schedule(beta_schedule: str, spacing: str) -> None:
    config = config_of(spacing, beta_schedule=beta_schedule, prediction_type="v_prediction")
    check_parity("dpmpp_2m", config, 25)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("spacing", SPACINGS["ddim"])
def test_stochastic_ddim(eta: float, set_alpha_to_one: bool, spacing: str) -> None:
    check_parity("ddim", config_of(spacing, set_alpha_to_one=set_alpha_to_one, steps_offset=1), 20, eta=eta)


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_final_alpha(sampler: str, set_alpha_to_one: bool) -> None:
    check_parity(sampler, config_of("leading", set_alpha_to_one=set_alpha_to_one), 10)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("spacing", ["leading", "karras"])
@pytest.mark.parametrize("count", [10, 20])
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("euler_at_final", [True, False])
def test_final_step(sampler: str, spacing: str, count: int, lower_order_final: bool, euler_at_final: bool) -> None:
    config = config_of(spacing, lower_order_final=lower_order_final, euler_at_final=euler_at_final)
    check_parity(sampler, config | {"final_sigmas_type": "sigma_min"}, count)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral", "dpmpp_2m"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
def test_zero_terminal_snr(sampler: str, spacing: str) -> None:
    # From sigma 4096 diffusers' Euler takes x + (sigma_next - sigma) * derivative, in float32: 1.4e-5 was measured.
    config = config_of(spacing, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    check_parity(sampler, config, 20, bound=4e-5 if sampler.startswith("euler") else BOUND)


def test_the_same_seed_gives_the_ancestral_noise_of_pytorch() -> None:
    config = config_of("linspace")
    scheduler = build("euler_ancestral", config)
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


@pytest.mark.parametrize("spec", SAMPLERS, ids=lambda spec: spec.name)
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


MEAN, SPREAD = 0.4, 0.6
START = np.array([[[[8.0, -3.0, 0.5, 14.0]]]])
SIGMA_MAX, SIGMA_MIN = 14.6, 0.03


def log_spaced(count: int) -> Steps:
    sigmas = np.geomspace(SIGMA_MAX, SIGMA_MIN, count + 1).tolist()
    return tuple(Step(i, 0.0, sigmas[i], sigmas[i + 1]) for i in range(count))


def gaussian_error(solver: Any, steps: Steps, *, space: str) -> float:
    """Distance from the exact flow of data drawn from N(MEAN, SPREAD^2), whose denoiser is known."""

    def denoise(evaluation: Evaluation) -> Array:
        variance, noise = SPREAD**2, evaluation.sigma**2
        x = evaluation.sample / (alpha_sigma(evaluation.sigma)[0] if space == "vp" else 1.0)
        return (variance * x + noise * MEAN) / (variance + noise)

    first, last = steps[0].sigma, steps[-1].sigma_next
    shrink = math.sqrt((SPREAD**2 + last**2) / (SPREAD**2 + first**2))
    exact = MEAN + (START - MEAN) * shrink
    at_start, at_end = (alpha_sigma(s)[0] if space == "vp" else 1.0 for s in (first, last))
    *_, result = drive(solver(START * at_start, steps), denoise)
    return float(np.linalg.norm(result.latents / at_end - exact))


@pytest.mark.parametrize(
    ("solver", "space", "order"),
    [
        (euler, "ve", 1),
        (ddim, "vp", 1),
        (lambda x, steps: euler_ancestral(x, steps, eta=0.0), "ve", 1),
        (lambda x, steps: dpmpp_2m(x, steps, lower_order_final=False), "vp", 2),
    ],
    ids=["euler", "ddim", "euler_ancestral_eta_0", "dpmpp_2m"],
)
def test_order_of_convergence(solver: Any, space: str, order: int) -> None:
    errors = [gaussian_error(solver, log_spaced(count), space=space) for count in (160, 320, 640)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.05)


def test_plms_is_of_high_order() -> None:
    # Its first step is of second order and is not taken to zero as fast as the rest, so between 2 and 4 shows.
    def correcting(count: int) -> Steps:
        steps = log_spaced(count)
        again = Step(1, 0.0, steps[0].sigma, steps[0].sigma_next)
        return (steps[0], again, *(Step(s.index + 1, 0.0, s.sigma, s.sigma_next) for s in steps[1:]))

    errors = [gaussian_error(plms, correcting(count), space="vp") for count in (160, 320, 640)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine >= 3.8


def test_ddim_with_the_exact_epsilon_returns_the_sample_it_was_made_from() -> None:
    rng = np.random.default_rng(3)
    clean, epsilon = rng.standard_normal((2, *SHAPE))
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    plan = plan_sampling(schedule, resolve_sampler("ddim"), 10, spacing="trailing")
    alpha, sigma = alpha_sigma(plan.steps[0].sigma)
    *_, last = drive(start_sampler(plan, alpha * clean + sigma * epsilon), lambda _: epsilon)
    np.testing.assert_allclose(last.latents, clean, rtol=0, atol=1e-12)


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
    for solver in (ddim, plms, euler, euler_ancestral, dpmpp_2m):
        running = with_model(solver(latents, ()), space="vp", prediction_type="epsilon", sigma_to_timestep=float)
        assert list(drive(running, model)) == []


def test_a_slice_of_the_steps_goes_the_same_way() -> None:
    """Image to image starts in the middle, as DPM-Solver++ does there with a first-order step."""
    plan = plan_sampling(NoiseSchedule.from_config(STABLE_DIFFUSION), resolve_sampler("euler"), 6)
    results = list(drive(start_sampler(plan, np.ones(SHAPE, np.float32)), model))
    rest = list(drive(euler_slice(plan, results[2].latents), model))
    assert [result.index for result in rest] == [3, 4, 5]
    np.testing.assert_array_equal(rest[-1].latents, results[-1].latents)


def euler_slice(plan: SamplingPlan, latents: Array) -> Any:
    solver = euler(latents, plan.steps[3:])
    return with_model(solver, space="ve", prediction_type="epsilon", sigma_to_timestep=plan.schedule.sigma_to_timestep)


def test_an_evaluation_between_two_steps_gets_its_timestep_from_sigma() -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)

    def between(x: Array) -> Any:
        denoised = yield Evaluation(x, float(schedule.sigmas[400]), None, 0, x)
        return denoised

    running = with_model(
        between(np.ones(SHAPE)), space="ve", prediction_type="sample", sigma_to_timestep=schedule.sigma_to_timestep
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
