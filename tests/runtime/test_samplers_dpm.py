"""Multistep DPM-Solver and DPM-Solver++, against diffusers after every call, k-diffusion's formula, and their order."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from dpm_family import PREDICTIONS, SPACINGS, check, config_of, missing_options, unread_options
from sampler_oracle import BOUND, STABLE_DIFFUSION, build, check_order, check_parity, log_spaced

from latentrt.runtime.errors import ConfigError, UsageError
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.parametrisation import Array, Parametrisation
from latentrt.runtime.sampler_loop import Evaluation, drive
from latentrt.runtime.sampler_names import resolve_sampler
from latentrt.runtime.sampler_spec import SamplerSpec
from latentrt.runtime.sampler_specs_dpm import DPM_SAMPLERS
from latentrt.runtime.sampling_plan import plan_sampling, start_sampler
from latentrt.runtime.solver_dpm import dpm_multistep, dpm_solver_multistep
from latentrt.runtime.solver_dpmpp import dpmpp_multistep
from latentrt.runtime.steps import Steps

# diffusers warns of its algorithm types dpmsolver and sde-dpmsolver, which go on working.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")

# By this name the config's options decide; "DPM++ 2M" is the second-order method whatever a config says.
CLASS = "DPMSolverMultistepScheduler"

# exp(-2h) - 1 and sqrt(1 - exp(-2h)) of steps that are close lose digits in diffusers' float32: 3e-5 was measured.
STOCHASTIC = 5 * BOUND


@pytest.mark.parametrize("spec", DPM_SAMPLERS, ids=lambda spec: spec.name)
def test_every_option_of_diffusers_is_known(spec: SamplerSpec) -> None:
    assert missing_options(spec) == set()
    assert unread_options(spec) == set()


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_dpmpp_2m(spacing: str, prediction_type: str) -> None:
    check(CLASS, config_of(spacing, prediction_type=prediction_type), (1, 2, 5, 13, 20, 50))


@pytest.mark.parametrize("spacing", ["leading", "karras", "beta"])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (CLASS, {"solver_order": 1}),
        ("dpmpp_3m", {}),
        (CLASS, {"solver_type": "heun"}),
        (CLASS, {"solver_type": "bh2"}),
        (CLASS, {"algorithm_type": "deis", "final_sigmas_type": "sigma_min"}),
    ],
)
def test_orders_and_types(sampler: str, options: dict[str, Any], spacing: str) -> None:
    # The names' presets are options of diffusers' config.
    config = config_of(spacing, **resolve_sampler(sampler).preset, **options)
    check(sampler, config, (2, 7, 20), slices=((20, 18), (14, 11)))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "karras", "beta"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["dpm_solver_1", "dpm_solver_2", "dpm_solver_3"])
def test_dpm_solver(sampler: str, prediction_type: str, spacing: str) -> None:
    preset = resolve_sampler(sampler).preset
    config = config_of(spacing, prediction_type=prediction_type, final_sigmas_type="sigma_min", **preset)
    check(sampler, config, (1, 5, 20), slices=((14, 11),), bound=BOUND if prediction_type == "epsilon" else None)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras", "beta"])
@pytest.mark.parametrize("options", [{}, {"solver_type": "heun"}, {"solver_order": 1}, {"solver_order": 3}])
def test_sde_of_dpmpp(options: dict[str, Any], spacing: str) -> None:
    config = config_of(spacing, algorithm_type="sde-dpmsolver++", **options)
    check("DPMSolverMultistepScheduler", config, (2, 7, 20), slices=((20, 7),), bound=STOCHASTIC)


@pytest.mark.parametrize("spacing", ["leading", "karras"])
@pytest.mark.parametrize("options", [{}, {"solver_type": "heun"}, {"solver_order": 1}])
def test_sde_of_dpm_solver(options: dict[str, Any], spacing: str) -> None:
    # diffusers fails with order 3: there is no update for it.
    config = config_of(spacing, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min", **options)
    check("DPMSolverMultistepScheduler", config, (2, 7, 20), slices=((20, 7),), bound=STOCHASTIC)


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "dpmpp_2m_sde_heun"])
def test_named_sdes_are_diffusers_sdes(sampler: str) -> None:
    config = config_of("karras", **resolve_sampler(sampler).preset)
    check(sampler, config, (5, 20), bound=STOCHASTIC)


@pytest.mark.parametrize("spacing", ["leading", "karras"])
@pytest.mark.parametrize("solver_order", [2, 3])
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("euler_at_final", [True, False])
def test_final_steps(spacing: str, solver_order: int, lower_order_final: bool, euler_at_final: bool) -> None:
    ends = {"lower_order_final": lower_order_final, "euler_at_final": euler_at_final, "solver_order": solver_order}
    for final_sigmas_type in ("sigma_min", "zero"):
        config = config_of(spacing, final_sigmas_type=final_sigmas_type, **ends)
        check(CLASS, config, (1, 2, 14, 15), slices=((14, 11),), bound=None)


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize(
    "options", [{}, {"flow_shift": 3.0}, {"solver_order": 3}, {"algorithm_type": "sde-dpmsolver++"}]
)
def test_flow(options: dict[str, Any], final_sigmas_type: str) -> None:
    config = config_of("flow", final_sigmas_type=final_sigmas_type, **options)
    stochastic = "algorithm_type" in options
    check("DPMSolverMultistepScheduler", config, (1, 2, 5, 20, 50), bound=STOCHASTIC if stochastic else BOUND)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
def test_flow_levels_with_a_model_of_noise(prediction_type: str) -> None:
    check(CLASS, config_of("flow") | {"prediction_type": prediction_type}, (5, 20))


def test_dynamic_shift() -> None:
    config = config_of("flow", use_dynamic_shifting=True)
    scheduler = build("DPMSolverMultistepScheduler", config)
    scheduler.set_timesteps = functools.partial(scheduler.set_timesteps, mu=0.7)
    check_parity(CLASS, config, 8, scheduler=scheduler, options={"mu": 0.7})
    unshifted = NoiseSchedule.from_config(config_of("flow"))
    with pytest.raises(UsageError, match=r"^mu: expected none"):
        plan_sampling(unshifted, resolve_sampler(CLASS), 8, options={"mu": 0.7})


@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("count", [7, 13, 33])
def test_steps_offset(count: int, steps_offset: int) -> None:
    check(CLASS, config_of("leading", steps_offset=steps_offset), (count,), slices=((count, 1), (count, count - 1)))


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
def test_timesteps_are_rounded_by_the_beta_schedule(beta_schedule: str, spacing: str) -> None:
    config = config_of(spacing, beta_schedule=beta_schedule, prediction_type="v_prediction")
    check(CLASS, config, (25,), slices=())


@pytest.mark.parametrize("beta_schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_lu_lambdas(beta_schedule: str) -> None:
    config = config_of("linspace", use_lu_lambdas=True, beta_schedule=beta_schedule, prediction_type="v_prediction")
    check(CLASS, config)


@pytest.mark.parametrize("lambda_min_clipped", [-5.1, "-Infinity"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_clipped_lambdas(spacing: str, lambda_min_clipped: Any) -> None:
    config = config_of(spacing, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    scheduler = build("DPMSolverMultistepScheduler", config | {"lambda_min_clipped": float(lambda_min_clipped)})
    for count in (5, 20):
        check_parity(CLASS, config | {"lambda_min_clipped": lambda_min_clipped}, count, scheduler=scheduler)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
def test_zero_terminal_snr(spacing: str) -> None:
    check(CLASS, config_of(spacing, rescale_betas_zero_snr=True, prediction_type="v_prediction"))


@pytest.mark.parametrize("sampler", [CLASS, "dpm_solver_2"])
def test_thresholding(sampler: str) -> None:
    preset = resolve_sampler(sampler).preset
    config = config_of("leading", thresholding=True, sample_max_value=1.5, final_sigmas_type="sigma_min", **preset)
    check(sampler, config, (5, 20))


def test_trained_betas() -> None:
    betas = np.geomspace(1e-4, 0.02, 700).tolist()
    config = {"trained_betas": betas, "num_train_timesteps": 700}
    check(CLASS, config, (5, 20))
    check(CLASS, config | {"use_karras_sigmas": True}, (5, 20))


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize(
    ("timesteps", "bound"),
    # From 400 to 399 exp(-h) - 1 keeps three digits in diffusers' float32: 3.5e-5 was measured.
    [([999, 750, 400, 399, 20, 1], 5 * BOUND), ([999, 750, 400, 300, 20, 1], BOUND), ([500], BOUND), ([981, 0], BOUND)],
)
def test_timesteps_of_the_user(timesteps: list[int], bound: float, final_sigmas_type: str) -> None:
    config = config_of("leading", final_sigmas_type=final_sigmas_type)
    check(CLASS, config, (0,), slices=(), bound=bound, set_timesteps={"timesteps": timesteps})


def test_a_slice_without_the_end_takes_its_order_from_the_whole() -> None:
    """As where a refiner takes over: diffusers does not lower the order of the last step before."""
    schedule = NoiseSchedule.from_config(config_of("leading"))
    plan = plan_sampling(schedule, resolve_sampler(CLASS), 10)
    latents = np.random.default_rng(0).standard_normal((1, 4, 4, 4), np.float32)

    def results(steps: Steps) -> list[Array]:
        solver = dpm_multistep(latents, steps)
        return [result.latents for result in drive(solver, lambda e: smooth(e.sample, e.sigma))]

    np.testing.assert_array_equal(results(plan.sliced(0, 6).steps)[-1], results(plan.steps)[5])


REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    (CLASS, {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "zero"}, "final_sigmas_type: expected sigma"),
    (CLASS, {"algorithm_type": "sde-dpmsolver", "solver_order": 3}, "solver_order: expected 1 or 2"),
    (CLASS, {"solver_order": 4}, "solver_order: expected a whole number from 1 to 3, got 4"),
    (CLASS, {"solver_type": "euler"}, "solver_type: expected 'midpoint' or 'heun'"),
    (CLASS, {"variance_type": "learned_range"}, "variance_type: expected None or 'fixed_small'"),
    (CLASS, {"prediction_type": "flow_prediction"}, "use_flow_sigmas: expected true"),
    (CLASS, {"use_flow_sigmas": True, "prediction_type": "v_prediction"}, "prediction_type: expected flow"),
    (CLASS, {"use_flow_sigmas": True, "time_shift_type": "linear"}, "time_shift_type: expected 'exponential'"),
    ("dpmpp_2s", {"algorithm_type": "sde-dpmsolver"}, "algorithm_type: expected"),
    ("deis", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type: expected 'deis'"),
    ("uni_pc", {"solver_p": "DDIM"}, "solver_p: expected None"),
    ("uni_pc", {"disable_corrector": 3}, "disable_corrector: expected a list"),
    ("uni_pc", {"shift_terminal": 0.1}, "shift_terminal: expected none without use_flow_sigmas"),
    ("sa_solver", {"tau_func": "default"}, "tau_func: expected a function"),
    ("sa_solver", {"predictor_order": 5}, "predictor_order: expected a whole number from 1 to 4"),
    ("edm_dpmpp_2m", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order: expected 1 or 2"),
    ("edm_dpmpp_2m", {"prediction_type": "sample"}, "prediction_type: expected epsilon or v_prediction"),
)


@pytest.mark.parametrize(("sampler", "options", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(sampler: str, options: dict[str, Any], message: str) -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION | options)
    with pytest.raises(ConfigError, match=f"^{message}"):
        plan_sampling(schedule, resolve_sampler(sampler), 5)


def test_variance_types_of_other_schedulers_are_taken() -> None:
    check(CLASS, config_of("leading", variance_type="fixed_small"), (5,))


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("DPM++ 2M", "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("sample_dpmpp_2m_sde", "dpmpp_2m_sde"),
        ("DPM++ 2M SDE Heun", "dpmpp_2m_sde_heun"),
        ("DPM++ 3M", "dpmpp_3m"),
        ("dpm_solver_2", "dpm_solver_2"),
        ("DPMSolverSinglestepScheduler", "dpmpp_2s"),
        ("DPM++ 3S", "dpmpp_3s"),
        ("DEISMultistepScheduler", "deis"),
        ("unipc", "uni_pc"),
        ("uni_pc_bh2", "uni_pc_bh2"),
        ("SA-Solver", "sa_solver"),
        ("EDMDPMSolverMultistepScheduler", "edm_dpmpp_2m"),
    ],
)
def test_names(name: str, sampler: str) -> None:
    assert resolve_sampler(name).name == sampler


def smooth(x: Array, sigma: float) -> Array:
    """A denoiser in float64."""
    return np.asarray(np.tanh(0.7 * x + np.sin(sigma)) + 0.1 * x)


def sample_dpmpp_2m_sde(
    x: Array, sigmas: list[float], noise: Sequence[Array], *, eta: float, s_noise: float, heun: bool
) -> Array:
    """k-diffusion's formula, variance exploding, written out."""
    before, h_before = None, math.nan
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        denoised = smooth(x, sigma)
        if following == 0:
            return denoised
        h = math.log(sigma) - math.log(following)
        length = h + eta * h
        x_next = following / sigma * math.exp(-eta * h) * x + (1 - math.exp(-length)) * denoised
        if before is not None:
            slope = (denoised - before) * h / h_before
            x_next = x_next + slope * ((math.exp(-length) - 1) / length + 1 if heun else (1 - math.exp(-length)) / 2)
        x = x_next + noise[i] * following * math.sqrt(1 - math.exp(-2 * eta * h)) * s_noise
        before, h_before = denoised, h
    return x


@pytest.mark.parametrize("brownian", [False, True])
@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.6, 1.1), (0.0, 1.0)])
def test_dpmpp_2m_sde_of_k_diffusion(eta: float, s_noise: float, heun: bool, brownian: bool) -> None:
    sampler = "DPM++ 2M SDE Heun Karras" if heun else "DPM++ 2M SDE Karras"
    options = {"eta": eta, "s_noise": s_noise}
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    plan = plan_sampling(schedule, resolve_sampler(sampler), 12, options=options)
    sigmas = [*(step.sigma for step in plan.steps), 0.0]
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 4, 4, 4))
    noise = [rng.standard_normal(x.shape) for _ in plan.steps]
    expected = sample_dpmpp_2m_sde(x * math.hypot(1, sigmas[0]), sigmas, noise, eta=eta, s_noise=s_noise, heun=heun)

    queue, asked = iter(noise), []

    def between(sigma: float, sigma_next: float) -> Array:
        asked.append((sigma, sigma_next))
        return next(queue)

    source: dict[str, Any] = {"noise": lambda _: next(queue)}
    if brownian:
        source |= {"brownian": between, "noise": lambda _: pytest.fail("drew independent noise")}
    if eta == 0:
        assert not plan.takes_noise

    def answer(evaluation: Evaluation) -> Array:
        alpha, sigma_t = plan.model.levels(evaluation.sigma)
        denoised = smooth(evaluation.sample / alpha, evaluation.sigma)
        return (evaluation.sample - alpha * denoised) / sigma_t

    *_, result = drive(start_sampler(plan, x, **source), answer)
    np.testing.assert_allclose(result.latents, expected, rtol=0, atol=1e-9)
    if brownian and eta:
        assert asked == list(itertools.pairwise(sigmas[:-1]))


def run(solver: Any, count: int = 12) -> Array:
    x = np.random.default_rng(5).standard_normal((1, 4, 4, 4))
    *_, result = drive(solver(x, log_spaced(count)), lambda e: smooth(e.sample, e.sigma))
    return result.latents


def test_limits() -> None:
    plain = run(dpmpp_multistep)
    np.testing.assert_array_equal(run(functools.partial(dpmpp_multistep, eta=0.0, s_noise=3.0)), plain)
    np.testing.assert_array_equal(run(dpm_multistep), plain)
    # Of first order both integrate a constant exactly: DDIM's step.
    first = run(functools.partial(dpmpp_multistep, solver_order=1))
    np.testing.assert_allclose(run(functools.partial(dpm_solver_multistep, solver_order=1)), first, atol=1e-12)
    assert np.abs(plain - first).max() > 1e-3


def test_ends_at_sigma_0_with_the_denoised_latent() -> None:
    """diffusers refuses DPM-Solver there; the limit of its step is DDIM's."""
    steps = plan_sampling(NoiseSchedule.from_config(STABLE_DIFFUSION), resolve_sampler("dpm_solver_2"), 6).steps
    assert steps[-1].sigma_next == 0
    *_, result = drive(dpm_solver_multistep(np.ones((1, 4, 2, 2)), steps), lambda e: np.full((1, 4, 2, 2), e.sigma))
    np.testing.assert_array_equal(result.latents, np.full((1, 4, 2, 2), steps[-1].sigma))


@pytest.mark.parametrize("solver", [dpmpp_multistep, dpm_solver_multistep])
@pytest.mark.parametrize(
    ("solver_order", "solver_type", "order"),
    [(1, "midpoint", 1), (2, "midpoint", 2), (2, "heun", 2), (3, "midpoint", 2)],
)
def test_order_of_convergence(solver: Any, solver_order: int, solver_type: str, order: int) -> None:
    # The third takes half of the second derivative's term, as its authors do, and starts with a step of first order.
    options: dict[str, Any] = {"solver_order": solver_order, "solver_type": solver_type}
    check_order(functools.partial(solver, lower_order_final=False, **options), order, space="vp")


@pytest.mark.parametrize("space", ["ve", "flow"])
def test_order_of_convergence_in_other_spaces(space: Any) -> None:
    levels = Parametrisation(space).levels
    check_order(functools.partial(dpmpp_multistep, lower_order_final=False, levels=levels), 2, space=space)
