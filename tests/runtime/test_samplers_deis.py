"""DEIS, SA-Solver and the EDM form of DPM-Solver++, against diffusers after every call, and against their order."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from dpm_family import PREDICTIONS, SPACINGS, check, config_of
from sampler_oracle import BOUND, STABLE_DIFFUSION, check_order, log_spaced

from latentrt.runtime.errors import UsageError
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.parametrisation import Array
from latentrt.runtime.sampler_loop import drive
from latentrt.runtime.sampler_names import resolve_sampler
from latentrt.runtime.sampling_plan import plan_sampling
from latentrt.runtime.solver_deis import deis
from latentrt.runtime.solver_dpm import dpm_solver_multistep
from latentrt.runtime.solver_dpmpp import SolverType
from latentrt.runtime.solver_sa import sa_solver
from latentrt.runtime.solver_unipc import unipc

# diffusers' DEIS hands torch tensors to NumPy's logarithm.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_deis(spacing: str, prediction_type: str) -> None:
    config = config_of(spacing, prediction_type=prediction_type)
    # Its antiderivatives are subtracted in diffusers' float32: 1.5e-4 was measured at 50 steps.
    check("deis", config, (1, 2, 5, 13, 20), bound=3 * BOUND)
    check("deis", config, (50,), slices=(), bound=30 * BOUND)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    "options", [{"solver_order": 1}, {"solver_order": 3}, {"solver_order": 3, "lower_order_final": False}]
)
def test_orders_of_deis(options: dict[str, Any], spacing: str) -> None:
    # diffusers' third order is off by 5.6e-2 in float32 at worst (beta spacing, 50 steps).
    check("deis", config_of(spacing, **options), (1, 2, 5, 20), bound=BOUND if options["solver_order"] == 1 else None)


@pytest.mark.parametrize("sampler", ["deis", "sa_solver"])
@pytest.mark.parametrize("flow_shift", [1.0, 3.0])
def test_flow(sampler: str, flow_shift: float) -> None:
    # lambda = log(1 - s) - log(s) near s = 1 in float32: 8.6e-5 was measured.
    slices = ((20, 7),) if sampler == "deis" else ()
    check(sampler, config_of("flow", flow_shift=flow_shift), (1, 2, 5, 20), slices=slices, bound=10 * BOUND)


@pytest.mark.parametrize("sampler", ["deis", "sa_solver"])
def test_options_of_the_schedule(sampler: str) -> None:
    lossy: dict[str, Any] = {"bound": None, "slices": ()}
    check(sampler, config_of("leading", steps_offset=1, thresholding=True, sample_max_value=1.5), (5, 20), **lossy)
    check(
        sampler, config_of("leading", algorithm_type="dpmsolver++") if sampler == "deis" else config_of("leading"), (7,)
    )
    cosine = config_of("karras", beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    check(sampler, cosine, (5,), **lossy)
    betas = {"trained_betas": [0.001 * i + 0.001 for i in range(100)], "num_train_timesteps": 100}
    check(sampler, betas, (5, 20), **lossy)


def tau_of_half(timestep: float) -> float:
    """A tau that varies."""
    return 0.5 + float(timestep) / 2000


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("algorithm_type", ["data_prediction", "noise_prediction"])
def test_sa_solver(algorithm_type: str, prediction_type: str, spacing: str) -> None:
    config = config_of(spacing, prediction_type=prediction_type, algorithm_type=algorithm_type)
    # diffusers' add_noise takes the level of the timestep, which Karras and like spacings round.
    slices = ((20, 7), (5, 4)) if spacing in TIMESTEP_SPACINGS else ()
    # Of noise 2.9e-5 was measured in float32.
    check("sa_solver", config, (1, 2, 5, 20), slices=slices, bound=BOUND if algorithm_type[0] == "d" else 5 * BOUND)


@pytest.mark.parametrize("spacing", ["leading", "karras"])
@pytest.mark.parametrize("algorithm_type", ["data_prediction", "noise_prediction"])
@pytest.mark.parametrize("orders", [(1, 1), (1, 2), (2, 1), (3, 3), (3, 4), (4, 2), (4, 4)])
def test_orders_of_sa_solver(orders: tuple[int, int], algorithm_type: str, spacing: str) -> None:
    options = {"predictor_order": orders[0], "corrector_order": orders[1], "algorithm_type": algorithm_type}
    # diffusers takes polynomials of lambda, which is far from 0, in float32: order 4 came out 1.9 times off.
    check("sa_solver", config_of(spacing, **options), (2, 5, 20), slices=(), bound=None)
    config = config_of(spacing, **options, tau_func=tau_of_half, lower_order_final=False)
    check("sa_solver", config, (2, 5, 20), slices=(), bound=None)


def test_clipped_lambdas_of_sa_solver() -> None:
    config = config_of("linspace", beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    check("sa_solver", config | {"lambda_min_clipped": -5.1}, (5, 20), slices=())


def final(solver: Any, count: int = 12) -> Array:
    x = np.random.default_rng(5).standard_normal((1, 4, 4, 4))
    *_, result = drive(solver(x, log_spaced(count)), lambda e: np.tanh(0.7 * e.sample + np.sin(e.sigma)))
    return result.latents


def test_limits() -> None:
    """Without noise SA-Solver is UniPC with B_1(h); DEIS of order 2 is DPM-Solver that integrates the slope."""
    still = functools.partial(sa_solver, tau=0.0)
    for order in (1, 2):
        mine = final(functools.partial(still, predictor_order=order, corrector_order=order + 1))
        theirs = final(functools.partial(unipc, solver_order=order, solver_type="bh1"))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)
    kinds: tuple[tuple[int, SolverType], ...] = ((1, "midpoint"), (2, "heun"))
    for order, solver_type in kinds:
        mine = final(functools.partial(deis, solver_order=order))
        theirs = final(functools.partial(dpm_solver_multistep, solver_order=order, solver_type=solver_type))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver_order", [1, 2])
def test_order_of_convergence_of_deis(solver_order: int) -> None:
    check_order(functools.partial(deis, solver_order=solver_order, lower_order_final=False), solver_order, space="vp")


@pytest.mark.parametrize("algorithm_type", ["data_prediction", "noise_prediction"])
@pytest.mark.parametrize(("orders", "order"), [((1, 1), 1), ((1, 2), 2), ((2, 3), 3)])
def test_order_of_convergence_of_sa_solver(orders: tuple[int, int], order: int, algorithm_type: Any) -> None:
    solver = functools.partial(
        sa_solver,
        predictor_order=orders[0],
        corrector_order=orders[1],
        algorithm_type=algorithm_type,
        tau=0.0,
        lower_order_final=False,
    )
    check_order(solver, order, space="vp")


def test_noise_of_sa_solver_falls_to_the_same_steps_whatever_tau() -> None:
    plan = plan_sampling(NoiseSchedule.from_config(STABLE_DIFFUSION), resolve_sampler("sa_solver"), 10)
    assert plan.takes_noise
    drawn = []

    def noise(shape: tuple[int, ...]) -> Array:
        drawn.append(shape)
        return np.zeros(shape)

    *_, _ = drive(sa_solver(np.ones((1, 4, 2, 2)), plan.steps, noise=noise, tau=0.0), lambda e: e.sample)
    assert len(drawn) == 10
    still = plan_sampling(plan.schedule, plan.sampler, 10, options={"tau": 0.0})
    assert not still.takes_noise


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sigma_schedule": "exponential"},
        {"solver_order": 3},
        {"solver_order": 1, "rho": 5.0, "sigma_data": 1.0, "sigma_min": 0.01, "sigma_max": 20.0},
        {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
        {"thresholding": True, "sample_max_value": 1.5, "euler_at_final": True},
    ],
)
def test_edm(options: dict[str, Any], final_sigmas_type: str, prediction_type: str) -> None:
    config = {"prediction_type": prediction_type, "final_sigmas_type": final_sigmas_type, **options}
    # diffusers' sigmas are made in float32, to the seventh power: 1e-6 apart. Its exponential ones start at the lowest
    # if there is one step alone.
    counts = (2, 5, 20, 50) if "sigma_schedule" in options else (1, 2, 5, 20, 50)
    check("edm_dpmpp_2m", config, counts, bound=2 * BOUND, formulas=2 * BOUND, timestep_tolerance=1e-6)


def test_edm_is_spaced_by_name_too() -> None:
    schedule = NoiseSchedule.from_config({})
    spec = resolve_sampler("EDM DPM++ 2M")
    named = plan_sampling(schedule, spec, 7, spacing="exponential")
    chosen = plan_sampling(schedule, spec, 7, options={"sigma_schedule": "exponential"})
    assert named.steps == chosen.steps != plan_sampling(schedule, spec, 7).steps
    with pytest.raises(UsageError, match=r"^schedule: expected karras or exponential"):
        plan_sampling(schedule, spec, 7, spacing="trailing")
