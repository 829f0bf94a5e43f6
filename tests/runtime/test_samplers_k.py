"""k-diffusion's samplers against diffusers' schedulers after every call."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from sampler_oracle import BOUND, COUNTS, SHAPE, STABLE_DIFFUSION, build, check_parity, predict, relative_l2

from latentrt.runtime import noise_schedule
from latentrt.runtime.brownian import BrownianNoise
from latentrt.runtime.errors import ConfigError, UsageError
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.sampler_loop import drive
from latentrt.runtime.sampler_names import resolve_sampler
from latentrt.runtime.sampler_spec import SamplerSpec
from latentrt.runtime.sampler_specs_k import K_SAMPLERS
from latentrt.runtime.sampling_plan import plan_sampling, start_sampler

# diffusers' KDPM2 classes hand torch tensors to NumPy functions.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

SPACINGS = ("leading", "linspace", "trailing", "karras", "exponential", "beta")
CASES = (*((spacing, 0) for spacing in SPACINGS), ("leading", 1))
SLICES = ((20, 7), (5, 4))
# diffusers takes logarithms of a middle sigma, and of others that come out of one, in float32.
OF_LOGARITHMS: dict[str, Any] = {"timestep_tolerance": 1e-6, "timestep_slack": 2e-4}


def config_of(spacing: str, **options: Any) -> dict[str, Any]:
    respaced = spacing in ("karras", "exponential", "beta")
    chosen = {f"use_{spacing}_sigmas": True} if respaced else {"timestep_spacing": spacing}
    return {**STABLE_DIFFUSION, **chosen, **options}


def build_quickly(scheduler: str, config: Mapping[str, Any]) -> Any:
    """`build`, without the fifth of a second that some take to set 1000 timesteps that nobody asked for."""
    cls = getattr(diffusers, scheduler)
    with mock.patch.object(cls, "set_timesteps", functools.partialmethod(_two_steps, cls.set_timesteps)):
        return build(scheduler, config)


def _two_steps(scheduler: Any, set_timesteps: Callable[..., None], *_: Any) -> None:
    set_timesteps(scheduler, 2)


def check(
    sampler: str,
    config: dict[str, Any],
    counts: Sequence[int] = COUNTS,
    *,
    slices: Sequence[tuple[int, int]] = SLICES,
    bounds: Mapping[int, float] | None = None,
    **options: Any,
) -> None:
    """`check_parity` at several numbers of steps, of which some have bounds of their own."""
    bound = options.pop("bound", BOUND)
    scheduler = build_quickly(str(resolve_sampler(sampler).scheduler), config)
    for count, first in (*((count, 0) for count in counts), *slices):
        here = (bounds or {}).get(count, bound)
        check_parity(sampler, config, count, first=first, scheduler=scheduler, bound=here, **options)


def slices_of(sampler: str) -> Sequence[tuple[int, int]]:
    # diffusers' LMS goes wrong in image to image: weights of order 4 for the single evaluation it has.
    return () if sampler == "lms" else SLICES


@pytest.mark.parametrize(("spacing", "steps_offset"), CASES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "lms"])
def test_samplers_of_every_prediction_type(sampler: str, prediction_type: str, spacing: str, steps_offset: int) -> None:
    config = config_of(spacing, prediction_type=prediction_type, steps_offset=steps_offset)
    check(sampler, config, slices=slices_of(sampler))


@pytest.mark.parametrize(("spacing", "steps_offset"), [*((s, 0) for s in SPACINGS[:3]), ("leading", 1)])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])  # diffusers' class refuses "sample"
def test_euler_ancestral(prediction_type: str, spacing: str, steps_offset: int) -> None:
    check("euler_ancestral", config_of(spacing, prediction_type=prediction_type, steps_offset=steps_offset))


@pytest.mark.parametrize(("spacing", "steps_offset"), CASES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])  # diffusers' classes refuse "sample"
@pytest.mark.parametrize("sampler", ["dpm_2", "dpm_2_ancestral"])
def test_dpm2(sampler: str, prediction_type: str, spacing: str, steps_offset: int) -> None:
    config = config_of(spacing, prediction_type=prediction_type, steps_offset=steps_offset)
    # sigma_down = sqrt(sigma_next^2 - sigma_up^2) of one long step keeps two digits in diffusers' float32: 2.0e-4 was
    # measured for 2 steps.
    check(sampler, config, bounds={2: 4e-4} if sampler == "dpm_2_ancestral" else None, **OF_LOGARITHMS)


@pytest.mark.parametrize(("spacing", "steps_offset"), CASES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])  # diffusers' class refuses "sample"
def test_dpmpp_sde(prediction_type: str, spacing: str, steps_offset: int) -> None:
    pytest.importorskip("torchsde")
    config = config_of(spacing, prediction_type=prediction_type, steps_offset=steps_offset)
    # sigma_up in float32 from sigmas that hardly differ, as those of beta spacing: 2.5e-5 was measured.
    check("dpmpp_sde", config, bound=4 * BOUND if spacing == "beta" else BOUND, **OF_LOGARITHMS)


def test_s_noise_of_dpmpp_sde() -> None:
    pytest.importorskip("torchsde")
    s_noise = {"s_noise": 1.1}
    check("dpmpp_sde", config_of("karras"), (7,), options=s_noise, step_options=s_noise, **OF_LOGARITHMS)


@pytest.mark.filterwarnings(
    "ignore:Should have t[ab]:UserWarning"
)  # torchsde, of sigmas that it rounds to six decimals
def test_dpmpp_sde_with_the_noise_of_torchsde() -> None:
    pytest.importorskip("torchsde")
    config = config_of("karras", noise_sampler_seed=11)
    scheduler = build("DPMSolverSDEScheduler", config)
    scheduler.set_timesteps(12)
    plan = plan_sampling(NoiseSchedule.from_config(config), resolve_sampler("dpmpp_sde"), 12)
    shape = (1, *SHAPE[1:])
    latents = np.asarray(plan.init_noise_sigma * np.random.default_rng(0).standard_normal(shape), np.float32)
    expected = torch.from_numpy(latents)
    for timestep in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(expected, timestep).numpy(), float(timestep))
        expected = scheduler.step(torch.from_numpy(output), timestep, expected).prev_sample
    lowest, highest = plan.steps[-1].sigma, plan.steps[0].sigma
    brownian = BrownianNoise([plan.options["noise_sampler_seed"]], shape, lowest, highest)
    sampler = start_sampler(plan, latents, noise=lambda shape: np.full(shape, np.nan), brownian=brownian)
    *_, result = drive(sampler, lambda wanted: predict(wanted.sample, float(wanted.timestep or 0)))
    # torchsde adds in float32, and here the model sees and multiplies the difference: 1.5e-4 was measured.
    assert relative_l2(result.latents, expected.numpy()) <= 1e-3


@pytest.mark.parametrize("spec", [spec for spec in K_SAMPLERS if spec.scheduler], ids=lambda spec: spec.name)
def test_odd_numbers_of_steps(spec: SamplerSpec) -> None:
    if spec.name == "dpmpp_sde":
        pytest.importorskip("torchsde")
    for config in (config_of("leading", steps_offset=1), config_of("karras")):
        check(spec.name, config, (7, 13, 33), slices=slices_of(spec.name), **OF_LOGARITHMS)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
def test_zero_terminal_snr(sampler: str, spacing: str) -> None:
    # From sigma 4096 diffusers takes x + (sigma_next - sigma) * derivative, in float32: 1.4e-5 was measured for 20
    # steps, 6.1e-5 for 5, 3.3e-4 for 2.
    config = config_of(spacing, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    long_steps = {1: 5e-4, 2: 5e-4, 5: 1e-4}
    check(sampler, config, bound=4 * BOUND, bounds=long_steps if spacing != "leading" else None)


@pytest.mark.parametrize("sampler", [spec.name for spec in K_SAMPLERS if spec.scheduler and spec.space == "ve"])
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2", "trained_betas"])
def test_beta_schedules(sampler: str, beta_schedule: str) -> None:
    if sampler == "dpmpp_sde":
        pytest.importorskip("torchsde")
    if beta_schedule == "trained_betas":
        betas = (np.linspace(0.02, 0.12, 1000) ** 2).tolist()
        config: dict[str, Any] = {"trained_betas": betas}
    else:
        config = {"beta_schedule": beta_schedule, "beta_start": 0.0002, "beta_end": 0.015}
    if sampler == "dpm_2_ancestral" and beta_schedule == "squaredcos_cap_v2":
        pytest.skip("diffusers loses all digits of sigma_down: its steps start at 2e4")
    check(sampler, config, (9,), slices=slices_of(sampler), **OF_LOGARITHMS)


@pytest.mark.parametrize("spacing", ["leading", "karras", "beta"])
def test_final_sigma(spacing: str) -> None:
    check("euler", config_of(spacing, final_sigmas_type="sigma_min"), (1, 10))


@pytest.mark.parametrize("interpolation_type", ["linear", "log_linear"])
@pytest.mark.parametrize("timestep_type", ["discrete", "continuous"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "karras", "exponential"])
@pytest.mark.parametrize("extremes", [{}, {"sigma_min": 0.05, "sigma_max": 11.5}])
def test_options_of_euler(
    interpolation_type: str, timestep_type: str, prediction_type: str, spacing: str, extremes: dict[str, float]
) -> None:
    config = config_of(spacing, timestep_type=timestep_type, prediction_type=prediction_type, **extremes)
    check("euler", config | {"interpolation_type": interpolation_type}, (1, 8), slices=(), **OF_LOGARITHMS)


def test_stable_video_diffusion() -> None:
    options = {"prediction_type": "v_prediction", "timestep_type": "continuous", "timestep_spacing": "leading"}
    config = config_of("karras", **options, sigma_min=0.002, sigma_max=700.0, steps_offset=1)
    # From sigma 700 as from zero terminal SNR: 4.6e-5 was measured for 2 steps.
    check("euler", config, bounds={1: 1e-4, 2: 1e-4})
    plan = plan_sampling(NoiseSchedule.from_config(config), resolve_sampler("euler"), 5, options={"s_churn": 2.0})
    sampler = start_sampler(plan, np.zeros(SHAPE, np.float32), noise=np.zeros)
    wanted = next(sampler)
    assert wanted.sigma == pytest.approx(700 * 1.4)
    assert wanted.timestep == pytest.approx(0.25 * math.log(700 * 1.4))


@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_timesteps_of_the_caller(sampler: str, prediction_type: str) -> None:
    config = config_of("leading", prediction_type=prediction_type)
    check_parity(sampler, config, 0, set_timesteps={"timesteps": [999, 800, 501, 77, 3]})


def test_timesteps_of_the_caller_with_log_linear_sigmas() -> None:
    config = config_of("leading", interpolation_type="log_linear")
    check_parity("euler", config, 0, set_timesteps={"timesteps": [999, 800, 501, 77, 3]})


@pytest.mark.parametrize("sigmas", [[14.6, 5.0, 0.7, 0.0], [9.0, 0.3, 0.05]])
@pytest.mark.parametrize("timestep_type", ["discrete", "continuous"])
def test_sigmas_of_the_caller(sigmas: list[float], timestep_type: str) -> None:
    config = config_of("leading", prediction_type="v_prediction", timestep_type=timestep_type)
    # diffusers takes their logarithms in float32.
    check_parity("euler", config, 0, set_timesteps={"sigmas": sigmas}, **OF_LOGARITHMS)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("limit", [1.0, 2.5])
def test_clipping_of_heun(prediction_type: str, limit: float) -> None:
    config = config_of("karras", prediction_type=prediction_type, clip_sample=True, clip_sample_range=limit)
    # A rounding error of the first of two steps is divided by the small sigma it ends at, on both sides: 1.0e-4.
    check("heun", config, bounds={2: 2e-4})


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_orders_of_lms(order: int) -> None:
    check("lms", config_of("karras"), (3, 12), slices=(), options={"order": order}, step_options={"order": order})


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_schedule", ["karras", "exponential"])
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize("extremes", [{}, {"sigma_min": 0.01, "sigma_max": 120.0, "sigma_data": 1.0, "rho": 5.0}])
def test_edm_euler(
    prediction_type: str, sigma_schedule: str, final_sigmas_type: str, extremes: dict[str, float]
) -> None:
    config = {"prediction_type": prediction_type, "sigma_schedule": sigma_schedule, **extremes}
    # A single step of exponential spacing starts at the lowest sigma in diffusers.
    counts = (1, 2, 5, 20, 50) if sigma_schedule == "karras" else (2, 5, 20, 50)
    check("edm_euler", config | {"final_sigmas_type": final_sigmas_type}, counts, **OF_LOGARITHMS)


@pytest.mark.parametrize("spec", [spec for spec in K_SAMPLERS if spec.scheduler], ids=lambda spec: spec.name)
def test_every_option_of_diffusers_is_known(spec: SamplerSpec) -> None:
    names = set(inspect.signature(getattr(diffusers, str(spec.scheduler)).__init__).parameters) - {"self"}
    read_by_all = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}
    assert names - read_by_all <= set(spec.options) | spec.reads
    assert spec.reads <= names & noise_schedule._READ
    of_config = {name for name, option in spec.options.items() if option.in_config}
    assert of_config <= names


@pytest.mark.parametrize(
    ("sampler", "options", "timesteps"),
    [
        ("euler", {"sigma_min": 0.0}, None),
        ("euler", {"interpolation_type": "cubic"}, None),
        ("edm_euler", {"sigma_min": 3.0, "sigma_max": 2.0}, None),
        ("edm_euler", {}, [999, 1]),
        ("lms", {"order": 0}, None),
        ("restart", {"restart_list": {0.1: (10, 1)}}, None),
        ("restart", {"restart_list": {2.0: (10, 1, 0.1)}}, None),
        ("restart", {"restart_list": [0.1]}, None),
        ("dpmpp_sde", {"r": 0.0}, None),
    ],
)
def test_refused_options(sampler: str, options: dict[str, Any], timesteps: list[int] | None) -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    with pytest.raises(UsageError, match=next(iter(options), "timesteps")):
        plan_sampling(schedule, resolve_sampler(sampler), 10, options=options, timesteps=timesteps)


def test_refused_configs() -> None:
    plan = functools.partial(plan_sampling, num_inference_steps=5)
    schedule = NoiseSchedule.from_config({**STABLE_DIFFUSION, "prediction_type": "flow_prediction"})
    for sampler in ("heun", "edm_euler"):
        with pytest.raises(ConfigError, match="flow_prediction"):
            plan(schedule, resolve_sampler(sampler))
    config = {**STABLE_DIFFUSION, "prediction_type": "v_prediction", "timestep_type": "continuous"}
    with pytest.raises(UsageError, match="timesteps"):
        plan(NoiseSchedule.from_config(config), resolve_sampler("euler"), timesteps=[500, 1])


@pytest.mark.parametrize("spec", K_SAMPLERS, ids=lambda spec: spec.name)
def test_every_spacing_runs(spec: SamplerSpec) -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    for spacing in spec.spacings:
        for count in (1, 2, 22):
            plan = plan_sampling(schedule, spec, count, spacing=spacing)
            rng = np.random.default_rng(count)
            noise = rng.standard_normal if plan.takes_noise else None
            latents = np.asarray(plan.init_noise_sigma * rng.standard_normal(SHAPE), np.float32)
            sampler = start_sampler(plan, latents, noise=noise)
            results = list(drive(sampler, lambda wanted: predict(wanted.sample, float(wanted.timestep or 0))))
            assert [result.index for result in results] == [step.index for step in plan.steps] == list(range(count))
            assert results[-1].latents.dtype == np.float32
            assert np.isfinite(results[-1].latents).all()
