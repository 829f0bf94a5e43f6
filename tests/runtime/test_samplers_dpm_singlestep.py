"""Singlestep DPM-Solver and DPM-Solver++, against diffusers after every call, and against their order."""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import pytest
from dpm_family import PREDICTIONS, check, config_of
from sampler_oracle import BOUND, check_order

from latentrt.runtime.sampler_names import resolve_sampler
from latentrt.runtime.solver_dpm_singlestep import dpm_singlestep, singlestep_orders

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")

SPACINGS = ("linspace", "karras", "exponential", "beta")
# Long steps where a latent is close to a multiple of the noise, and 1 - exp(-2h) of short ones, in diffusers' float32:
# 3.7e-5 was measured.
LOSSY = 5 * BOUND


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["dpmpp_2s", "dpmpp_3s"])
def test_dpmpp(sampler: str, prediction_type: str, spacing: str) -> None:
    config = config_of(spacing, prediction_type=prediction_type, **resolve_sampler(sampler).preset)
    check(sampler, config, (1, 2, 5, 7, 20), slices=((20, 7), (20, 8)))


@pytest.mark.parametrize("spacing", ["linspace", "karras"])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_algorithms(solver_order: int, algorithm_type: str, solver_type: str, spacing: str) -> None:
    config = config_of(
        spacing,
        solver_order=solver_order,
        algorithm_type=algorithm_type,
        solver_type=solver_type,
        final_sigmas_type="sigma_min",
    )
    # diffusers' scheduler turns on lower_order_final for good where the number of steps asks for it.
    check("DPMSolverSinglestepScheduler", config, (6, 7, 14), slices=((12, 4),), bound=LOSSY, reuse=False)


@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_final_steps(solver_order: int, lower_order_final: bool) -> None:
    for final_sigmas_type in ("sigma_min", "zero"):
        ends = {"lower_order_final": lower_order_final, "final_sigmas_type": final_sigmas_type}
        config = config_of("linspace", solver_order=solver_order, **ends)
        check("DPMSolverSinglestepScheduler", config, (1, 2, 3, 4, 5, 6, 7), slices=(), bound=None, reuse=False)


@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_orders_of_the_steps(solver_order: int, lower_order_final: bool) -> None:
    for final_sigmas_type in ("sigma_min", "zero"):
        for count in range(1, 31):
            scheduler = diffusers.DPMSolverSinglestepScheduler(
                num_train_timesteps=60,
                solver_order=solver_order,
                lower_order_final=lower_order_final,
                final_sigmas_type=final_sigmas_type,
            )
            scheduler.set_timesteps(count)
            to_zero = final_sigmas_type == "zero"
            orders = singlestep_orders(count, solver_order, lower_order_final=lower_order_final, to_zero=to_zero)
            assert orders == scheduler.order_list


@pytest.mark.parametrize("options", [{}, {"flow_shift": 3.0, "solver_order": 3, "solver_type": "heun"}])
def test_flow(options: dict[str, Any]) -> None:
    check("DPMSolverSinglestepScheduler", config_of("flow", **options), (1, 2, 5, 20), slices=((20, 7),))


def test_options_of_the_schedule() -> None:
    """lambda_min_clipped, trained betas, thresholding (diffusers' fails for dpmsolver), timesteps; no steps_offset."""
    cosine = config_of("linspace", beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    check("dpmpp_2s", cosine | {"lambda_min_clipped": -5.1, "steps_offset": 1, "timestep_spacing": "leading"}, (5, 20))
    check("dpmpp_2s", cosine | {"use_karras_sigmas": True}, (5,), slices=())
    check("dpmpp_2s", {"trained_betas": [0.001 * i + 0.001 for i in range(100)], "num_train_timesteps": 100}, (5, 20))
    check("dpmpp_2s", config_of("linspace", thresholding=True, sample_max_value=1.5), (5, 20))
    check("dpmpp_2s", config_of("linspace"), (0,), slices=(), set_timesteps={"timesteps": [999, 700, 333, 50, 3]})


@pytest.mark.parametrize("algorithm_type", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("solver_order", [1, 2, 3])
def test_order_of_convergence(solver_order: int, solver_type: Any, algorithm_type: Any) -> None:
    solver = functools.partial(
        dpm_singlestep, solver_order=solver_order, solver_type=solver_type, algorithm_type=algorithm_type
    )
    check_order(solver, solver_order, space="vp", counts=(150, 300, 600))
