"""Flow matching: Euler's and Heun's methods against diffusers' schedulers after every call."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from sampler_oracle import BOUND, COUNTS, SHAPE, STABLE_DIFFUSION, build, check_parity, relative_l2, run_diffusers

from latentrt.runtime.errors import ConfigError, UsageError
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.parametrisation import Array, Parametrisation
from latentrt.runtime.sampler_loop import Evaluation, drive
from latentrt.runtime.sampler_names import resolve_sampler
from latentrt.runtime.sampling_plan import plan_sampling, start_sampler
from latentrt.runtime.solver_flow import flow_euler, flow_heun
from latentrt.runtime.steps import Step, Steps

ODD_COUNTS = (7, 13, 33)
SPACINGS: tuple[dict[str, bool], ...] = (
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
)


@pytest.mark.parametrize("count", [*COUNTS, *ODD_COUNTS])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("sampler", ["flow_euler", "flow_heun"])
def test_shift(sampler: str, shift: float, count: int) -> None:
    # diffusers' Heun divides the difference of two latents by sigma_t, 0.001 at the second of two steps, in float32.
    bound = 2e-4 if sampler == "flow_heun" and count == 2 else BOUND
    check_parity(sampler, {"shift": shift}, count, bound=bound)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("count", [2, 7, 20])
@pytest.mark.parametrize("shift_terminal", [None, 0.1])
def test_rules_of_sigmas(spacing: dict[str, bool], count: int, shift_terminal: float | None) -> None:
    check_parity("flow_euler", {"shift": 3.0, "shift_terminal": shift_terminal, **spacing}, count)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_one_step(spacing: dict[str, bool]) -> None:
    check_parity("flow_euler", {"shift": 3.0, **spacing}, 1)
    # There diffusers divides 0 by 0 for the terminal shift.
    schedule = NoiseSchedule.from_config({"shift_terminal": 0.1, **spacing})
    (step,) = plan_sampling(schedule, resolve_sampler("flow_euler"), 1).steps
    assert (step.timestep, step.sigma_next) == (1000, 0)


def check_dynamic(config: dict[str, Any], count: int, mu: float, options: dict[str, Any]) -> None:
    """As `check_parity`, with the argument that diffusers' `set_timesteps` alone takes."""
    scheduler = build("FlowMatchEulerDiscreteScheduler", config)
    scheduler.set_timesteps(count, mu=mu)
    plan = plan_sampling(NoiseSchedule.from_config(config), resolve_sampler("flow_euler"), count, options=options)
    latents = np.random.default_rng(count).standard_normal(SHAPE, np.float32)
    calls = iter(run_diffusers(scheduler, latents, iter([])))
    made = []

    def replay(evaluation: Evaluation) -> Array:
        made.append(next(calls))
        assert evaluation.timestep == pytest.approx(made[-1].timestep, rel=3e-7)
        return made[-1].prediction

    for result in drive(start_sampler(plan, latents), replay):
        assert relative_l2(result.latents, made[-1].sample) <= BOUND
    assert next(calls, None) is None


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_dynamic_shift(time_shift_type: str, count: int, spacing: dict[str, bool]) -> None:
    config = {"use_dynamic_shifting": True, "time_shift_type": time_shift_type, **spacing}
    check_dynamic(config, count, 0.83, {"mu": 0.83})
    if count > 1:
        check_dynamic({**config, "shift_terminal": 0.02}, count, 0.83, {"mu": 0.83})


@pytest.mark.parametrize(("tokens", "mu"), [(256, 0.5), (4096, 1.15), (1024, 0.63)])
def test_the_dynamic_shift_follows_the_size(tokens: int, mu: float) -> None:
    check_dynamic({"use_dynamic_shifting": True}, 8, mu, {"image_seq_len": tokens})


def test_the_dynamic_shift_needs_the_size() -> None:
    schedule = NoiseSchedule.from_config({"use_dynamic_shifting": True})
    with pytest.raises(UsageError, match=r"^mu: expected a number with use_dynamic_shifting, got None"):
        plan_sampling(schedule, resolve_sampler("flow_euler"), 4)


@pytest.mark.parametrize("sampler", ["flow_euler", "flow_heun"])
@pytest.mark.parametrize("first", [1, 3, 7])
def test_a_slice_as_for_image_to_image(sampler: str, first: int) -> None:
    check_parity(sampler, {"shift": 3.0}, 8, first=first)


@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_stochastic_sampling(count: int, shift: float) -> None:
    check_parity("flow_euler", {"stochastic_sampling": True, "shift": shift}, count)


@pytest.mark.parametrize("count", [1, 5, 20])
def test_inverted_time(count: int) -> None:
    check_parity("flow_euler", {"invert_sigmas": True, "shift": 2.0}, count)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("invert_sigmas", [False, True])
@pytest.mark.filterwarnings("ignore:`timesteps` were passed without")
def test_given_timesteps(shift: float, invert_sigmas: bool) -> None:
    timesteps = [1000.0, 720.0, 333.3, 20.0]
    config = {"shift": shift, "invert_sigmas": invert_sigmas}
    check_parity("flow_euler", config, 4, set_timesteps={"timesteps": timesteps})


@pytest.mark.parametrize("spacing", SPACINGS)
def test_given_sigmas(spacing: dict[str, bool]) -> None:
    config, sigmas = {"shift": 3.0, **spacing}, [1.0, 0.8, 0.45, 0.1]
    scheduler = build("FlowMatchEulerDiscreteScheduler", config)
    scheduler.set_timesteps(sigmas=sigmas)
    # diffusers adds the last 0 itself.
    spec, schedule = resolve_sampler("flow_euler"), NoiseSchedule.from_config(config)
    plan = plan_sampling(schedule, spec, 1, sigmas=[*sigmas, 0.0])
    levels = [plan.model.levels(sigma)[1] for sigma in [*(s.sigma for s in plan.steps), plan.steps[-1].sigma_next]]
    np.testing.assert_allclose(levels, scheduler.sigmas.numpy(), rtol=3e-7)
    np.testing.assert_allclose([s.timestep for s in plan.steps], scheduler.timesteps.numpy(), rtol=3e-7)
    with pytest.raises(UsageError, match=r"^sigmas: expected numbers from 0 to 1 with a flow, got 14"):
        plan_sampling(schedule, spec, 1, sigmas=[14.0, 1.0, 0.0])


@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize(
    "churn", [{"s_churn": 4.0}, {"s_churn": 100.0, "s_noise": 1.1}, {"s_churn": 4.0, "s_tmin": 0.2, "s_tmax": 0.7}]
)
def test_churn_of_heun(count: int, churn: dict[str, float]) -> None:
    check_parity("flow_heun", {"shift": 3.0}, count, options=churn, step_options=churn)


def test_another_model_is_refused() -> None:
    schedule = NoiseSchedule.from_config({**STABLE_DIFFUSION, "_class_name": "EulerDiscreteScheduler"})
    with pytest.raises(ConfigError, match=r"^_class_name: expected a flow-matching scheduler or flow_prediction"):
        plan_sampling(schedule, resolve_sampler("flow_euler"), 4)
    flow = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}
    plan = plan_sampling(NoiseSchedule.from_config(flow), resolve_sampler("flow_heun"), 4)
    assert plan.model == Parametrisation("flow", "flow_prediction")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FlowMatchEulerDiscreteScheduler", "flow_euler"),
        ("Flow Euler Karras", "flow_euler"),
        ("FlowMatchHeunDiscreteScheduler", "flow_heun"),
    ],
)
def test_spellings(name: str, expected: str) -> None:
    assert resolve_sampler(name).name == expected


MEAN, SPREAD = 0.4, 0.6


def error(solver: Any, count: int) -> float:
    """Distance from the exact flow of data drawn from N(MEAN, SPREAD^2), whose velocity is known."""
    times = np.linspace(0.99, 0.05, count + 1).tolist()
    steps: Steps = tuple(
        Step(i, 0.0, t / (1 - t), t_next / (1 - t_next), count)
        for i, (t, t_next) in enumerate(itertools.pairwise(times))
    )

    def deviation(t: float) -> float:
        return math.hypot((1 - t) * SPREAD, t)

    def velocity(evaluation: Evaluation) -> Array:
        _, t = Parametrisation("flow").levels(evaluation.sigma)
        slope = (t - (1 - t) * SPREAD**2) / deviation(t) ** 2
        return slope * (evaluation.sample - (1 - t) * MEAN) - MEAN

    start = np.array([[[[2.0, -1.0, 0.3]]]])
    exact = 0.95 * MEAN + (start - 0.01 * MEAN) * deviation(0.05) / deviation(0.99)
    *_, last = drive(solver(start, steps), velocity)
    return float(np.linalg.norm(last.latents - exact))


@pytest.mark.parametrize(("solver", "order"), [(flow_euler, 1), (flow_heun, 2)])
def test_order(solver: Any, order: int) -> None:
    errors = [error(solver, count) for count in (80, 160, 320)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.05)
