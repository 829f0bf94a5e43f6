"""UniPC, against diffusers after every call, and against its order of convergence."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from dpm_family import PREDICTIONS, SPACINGS, check, config_of
from sampler_oracle import BOUND, build, check_order, check_parity

from latentrt.runtime.errors import UsageError
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.sampler_names import resolve_sampler
from latentrt.runtime.sampling_plan import plan_sampling
from latentrt.runtime.solver_unipc import unipc


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_unipc(spacing: str, prediction_type: str) -> None:
    check("uni_pc", config_of(spacing, prediction_type=prediction_type), (1, 2, 5, 13, 20, 50))


@pytest.mark.parametrize("spacing", ["leading", "karras"])
@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("solver_order", [1, 2, 3, 4])
def test_orders_and_types(solver_order: int, solver_type: str, predict_x0: bool, spacing: str) -> None:
    options = {"solver_order": solver_order, "solver_type": solver_type, "predict_x0": predict_x0}
    config = config_of(spacing, final_sigmas_type="sigma_min", **options)
    # diffusers solves for the weights in float32. With beta spacing at 50 steps order 4 was off by 3.5e-4.
    check("uni_pc", config, (3, 7, 20), slices=((20, 7),), bound=BOUND if solver_order < 3 else 5 * BOUND)


@pytest.mark.parametrize("name", ["uni_pc_bh1", "uni_pc_bh2"])
def test_named_types(name: str) -> None:
    check(name, config_of("karras", **resolve_sampler(name).preset), (5, 20))


@pytest.mark.parametrize("solver_type", ["midpoint", "logrho"])
def test_types_of_other_schedulers_are_bh2(solver_type: str) -> None:
    check("uni_pc", config_of("leading", solver_type=solver_type), (5,))


@pytest.mark.parametrize("solver_order", [2, 3])
@pytest.mark.parametrize("disable_corrector", [[], [0], [0, 3, 18]])
@pytest.mark.parametrize("lower_order_final", [True, False])
def test_final_steps_and_correctors(solver_order: int, disable_corrector: list[int], lower_order_final: bool) -> None:
    options = {"disable_corrector": disable_corrector, "lower_order_final": lower_order_final}
    # diffusers divides by 0 where a step of higher order ends at sigma 0, or at the sigma that it starts at.
    ends = {"final_sigmas_type": "zero" if lower_order_final else "sigma_min"}
    check("uni_pc", config_of("leading", solver_order=solver_order, **options, **ends), (2, 5, 20), bound=2 * BOUND)


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize("options", [{}, {"flow_shift": 3.0}, {"shift_terminal": 0.1}, {"solver_order": 3}])
def test_flow(options: dict[str, Any], final_sigmas_type: str) -> None:
    config = config_of("flow", final_sigmas_type=final_sigmas_type, **options)
    check("uni_pc", config, (1, 2, 5, 20, 50) if "shift_terminal" not in options else (2, 5, 20))


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
def test_dynamic_shift(time_shift_type: str) -> None:
    config = config_of("flow", use_dynamic_shifting=True, time_shift_type=time_shift_type)
    scheduler = build("UniPCMultistepScheduler", config)
    scheduler.set_timesteps = functools.partial(scheduler.set_timesteps, mu=0.7)
    check_parity("uni_pc", config, 8, scheduler=scheduler, options={"mu": 0.7})
    with pytest.raises(UsageError, match=r"^mu: expected a number"):
        plan_sampling(NoiseSchedule.from_config(config), resolve_sampler("uni_pc"), 8)


def test_timesteps_of_a_flow_are_refused() -> None:
    schedule = NoiseSchedule.from_config(config_of("flow"))
    for sampler in ("uni_pc", "dpmpp_2m", "deis"):
        with pytest.raises(UsageError, match=r"^timesteps: expected none for a flow"):
            plan_sampling(schedule, resolve_sampler(sampler), 2, timesteps=[900, 500])


@pytest.mark.parametrize("sampler", ["uni_pc", "dpmpp_2m"])
def test_sigmas_of_a_flow_are_noise_over_signal(sampler: str) -> None:
    """Those of diffusers' own schedule, given by the user, are its steps."""
    schedule = NoiseSchedule.from_config(config_of("flow", flow_shift=2.0))
    steps = plan_sampling(schedule, resolve_sampler(sampler), 7).steps
    sigmas = [*(step.sigma for step in steps), steps[-1].sigma_next]
    given = plan_sampling(schedule, resolve_sampler(sampler), 7, sigmas=sigmas).steps
    assert [(s.sigma, s.sigma_next, s.total) for s in given] == [(s.sigma, s.sigma_next, s.total) for s in steps]
    assert [s.timestep for s in given] == pytest.approx([s.timestep for s in steps], abs=1)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
def test_extremes_and_rounding(spacing: str, final_sigmas_type: str) -> None:
    config = config_of(spacing, sigma_min=0.1, sigma_max=10.0, final_sigmas_type=final_sigmas_type)
    check("uni_pc", config, (5, 20), slices=())
    cosine = config_of(spacing, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    check("uni_pc", cosine, (5,), slices=())


def test_options_of_the_schedule() -> None:
    check("uni_pc", config_of("leading", steps_offset=1), (7, 33))
    check("uni_pc", config_of("trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction"), (5, 20))
    check("uni_pc", {"trained_betas": [0.001 * i + 0.001 for i in range(100)], "num_train_timesteps": 100}, (5, 20))
    thresholding = {"thresholding": True, "sample_max_value": 1.5, "final_sigmas_type": "sigma_min"}
    check("uni_pc", config_of("leading", **thresholding), (5, 20))
    check("uni_pc", config_of("leading", **thresholding, predict_x0=False), (5, 20))


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
@pytest.mark.parametrize("solver_order", [1, 2])
def test_order_of_convergence(solver_order: int, solver_type: Any, predict_x0: bool) -> None:
    """One above the predictor's. From order 3 on the start, of lower order, shows."""
    solver = functools.partial(
        unipc, solver_order=solver_order, solver_type=solver_type, predict_x0=predict_x0, lower_order_final=False
    )
    check_order(solver, solver_order + 1, space="vp")
