"""Noise levels spread by a rule, against SciPy's beta distribution, diffusers and the published tables."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import scipy.stats
from sampler_oracle import STABLE_DIFFUSION, build

from latentrt.runtime.beta_distribution import beta_ppf, regularised_incomplete_beta
from latentrt.runtime.errors import UsageError
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.sampler_names import resolve_sampler, resolve_schedule
from latentrt.runtime.sampling_plan import plan_sampling
from latentrt.runtime.sigma_spacing import beta_sigmas, exponential_sigmas, karras_sigmas, spread_sigmas

SCHEDULE = NoiseSchedule.from_config(STABLE_DIFFUSION)
SHAPES = [(0.6, 0.6), (0.5, 0.5), (1.0, 1.0), (0.3, 2.0), (5.0, 1.5), (3.0, 8.0)]
COUNTS = (1, 2, 5, 7, 13, 20, 33, 50)


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_percent_points_of_the_beta_distribution(a: float, b: float) -> None:
    tail = np.geomspace(1e-12, 0.5, 40)
    for p in [*np.linspace(0, 1, 101).tolist(), *tail.tolist(), *(1 - tail).tolist()]:
        assert beta_ppf(p, a, b) == pytest.approx(scipy.stats.beta.ppf(p, a, b), rel=1e-13)


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_the_incomplete_beta_function(a: float, b: float) -> None:
    for x in np.linspace(0, 1, 101).tolist():
        assert regularised_incomplete_beta(x, a, b) == pytest.approx(scipy.stats.beta.cdf(x, a, b), rel=1e-13)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        (beta_sigmas, "_convert_to_beta"),
        (karras_sigmas, "_convert_to_karras"),
        (exponential_sigmas, "_convert_to_exponential"),
    ],
)
def test_rules_between_two_extremes_are_those_of_diffusers(rule: object, theirs: str, count: int) -> None:
    assert callable(rule)
    scheduler = diffusers.EulerDiscreteScheduler(sigma_min=0.03, sigma_max=14.6)
    expected = np.asarray(getattr(scheduler, theirs)(None, count))
    np.testing.assert_allclose(rule(14.6, 0.03, count), expected, rtol=1e-12)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("flag", ["use_beta_sigmas", "use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize("count", COUNTS)
def test_flags_of_a_config(sampler: str, flag: str, count: int) -> None:
    config = {**STABLE_DIFFUSION, flag: True}
    spec = resolve_sampler(sampler)
    scheduler = build(str(spec.scheduler), config)
    scheduler.set_timesteps(count)
    plan = plan_sampling(NoiseSchedule.from_config(config), spec, count)
    np.testing.assert_allclose([s.sigma for s in plan.steps], scheduler.sigmas[:-1].numpy(), rtol=3e-7)
    np.testing.assert_allclose([s.timestep for s in plan.steps], scheduler.timesteps.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_sgm_uniform_takes_equal_strides_from_the_noisiest_timestep(sampler: str, count: int) -> None:
    plan = plan_sampling(SCHEDULE, resolve_sampler(sampler), count, spacing="sgm_uniform")
    expected = np.linspace(999, 0, count + 1)[:-1]
    # DPM-Solver tells the model whole timesteps.
    np.testing.assert_allclose(
        [s.timestep for s in plan.steps], expected, atol=0.501 if sampler == "dpmpp_2m" else 1e-3
    )
    between = np.exp(np.interp(expected, np.arange(1000), np.log(SCHEDULE.sigmas)))
    np.testing.assert_allclose([step.sigma for step in plan.steps], between, rtol=1e-6)
    assert plan.steps[-1].sigma_next == 0


def test_sgm_uniform_between_extremes_that_are_asked_for() -> None:
    options = {"sigma_max": 5.0, "sigma_min": 0.5}
    plan = plan_sampling(SCHEDULE, resolve_sampler("euler"), 10, spacing="sgm_uniform", options=options)
    high, low = (SCHEDULE.sigma_to_timestep(sigma) for sigma in (5.0, 0.5))
    np.testing.assert_allclose([s.timestep for s in plan.steps], np.linspace(high, low, 11)[:-1], atol=1e-3)


# The publication prints these ten timesteps for the same ten levels.
@pytest.mark.parametrize(
    ("spacing", "published"),
    [
        ("ays", [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]),
        ("ays_sdxl", [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]),
    ],
)
def test_align_your_steps_in_ten_steps_are_the_published_ones(spacing: str, published: list[int]) -> None:
    plan = plan_sampling(SCHEDULE, resolve_sampler("dpmpp_2m"), 10, spacing=spacing)
    np.testing.assert_allclose([step.timestep for step in plan.steps], published, atol=2)
    assert plan.steps[-1].sigma_next == 0


@pytest.mark.parametrize("spacing", ["ays", "ays_sdxl"])
@pytest.mark.parametrize("count", COUNTS)
def test_align_your_steps_between_the_published_levels(spacing: str, count: int) -> None:
    table = [step.sigma for step in plan_sampling(SCHEDULE, resolve_sampler("euler"), 10, spacing=spacing).steps]
    levels = [s.sigma for s in plan_sampling(SCHEDULE, resolve_sampler("euler"), count, spacing=spacing).steps]
    position = np.linspace(0, 10, count + 1)[:-1]
    expected = np.exp(np.interp(position, np.arange(11), np.log([*table, 0.029])))
    np.testing.assert_allclose(levels, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["align_your_steps", "Align Your Steps", "AYS"])
def test_spellings_of_align_your_steps(name: str) -> None:
    assert resolve_schedule(name) == "ays"
    assert resolve_sampler(f"DPM++ 2M {name}").schedule == "ays"


def test_a_table_has_no_extremes() -> None:
    with pytest.raises(UsageError, match=r"^sigma_max: expected none with schedule ays, got 9"):
        plan_sampling(SCHEDULE, resolve_sampler("euler"), 10, spacing="ays", options={"sigma_max": 9.0})


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^schedule: expected one of karras, "):
        spread_sigmas(SCHEDULE, 14.6, 0.03, 5)
