"""LCM, TCD, iPNDM: against diffusers' schedulers after every call; and the options that all these samplers know."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from sampler_oracle import SHAPE, STABLE_DIFFUSION, build, check_order, check_parity, gaussian_error, run_diffusers

from latentrt.runtime.errors import ConfigError, UsageError
from latentrt.runtime.noise_schedule import _READ, NoiseSchedule
from latentrt.runtime.parametrisation import Array, Parametrisation
from latentrt.runtime.sampler_loop import Sampler, drive
from latentrt.runtime.sampler_names import resolve_sampler
from latentrt.runtime.sampler_specs_discrete import DISCRETE_SAMPLERS
from latentrt.runtime.sampler_specs_flow import FLOW_SAMPLERS
from latentrt.runtime.sampling_plan import plan_sampling, start_sampler
from latentrt.runtime.solver_ipndm import iplms, ipndm
from latentrt.runtime.steps import Step, Steps

PREDICTIONS = ("epsilon", "v_prediction", "sample")
TRAINED = np.linspace(0.0008, 0.013, 1000) + 1e-4 * np.sin(np.arange(1000))
DISTILLED = ("lcm", "tcd")

# What diffusers' class keeps in its config and does not use. A config may hold it; who asks for it is told.
UNUSED = {
    "lcm": {"set_alpha_to_one"},
    "tcd": {
        "clip_sample",
        "clip_sample_range",
        "dynamic_thresholding_ratio",
        "sample_max_value",
        "set_alpha_to_one",
        "thresholding",
        "timestep_scaling",
    },
}


@pytest.mark.parametrize(
    "spec", [s for s in (*DISCRETE_SAMPLERS, *FLOW_SAMPLERS) if s.scheduler], ids=lambda spec: spec.name
)
def test_every_option_of_diffusers_is_known(spec: Any) -> None:
    theirs = set(inspect.signature(getattr(diffusers, spec.scheduler).__init__).parameters) - {"self"}
    in_config = {name for name, option in spec.options.items() if option.in_config}
    unused = UNUSED.get(spec.name, set())
    assert theirs - _READ - unused <= in_config
    assert not unused & set(spec.options)
    assert spec.reads <= theirs


@pytest.mark.parametrize("sampler", DISTILLED)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("count", [1, 2, 4, 5, 7, 13, 20, 33, 50])
def test_every_prediction_type(sampler: str, prediction_type: str, count: int) -> None:
    check_parity(sampler, {**STABLE_DIFFUSION, "prediction_type": prediction_type}, count)


@pytest.mark.parametrize("sampler", DISTILLED)
@pytest.mark.parametrize("original_inference_steps", [10, 100, 999])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_how_many_steps_a_model_was_distilled_with(sampler: str, original_inference_steps: int, count: int) -> None:
    check_parity(sampler, {**STABLE_DIFFUSION, "original_inference_steps": original_inference_steps}, count)


@pytest.mark.parametrize("sampler", DISTILLED)
@pytest.mark.parametrize("strength", [0.3, 0.55, 1.0])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_strength(sampler: str, strength: float, count: int) -> None:
    spec = resolve_sampler(sampler)
    scheduler = build(str(spec.scheduler), STABLE_DIFFUSION)
    scheduler.set_timesteps(count, strength=strength)
    options = {"strength": strength}
    plan = plan_sampling(NoiseSchedule.from_config(STABLE_DIFFUSION), spec, count, options=options)
    assert [step.timestep for step in plan.steps] == scheduler.timesteps.tolist()
    timesteps = [979, 859, 499, 339, 19]
    scheduler.set_timesteps(timesteps=timesteps, strength=strength)
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    plan = plan_sampling(schedule, spec, 1, timesteps=timesteps, options=options)
    assert [step.timestep for step in plan.steps] == list(scheduler.timesteps)


@pytest.mark.parametrize("sampler", DISTILLED)
@pytest.mark.parametrize("timesteps", [[999, 759, 499, 259], [999], [979, 859, 499, 339, 19]])
def test_given_timesteps(sampler: str, timesteps: list[int]) -> None:
    check_parity(sampler, STABLE_DIFFUSION, len(timesteps), set_timesteps={"timesteps": timesteps})


@pytest.mark.parametrize("sampler", DISTILLED)
@pytest.mark.parametrize("first", [1, 3, 6])
def test_a_slice_as_for_image_to_image(sampler: str, first: int) -> None:
    check_parity(sampler, STABLE_DIFFUSION, 8, first=first)


@pytest.mark.parametrize("sampler", DISTILLED)
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_other_schedules(sampler: str, set_alpha_to_one: bool) -> None:
    check_parity(sampler, {"trained_betas": TRAINED.tolist(), "set_alpha_to_one": set_alpha_to_one}, 5)
    # Their betas by default are those of Stable Diffusion.
    check_parity(sampler, {"_class_name": str(resolve_sampler(sampler).scheduler)}, 5)
    check_parity(sampler, {**STABLE_DIFFUSION, "timestep_spacing": "trailing", "steps_offset": 1}, 5)
    for prediction_type in PREDICTIONS[1:]:
        zero = {"rescale_betas_zero_snr": True, "prediction_type": prediction_type}
        check_parity(sampler, {**STABLE_DIFFUSION, **zero}, 5)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize(
    "correction",
    [
        {"clip_sample": True, "clip_sample_range": 1.2},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.6},
    ],
    ids=["clipped", "thresholded"],
)
def test_clipping_of_lcm(prediction_type: str, correction: dict[str, Any]) -> None:
    config = {**STABLE_DIFFUSION, "prediction_type": prediction_type, **correction}
    check_parity("lcm", config, 8)
    with pytest.raises(AssertionError):
        check_parity("lcm", config, 8, options={"clip_sample": False, "thresholding": False})


@pytest.mark.parametrize("timestep_scaling", [0.01, 1.0, 10.0])
def test_boundary_conditions_of_lcm(timestep_scaling: float) -> None:
    check_parity("lcm", {**STABLE_DIFFUSION, "timestep_scaling": timestep_scaling}, 50)


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("count", [4, 20])
def test_gamma_of_tcd(eta: float, prediction_type: str, count: int) -> None:
    config = {**STABLE_DIFFUSION, "prediction_type": prediction_type}
    check_parity("tcd", config, count, options={"eta": eta}, step_options={"eta": eta})


@pytest.mark.parametrize(("eta", "timestep"), [(0.07, 500), (0.16, 150), (0.3, 90)])
def test_gamma_of_tcd_is_multiplied_in_float32(eta: float, timestep: int) -> None:
    # In float64 the product rounds down to another timestep.
    options, timesteps = {"eta": eta}, {"timesteps": [999, timestep, 30]}
    check_parity("tcd", STABLE_DIFFUSION, 3, options=options, step_options=options, set_timesteps=timesteps)


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("ddim", {"eta": 0.5}),
        ("ddim", {}),
        ("ddpm", {}),
        ("lcm", {}),
        ("tcd", {"eta": 0.3}),
        ("tcd", {"eta": 0.0}),
        ("flow_heun", {"s_churn": 4.0}),
        ("flow_euler", {}),
    ],
)
def test_as_much_noise_is_drawn_as_in_diffusers(sampler: str, options: dict[str, Any]) -> None:
    """What is drawn afterwards from the same source, such as the next picture's noise, depends on it."""
    spec, drawn = resolve_sampler(sampler), []

    def source(shape: tuple[int, ...]) -> Array:
        drawn.append(1)
        return np.ones(shape)

    plan = plan_sampling(NoiseSchedule.from_config(STABLE_DIFFUSION), spec, 6, options=options)
    list(drive(start_sampler(plan, np.ones(SHAPE), noise=source), lambda evaluation: evaluation.sample))
    scheduler = build(str(spec.scheduler), STABLE_DIFFUSION)
    scheduler.set_timesteps(6)
    left = iter(np.ones((99, *SHAPE), np.float32))
    run_diffusers(scheduler, np.ones(SHAPE, np.float32), left, **options)
    assert len(drawn) == 99 - len(list(left))


@pytest.mark.parametrize("sampler", DISTILLED)
def test_more_steps_than_a_model_was_distilled_with_are_refused(sampler: str) -> None:
    schedule, spec = NoiseSchedule.from_config(STABLE_DIFFUSION), resolve_sampler(sampler)
    with pytest.raises(UsageError, match=r"^num_inference_steps: expected at most 50, .*, got 51"):
        plan_sampling(schedule, spec, 51)
    with pytest.raises(UsageError, match=r"^num_inference_steps: expected at most 5, .*, got 6"):
        plan_sampling(schedule, spec, 6, options={"strength": 0.1})
    with pytest.raises(UsageError, match=r"^original_inference_steps: expected at most 1000, got 1001"):
        plan_sampling(schedule, spec, 6, options={"original_inference_steps": 1001})


def test_what_diffusers_does_not_use_is_no_option() -> None:
    schedule = NoiseSchedule.from_config({**STABLE_DIFFUSION, "clip_sample": True})
    plan_sampling(schedule, resolve_sampler("tcd"), 4)
    with pytest.raises(UsageError, match=r"^clip_sample: expected an option of TCD"):
        plan_sampling(schedule, resolve_sampler("tcd"), 4, options={"clip_sample": True})


@pytest.mark.parametrize("count", [2, 3, 5, 7, 13, 20, 33, 50])
def test_iplms(count: int) -> None:
    check_parity("IPNDMScheduler", {}, count)


def test_iplms_of_one_step_is_nothing() -> None:
    scheduler = build("IPNDMScheduler", {})
    scheduler.set_timesteps(1)
    output = torch.ones(SHAPE)
    assert not scheduler.step(output, scheduler.timesteps[0], output).prev_sample.any()
    plan = plan_sampling(NoiseSchedule.from_config({}), resolve_sampler("iplms"), 1)
    *_, last = drive(start_sampler(plan, output.numpy()), lambda evaluation: evaluation.sample)
    assert not last.latents.any()


@pytest.mark.parametrize("first", [1, 2, 9])
def test_a_slice_of_iplms(first: int) -> None:
    check_parity("iplms", {}, 10, first=first)


@pytest.mark.parametrize("count", [3, 10])
def test_trained_betas_of_iplms(count: int) -> None:
    betas = np.linspace(1, 0.02, count + 1)
    # diffusers takes as many steps as there are betas, whatever it is asked for.
    config = {"trained_betas": betas.tolist(), "num_train_timesteps": count + 1}
    check_parity("iplms", config, count)
    with pytest.raises(UsageError, match=rf"^num_inference_steps: expected {count} with {count + 1} trained betas"):
        plan_sampling(NoiseSchedule.from_config(config), resolve_sampler("iplms"), count - 1)


def test_iplms_is_refused_for_a_model_of_timesteps() -> None:
    schedule = NoiseSchedule.from_config({**STABLE_DIFFUSION, "_class_name": "PNDMScheduler"})
    with pytest.raises(ConfigError, match=r"^_class_name: expected IPNDMScheduler for iPLMS.*, got PNDMScheduler"):
        plan_sampling(schedule, resolve_sampler("iplms"), 10)
    plan_sampling(NoiseSchedule.from_config({"_class_name": "IPNDMScheduler"}), resolve_sampler("iplms"), 10)
    with pytest.raises(UsageError, match=r"^timesteps: expected none with iPLMS"):
        plan_sampling(NoiseSchedule.from_config({}), resolve_sampler("iplms"), 1, timesteps=[9, 3])


def ipndm_as_published(x: Array, sigmas: list[float], denoise: Any, max_order: int) -> Array:
    """ComfyUI's `sample_ipndm`, written down from its formulas."""
    slopes: list[Array] = []
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = denoise(x, sigma)
        slopes.append((x - denoised) / sigma)
        d = slopes[::-1]
        order = min(max_order, len(slopes))
        if sigma_next == 0:
            return np.asarray(denoised)
        if order == 1:
            mean = d[0]
        elif order == 2:
            mean = (3 * d[0] - d[1]) / 2
        elif order == 3:
            mean = (23 * d[0] - 16 * d[1] + 5 * d[2]) / 12
        else:
            mean = (55 * d[0] - 59 * d[1] + 37 * d[2] - 9 * d[3]) / 24
        x = x + (sigma_next - sigma) * mean
    return x


@pytest.mark.parametrize("max_order", [1, 2, 3, 4])
@pytest.mark.parametrize("final", [0.0, 0.05])
def test_ipndm_is_the_published_method(max_order: int, final: float) -> None:
    rng = np.random.default_rng(2)
    x = 14 * rng.standard_normal(SHAPE)
    sigmas = [*np.geomspace(14, 0.1, 9).tolist(), final]
    steps = tuple(Step(i, 0.0, *pair) for i, pair in enumerate(itertools.pairwise(sigmas)))

    def denoise(sample: Array, sigma: float) -> Array:
        return np.asarray(np.tanh(sample / (1 + sigma)))

    running: Sampler = ipndm(x, steps, max_order=max_order)
    *_, last = drive(running, lambda evaluation: denoise(evaluation.sample, evaluation.sigma))
    np.testing.assert_allclose(last.latents, ipndm_as_published(x, sigmas, denoise, max_order), rtol=1e-12, atol=1e-12)


def test_ipndm_of_first_order_is_euler() -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    latents = np.random.default_rng(4).standard_normal(SHAPE)
    results = []
    for name, options in (("ipndm", {"max_order": 1}), ("euler", {})):
        plan = plan_sampling(schedule, resolve_sampler(name), 8, options=options)
        *_, last = drive(start_sampler(plan, plan.init_noise_sigma * latents), lambda e: np.tanh(e.sample))
        results.append(last.latents)
    np.testing.assert_allclose(results[0], results[1], rtol=1e-12, atol=1e-12)


def even(count: int) -> Steps:
    """Steps of equal length in sigma, for which the weights of Adams and Bashforth hold."""
    sigmas = np.linspace(14.6, 0.5, count + 1).tolist()
    return tuple(Step(i, 0.0, *pair) for i, pair in enumerate(itertools.pairwise(sigmas)))


def test_ipndm_is_of_third_order_at_least_in_even_steps() -> None:
    # Of fourth, but for its first steps of lower order, which leave an error of second: it shows at many steps.
    errors = [gaussian_error(ipndm, even(count), space="ve") for count in (160, 320, 640)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine >= 3.8
    check_order(lambda x, steps: ipndm(x, steps, max_order=1), 1, space="ve")


def test_iplms_is_of_second_order_at_least() -> None:
    # The angle atan(sigma) falls evenly: the formulas are then those of equal steps.
    def levels(count: int) -> Steps:
        sigmas = np.tan(np.linspace(1.4, 0.05, count + 1)).tolist()
        return tuple(Step(i, 0.0, *pair) for i, pair in enumerate(itertools.pairwise(sigmas)))

    errors = [gaussian_error(iplms, levels(count), space="vp", quantity="epsilon") for count in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine >= 3.8


def test_iplms_reads_v() -> None:
    plan = plan_sampling(NoiseSchedule.from_config({}), resolve_sampler("iplms"), 4)
    assert plan.model == Parametrisation("vp", "v_prediction")
