"""DDIM, DDPM and PNDM against diffusers' schedulers after every call."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from sampler_oracle import COUNTS, SHAPE, STABLE_DIFFUSION, check_order, check_parity, gaussian_error, log_spaced

from latentrt.runtime.errors import ConfigError, UsageError
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.parametrisation import Array, alpha_sigma
from latentrt.runtime.sampler_loop import drive
from latentrt.runtime.sampler_names import resolve_sampler
from latentrt.runtime.sampler_specs_discrete import DISCRETE_SAMPLERS
from latentrt.runtime.sampling_plan import SamplingPlan, plan_sampling, start_sampler
from latentrt.runtime.solver_ddim import ddim
from latentrt.runtime.solver_pndm import pndm
from latentrt.runtime.steps_pndm import PndmStep

SPACINGS = ("leading", "linspace", "trailing")
# The offset is one of leading spacing; the others leave it out.
OFFSETS = (("leading", 0), ("leading", 1), ("linspace", 1), ("trailing", 1))
PREDICTIONS = ("epsilon", "v_prediction", "sample")
ODD_COUNTS = (7, 13, 33)
# Betas that no formula gives.
TRAINED = np.linspace(0.0008, 0.013, 1000) + 1e-4 * np.sin(np.arange(1000))
# x_0 within and beyond what it is clipped to.
CLIPPED = {"clip_sample": True, "clip_sample_range": 1.2}
THRESHOLDED = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.6}
UNCLIPPED: dict[str, Any] = {"clip_sample": False}


def config_of(spacing: str, **options: Any) -> dict[str, Any]:
    return {**STABLE_DIFFUSION, "timestep_spacing": spacing, "skip_prk_steps": True, **options}


def trained(**options: Any) -> dict[str, Any]:
    return {"trained_betas": TRAINED.tolist(), "clip_sample": False, "skip_prk_steps": True, **options}


@pytest.mark.parametrize(("spacing", "steps_offset"), OFFSETS)
@pytest.mark.parametrize(
    ("sampler", "prediction_type"),
    [
        *itertools.product(["ddim", "ddpm"], PREDICTIONS),
        *itertools.product(["plms"], PREDICTIONS[:2]),  # diffusers' PNDM refuses a model that predicts the sample
    ],
)
@pytest.mark.parametrize("count", COUNTS)
def test_every_spacing(sampler: str, spacing: str, prediction_type: str, count: int, steps_offset: int) -> None:
    check_parity(sampler, config_of(spacing, prediction_type=prediction_type, steps_offset=steps_offset), count)


@pytest.mark.parametrize("count", ODD_COUNTS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "plms"])
def test_odd_counts(sampler: str, spacing: str, count: int) -> None:
    check_parity(sampler, config_of(spacing, steps_offset=1), count)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "plms"])
@pytest.mark.parametrize("count", [5, 20])
def test_trained_betas(sampler: str, count: int) -> None:
    check_parity(sampler, trained(), count)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "plms"])
@pytest.mark.parametrize("first", [1, 2, 7, 19])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_slice_as_for_image_to_image(sampler: str, first: int, spacing: str) -> None:
    check_parity(sampler, config_of(spacing, steps_offset=1), 20, first=first)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_stochastic_ddim(eta: float, set_alpha_to_one: bool, spacing: str) -> None:
    config = config_of(spacing, set_alpha_to_one=set_alpha_to_one, steps_offset=1)
    check_parity("ddim", config, 20, options={"eta": eta}, step_options={"eta": eta})


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_final_alpha(sampler: str, set_alpha_to_one: bool) -> None:
    check_parity(sampler, config_of("leading", set_alpha_to_one=set_alpha_to_one), 10)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_snr(sampler: str, spacing: str, prediction_type: str) -> None:
    check_parity(sampler, config_of(spacing, rescale_betas_zero_snr=True, prediction_type=prediction_type), 20)


@pytest.mark.parametrize("correction", [CLIPPED, THRESHOLDED], ids=["clipped", "thresholded"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_clipping(sampler: str, prediction_type: str, correction: dict[str, Any], spacing: str) -> None:
    config = config_of(spacing, prediction_type=prediction_type, **correction)
    check_parity(sampler, config, 20)
    with pytest.raises(AssertionError):
        check_parity(sampler, config, 20, options={"clip_sample": False, "thresholding": False})


@pytest.mark.parametrize("correction", [CLIPPED, THRESHOLDED, UNCLIPPED], ids=["clipped", "thresholded", "as it is"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_with_clipped_model_output(prediction_type: str, correction: dict[str, Any], eta: float) -> None:
    options = {"use_clipped_model_output": True, "eta": eta}
    config = config_of("trailing", prediction_type=prediction_type, **correction)
    check_parity("ddim", config, 20, options=options, step_options=options)


@pytest.mark.parametrize(("sampler", "scheduler"), [("ddim", "DDIMScheduler"), ("ddpm", "DDPMScheduler")])
def test_a_config_of_their_own_that_is_silent_clips(sampler: str, scheduler: str) -> None:
    silent = {name: value for name, value in STABLE_DIFFUSION.items() if name != "clip_sample"}
    check_parity(sampler, silent | {"_class_name": scheduler}, 10)
    own = plan_sampling(NoiseSchedule.from_config(silent | {"_class_name": scheduler}), resolve_sampler(sampler), 10)
    other = plan_sampling(NoiseSchedule.from_config(silent), resolve_sampler(sampler), 10)
    assert (own.options["clip_sample"], other.options["clip_sample"]) == (True, False)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_variance_of_ddpm(variance_type: str, steps_offset: int) -> None:
    check_parity("ddpm", config_of("leading", variance_type=variance_type, steps_offset=steps_offset), 20)


def run(plan: SamplingPlan, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    running = start_sampler(plan, rng.standard_normal(SHAPE), noise=rng.standard_normal)
    *_, last = drive(running, lambda evaluation: np.tanh(evaluation.sample))
    return last.latents


def test_the_logarithm_of_a_variance_is_the_variance() -> None:
    # diffusers takes the square root of a negative logarithm for fixed_large_log, which is NaN.
    schedule = NoiseSchedule.from_config(config_of("leading"))
    plans = [
        plan_sampling(schedule, resolve_sampler("ddpm"), 10, options={"variance_type": kind})
        for kind in ("fixed_large", "fixed_large_log")
    ]
    np.testing.assert_array_equal(run(plans[0]), run(plans[1]))


def test_a_learned_variance_is_refused() -> None:
    schedule = NoiseSchedule.from_config(config_of("leading", variance_type="learned"))
    with pytest.raises(ConfigError, match=r"^variance_type: expected 'fixed_small' or .*, got 'learned'"):
        plan_sampling(schedule, resolve_sampler("ddpm"), 10)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("timesteps", [[999, 850, 700, 320, 100, 11], [500], [30, 20, 10, 0]])
def test_ddpm_with_given_timesteps(timesteps: list[int], prediction_type: str) -> None:
    config = config_of("leading", prediction_type=prediction_type)
    check_parity("ddpm", config, len(timesteps), set_timesteps={"timesteps": timesteps})


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_given_timesteps_that_are_those_of_the_spacing(sampler: str, set_alpha_to_one: bool) -> None:
    """diffusers' DDIM and PNDM take none: where ours are given, each step leads to the next of them."""
    schedule = NoiseSchedule.from_config(config_of("leading", set_alpha_to_one=set_alpha_to_one))
    counted = plan_sampling(schedule, resolve_sampler(sampler), 10)
    timesteps = sorted({step.timestep for step in counted.steps}, reverse=True)
    given = plan_sampling(schedule, resolve_sampler(sampler), 1, timesteps=timesteps)
    np.testing.assert_array_equal(run(given), run(counted))


def test_given_timesteps_lead_from_one_to_the_next() -> None:
    schedule = NoiseSchedule.from_config(config_of("leading"))
    steps = plan_sampling(schedule, resolve_sampler("ddim"), 1, timesteps=[900, 500, 7]).steps
    assert [step.sigma_next for step in steps[:-1]] == [step.sigma for step in steps[1:]]
    assert steps[-1].sigma_next == 0


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "plms", "lcm", "tcd"])
def test_given_sigmas_are_refused(sampler: str) -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    with pytest.raises(UsageError, match=r"^sigmas: expected none with a sampler that visits whole timesteps"):
        plan_sampling(schedule, resolve_sampler(sampler), 3, sigmas=[10.0, 3.0, 0.0])


@pytest.mark.parametrize("spec", [s for s in DISCRETE_SAMPLERS if s.space == "vp"], ids=lambda spec: spec.name)
def test_a_model_of_a_flow_is_refused(spec: Any) -> None:
    schedule = NoiseSchedule.from_config({"prediction_type": "flow_prediction", "_class_name": "DDIMScheduler"})
    with pytest.raises(ConfigError, match=r"^(prediction_type|_class_name): expected "):
        plan_sampling(schedule, spec, 4)


@pytest.mark.parametrize(("spacing", "steps_offset"), OFFSETS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("count", [4, 5, 7, 20])
def test_pndm_with_its_runge_kutta_steps(spacing: str, prediction_type: str, count: int, steps_offset: int) -> None:
    config = config_of(spacing, prediction_type=prediction_type, steps_offset=steps_offset, skip_prk_steps=False)
    check_parity("plms", config, count)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_runge_kutta_steps_with_either_final_alpha(set_alpha_to_one: bool) -> None:
    check_parity("plms", config_of("leading", skip_prk_steps=False, set_alpha_to_one=set_alpha_to_one), 10)
    check_parity("plms", trained(skip_prk_steps=False, set_alpha_to_one=set_alpha_to_one), 10)


def test_a_pndm_config_that_is_silent_warms_up() -> None:
    check_parity("PNDMScheduler", {**STABLE_DIFFUSION, "_class_name": "PNDMScheduler"}, 10)


@pytest.mark.parametrize(("count", "options"), [(3, {}), (1, {}), (0, {"timesteps": [999, 800, 600, 400, 200]})])
def test_runge_kutta_steps_that_are_not_possible(count: int, options: dict[str, Any]) -> None:
    schedule = NoiseSchedule.from_config(config_of("leading", skip_prk_steps=False))
    with pytest.raises(UsageError, match=r"^skip_prk_steps: expected true with "):
        plan_sampling(schedule, resolve_sampler("plms"), count, **options)


def test_a_runge_kutta_step_is_not_divided() -> None:
    # diffusers then goes on as if it had started at the first timestep.
    schedule = NoiseSchedule.from_config(config_of("leading", skip_prk_steps=False))
    plan = plan_sampling(schedule, resolve_sampler("plms"), 10)
    with pytest.raises(UsageError, match=r"^steps: expected a slice that does not divide a Runge-Kutta step"):
        run(plan.sliced(3))
    assert np.isfinite(run(plan.sliced(4))).all()
    assert np.isfinite(run(plan.sliced(14))).all()


def test_ddim_is_of_first_order() -> None:
    check_order(ddim, 1, space="vp", quantity="epsilon")


def test_plms_is_of_high_order() -> None:
    # Its first step is of second order and is not taken to zero as fast as the rest, so between 2 and 4 shows.
    def correcting(count: int) -> tuple[PndmStep, ...]:
        plain = [
            PndmStep(s.index, 0.0, s.sigma, s.sigma_next, before=s.sigma, after=s.sigma_next) for s in log_spaced(count)
        ]
        again = PndmStep(1, 0.0, plain[0].after, plain[0].after, before=plain[0].sigma, after=0.0)
        return (plain[0], again, *plain[1:])

    errors = [gaussian_error(pndm, correcting(count), space="vp", quantity="epsilon") for count in (160, 320, 640)]
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


def test_ddim_of_full_noise_is_ddpm() -> None:
    schedule = NoiseSchedule.from_config(config_of("leading"))
    plans = [
        plan_sampling(schedule, resolve_sampler("ddim"), 10, options={"eta": 1.0}),
        plan_sampling(schedule, resolve_sampler("ddpm"), 10),
    ]
    np.testing.assert_allclose(run(plans[0]), run(plans[1]), rtol=1e-9, atol=1e-9)
