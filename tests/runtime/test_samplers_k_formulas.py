"""k-diffusion's samplers against its published formulas, written out in float64, and against known solutions.

The formulas are those of `k_diffusion/sampling.py` in their own variables, one line after the other, so that they share
nothing with the solvers. Noise is a fixed list, taken in order.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from sampler_oracle import MEAN, SPREAD, STABLE_DIFFUSION, check_order, gaussian_error, log_spaced

from latentrt.runtime.brownian import BrownianNoise
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.parametrisation import Array
from latentrt.runtime.sampler_loop import Evaluation, drive
from latentrt.runtime.sampler_names import resolve_sampler
from latentrt.runtime.sampling_plan import plan_sampling, start_sampler
from latentrt.runtime.solver_dpm2 import dpm2, dpm2_ancestral
from latentrt.runtime.solver_dpm_fast import dpm_fast
from latentrt.runtime.solver_euler import euler, euler_ancestral
from latentrt.runtime.solver_heun import heun, restart
from latentrt.runtime.solver_lms import lms
from latentrt.runtime.solver_sde import dpmpp_2s_ancestral, dpmpp_3m_sde, dpmpp_sde
from latentrt.runtime.steps import Step, Steps
from latentrt.runtime.steps_k import restart_steps

Denoiser = Callable[[Array, float], Array]
EPSILON_SOLVERS = (heun, restart, dpm2, dpm2_ancestral, lms, dpm_fast)
SIGMAS = (14.6, 9.0, 4.1, 2.2, 1.3, 0.7, 0.25, 0.08, 0.03, 0.0)
SHAPE = (1, 2, 3, 4)


def steps_of(sigmas: Sequence[float]) -> Steps:
    return tuple(Step(i, 0.0, sigma, sigma_next) for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)))


def denoiser(x: Array, sigma: float) -> Array:
    return np.asarray(np.tanh(x / (1 + sigma) + 0.3 * sigma) - 0.1 * np.roll(x, 1) / (1 + sigma**2))


def drawn(seed: int = 0) -> Iterator[Array]:
    rng = np.random.default_rng(seed)
    while True:
        yield rng.standard_normal(SHAPE)


def run(solver: Callable[..., Any], x: Array, steps: Steps, **options: Any) -> Array:
    model: Denoiser = options.pop("model", denoiser)

    def answer(wanted: Evaluation) -> Array:
        denoised = model(wanted.sample, wanted.sigma)
        bare = solver.func if isinstance(solver, functools.partial) else solver
        return (wanted.sample - denoised) / wanted.sigma if bare in EPSILON_SOLVERS else denoised

    *_, last = drive(solver(x, steps, **options), answer)
    return np.asarray(last.latents)


def ancestral(s: float, s_next: float, eta: float) -> tuple[float, float]:
    up = min(s_next, eta * (s_next**2 * (s**2 - s_next**2) / s**2) ** 0.5)
    return (s_next**2 - up**2) ** 0.5, up


def k_churned(solver: str) -> Callable[..., Array]:
    """Euler, Heun and DPM2 of k-diffusion."""

    def sample(x: Array, sigmas: Sequence[float], noise: Iterator[Array], **churn: float) -> Array:
        n = len(sigmas) - 1
        for i in range(n):
            gamma = 0.0
            if churn["s_tmin"] <= sigmas[i] <= churn["s_tmax"]:
                gamma = min(churn["s_churn"] / n, 2**0.5 - 1)
            sigma_hat = sigmas[i] * (gamma + 1)
            if gamma > 0:
                x = x + next(noise) * churn["s_noise"] * (sigma_hat**2 - sigmas[i] ** 2) ** 0.5
            d = (x - denoiser(x, sigma_hat)) / sigma_hat
            dt = sigmas[i + 1] - sigma_hat
            if solver == "euler" or sigmas[i + 1] == 0:
                x = x + d * dt
            elif solver == "heun":
                x_2 = x + d * dt
                d_2 = (x_2 - denoiser(x_2, sigmas[i + 1])) / sigmas[i + 1]
                x = x + (d + d_2) / 2 * dt
            else:
                sigma_mid = math.exp((math.log(sigma_hat) + math.log(sigmas[i + 1])) / 2)
                x_2 = x + d * (sigma_mid - sigma_hat)
                d_2 = (x_2 - denoiser(x_2, sigma_mid)) / sigma_mid
                x = x + d_2 * dt
        return x

    return sample


def k_euler_ancestral(x: Array, sigmas: Sequence[float], noise: Iterator[Array], eta: float, s_noise: float) -> Array:
    for s, s_next in itertools.pairwise(sigmas):
        down, up = ancestral(s, s_next, eta)
        x = x + (x - denoiser(x, s)) / s * (down - s)
        if s_next > 0:
            x = x + next(noise) * s_noise * up
    return x


def k_dpm_2_ancestral(x: Array, sigmas: Sequence[float], noise: Iterator[Array], eta: float, s_noise: float) -> Array:
    for s, s_next in itertools.pairwise(sigmas):
        down, up = ancestral(s, s_next, eta)
        d = (x - denoiser(x, s)) / s
        if down == 0:
            x = x + d * (down - s)
        else:
            mid = math.exp((math.log(s) + math.log(down)) / 2)
            x_2 = x + d * (mid - s)
            x = x + (x_2 - denoiser(x_2, mid)) / mid * (down - s)
            x = x + next(noise) * s_noise * up
    return x


def k_dpmpp_2s_ancestral(
    x: Array, sigmas: Sequence[float], noise: Iterator[Array], eta: float, s_noise: float
) -> Array:
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = denoiser(x, sigma)
        down, up = ancestral(sigma, sigma_next, eta)
        if down == 0:
            x = x + (x - denoised) / sigma * (down - sigma)
        else:
            t, t_next = -math.log(sigma), -math.log(down)
            h = t_next - t
            s = t + h / 2
            x_2 = math.exp(-s) / math.exp(-t) * x - math.expm1(-h / 2) * denoised
            x = math.exp(-t_next) / math.exp(-t) * x - math.expm1(-h) * denoiser(x_2, math.exp(-s))
        if sigma_next > 0:
            x = x + next(noise) * s_noise * up
    return x


def k_dpmpp_sde(
    x: Array, sigmas: Sequence[float], noise: Iterator[Array], eta: float, s_noise: float, r: float = 0.5
) -> Array:
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = denoiser(x, sigma)
        if sigma_next == 0:
            x = x + (x - denoised) / sigma * (sigma_next - sigma)
            continue
        t, t_next = -math.log(sigma), -math.log(sigma_next)
        s = t + (t_next - t) * r
        fac = 1 / (2 * r)
        down, up = ancestral(math.exp(-t), math.exp(-s), eta)
        s_ = -math.log(down)
        x_2 = math.exp(-s_) / math.exp(-t) * x - math.expm1(t - s_) * denoised
        x_2 = x_2 + next(noise) * s_noise * up
        denoised_2 = denoiser(x_2, math.exp(-s))
        down, up = ancestral(math.exp(-t), math.exp(-t_next), eta)
        t_next_ = -math.log(down)
        denoised_d = (1 - fac) * denoised + fac * denoised_2
        x = math.exp(-t_next_) / math.exp(-t) * x - math.expm1(t - t_next_) * denoised_d
        x = x + next(noise) * s_noise * up
    return x


def k_dpmpp_3m_sde(x: Array, sigmas: Sequence[float], noise: Iterator[Array], eta: float, s_noise: float) -> Array:
    denoised_1: Array = np.zeros(SHAPE)
    denoised_2: Array = np.zeros(SHAPE)
    h_1: float | None = None
    h_2: float | None = None
    for sigma, sigma_next in itertools.pairwise(sigmas):
        denoised = denoiser(x, sigma)
        if sigma_next == 0:
            return denoised
        h = math.log(sigma) - math.log(sigma_next)
        h_eta = h * (eta + 1)
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * denoised
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        phi_3 = phi_2 / h_eta - 0.5
        if h_1 is not None and h_2 is not None:
            r0, r1 = h_1 / h, h_2 / h
            d1_0 = (denoised - denoised_1) / r0
            d1_1 = (denoised_1 - denoised_2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            x = x + phi_2 * d1 - phi_3 * (d1_0 - d1_1) / (r0 + r1)
        elif h_1 is not None:
            x = x + phi_2 * (denoised - denoised_1) / (h_1 / h)
        if eta:
            x = x + next(noise) * sigma_next * math.sqrt(-math.expm1(-2 * h * eta)) * s_noise
        denoised_1, denoised_2 = denoised, denoised_1
        h_1, h_2 = h, h_1
    return x


def k_dpm_fast(
    x: Array, sigma_max: float, sigma_min: float, nfe: int, noise: Iterator[Array], eta: float, s_noise: float
) -> Array:
    def eps(x: Array, t: float) -> Array:
        return np.asarray((x - denoiser(x, math.exp(-t))) / math.exp(-t))

    def sigma(t: float) -> float:
        return math.exp(-t)

    m = nfe // 3 + 1
    t_end = -math.log(sigma_min)
    ts = np.linspace(-math.log(sigma_max), t_end, m + 1).tolist()
    orders = [3] * (m - 2) + [2, 1] if nfe % 3 == 0 else [3] * (m - 1) + [nfe % 3]
    for order, (t, t_next) in zip(orders, itertools.pairwise(ts), strict=True):
        t_next_, su = t_next, 0.0
        if eta:
            sd, _ = ancestral(sigma(t), sigma(t_next), eta)
            t_next_ = min(t_end, -math.log(sd))
            su = max(sigma(t_next) ** 2 - sigma(t_next_) ** 2, 0) ** 0.5
        h = t_next_ - t
        e = eps(x, t)
        x_next = x - sigma(t_next_) * math.expm1(h) * e
        if order == 2:
            s1 = t + h / 2
            u1 = x - sigma(s1) * math.expm1(h / 2) * e
            x_next = x_next - sigma(t_next_) * math.expm1(h) * (eps(u1, s1) - e)
        if order == 3:
            r1, r2 = 1 / 3, 2 / 3
            s1, s2 = t + r1 * h, t + r2 * h
            u1 = x - sigma(s1) * math.expm1(r1 * h) * e
            change = (r2 / r1) * (math.expm1(r2 * h) / (r2 * h) - 1) * (eps(u1, s1) - e)
            u2 = x - sigma(s2) * math.expm1(r2 * h) * e - sigma(s2) * change
            x_next = x_next - sigma(t_next_) / r2 * (math.expm1(h) / h - 1) * (eps(u2, s2) - e)
        x = x_next + su * s_noise * next(noise)
    return x


def k_lms(x: Array, sigmas: Sequence[float], order: int) -> Array:
    """By the antiderivative of Lagrange's polynomials."""
    ds: list[Array] = []
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        ds.append((x - denoiser(x, sigma)) / sigma)
        points = sigmas[i::-1][:order]
        for j, d in enumerate(reversed(ds[-order:])):
            others = [point for point in points if point != points[j]]
            lagrange = np.poly1d(others, r=True) / math.prod(points[j] - other for other in others)
            antiderivative = np.polyint(lagrange)
            x = x + (antiderivative(sigma_next) - antiderivative(sigma)) * d
    return x


def close(actual: Array, expected: Array) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solver", [euler, heun, dpm2])
@pytest.mark.parametrize(
    "churn",
    [
        {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0},
        {"s_churn": 2.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0},
        {"s_churn": 40.0, "s_tmin": 0.25, "s_tmax": 9.0, "s_noise": 1.007},
    ],
)
def test_churn(solver: Any, churn: dict[str, float]) -> None:
    x = 14.6 * next(drawn())
    ours = drawn(1)
    actual = run(solver, x, steps_of(SIGMAS), noise=lambda _: next(ours), **churn)
    close(actual, k_churned(solver.__name__)(x, SIGMAS, drawn(1), **churn))


@pytest.mark.parametrize("piece", [(0, None), (3, None), (2, 6)])
def test_churn_is_shared_by_all_steps_of_the_schedule(piece: tuple[int, int | None]) -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    plan = plan_sampling(schedule, resolve_sampler("heun"), 8, options={"s_churn": 0.8}).sliced(*piece)
    running = start_sampler(plan, np.ones(SHAPE), noise=np.ones)
    wanted = next(running)
    assert wanted.sigma == pytest.approx(plan.steps[0].sigma * 1.1)
    assert wanted.timestep == pytest.approx(schedule.sigma_to_timestep(wanted.sigma))


@pytest.mark.parametrize(
    ("solver", "formula"),
    [
        (euler_ancestral, k_euler_ancestral),
        (dpm2_ancestral, k_dpm_2_ancestral),
        (dpmpp_2s_ancestral, k_dpmpp_2s_ancestral),
        (dpmpp_sde, k_dpmpp_sde),
        (functools.partial(dpmpp_sde, r=0.3), functools.partial(k_dpmpp_sde, r=0.3)),
        (functools.partial(dpmpp_sde, r=1.0), functools.partial(k_dpmpp_sde, r=1.0)),
        (dpmpp_3m_sde, k_dpmpp_3m_sde),
    ],
)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("s_noise", [1.0, 1.05])
@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-1], (14.6, 0.0), (14.6, 1.0, 0.0)])
def test_noise_on_every_step(solver: Any, formula: Any, eta: float, s_noise: float, sigmas: tuple[float, ...]) -> None:
    x = 14.6 * next(drawn())
    noise = drawn(1)
    actual = run(solver, x, steps_of(sigmas), noise=lambda _: next(noise), eta=eta, s_noise=s_noise)
    # Where the noise has no weight, k-diffusion draws it all the same.
    close(actual, formula(x, sigmas, itertools.repeat(np.zeros(SHAPE)) if eta == 0 else drawn(1), eta, s_noise))


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
def test_lms(order: int) -> None:
    x = 14.6 * next(drawn())
    close(run(lms, x, steps_of(SIGMAS), order=order), k_lms(x, SIGMAS, order))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 13])
@pytest.mark.parametrize(("eta", "s_noise"), [(0.0, 1.0), (1.0, 1.0), (0.6, 1.1)])
def test_dpm_fast(count: int, eta: float, s_noise: float) -> None:
    x, noise = 14.6 * next(drawn()), drawn(1)
    steps = steps_of(np.geomspace(14.6, 0.03, count + 1).tolist())
    actual = run(dpm_fast, x, steps, eta=eta, s_noise=s_noise, noise=lambda _: next(noise))
    close(actual, k_dpm_fast(x, 14.6, 0.03, count, drawn(1), eta, s_noise))


def test_steps_of_dpm_fast() -> None:
    schedule = NoiseSchedule.from_config({**STABLE_DIFFUSION, "timestep_spacing": "leading", "use_karras_sigmas": True})
    for count in (1, 2, 3, 7, 30):
        plan = plan_sampling(schedule, resolve_sampler("DPM fast"), count)
        results = drive(start_sampler(plan, np.ones(SHAPE, np.float32)), lambda wanted: wanted.sample)
        visited = np.array([(result.evaluation.sigma, float(result.evaluation.timestep or 0)) for result in results])
        assert len(visited) == count
        expected = np.array([(step.sigma, step.timestep) for step in plan.steps])
        np.testing.assert_allclose(visited, expected, rtol=1e-6, atol=1e-3)
        assert plan.steps[-1].sigma_next == pytest.approx(schedule.sigmas[0])
    given = plan_sampling(schedule, resolve_sampler("dpm_fast"), 0, sigmas=[5.0, 1.0, 0.5, 0.0])
    assert (len(given.steps), given.steps[0].sigma, given.steps[-1].sigma_next) == (3, 5.0, 0.5)


def test_what_becomes_another_sampler() -> None:
    x, steps = 14.6 * next(drawn()), steps_of(SIGMAS)
    close(run(lms, x, steps, order=1), run(euler, x, steps))
    close(run(euler_ancestral, x, steps, eta=0.0), run(euler, x, steps))
    close(run(dpm2_ancestral, x, steps, eta=0.0), run(dpm2, x, steps))
    close(run(dpmpp_sde, x, steps, eta=0.0), run(dpmpp_2s_ancestral, x, steps, eta=0.0))
    close(run(restart, x, steps), run(heun, x, steps))


@pytest.mark.parametrize(
    ("solver", "order", "quantity"),
    [
        (euler, 1, "denoised"),
        (functools.partial(euler_ancestral, eta=0.0), 1, "denoised"),
        (heun, 2, "epsilon"),
        (dpm2, 2, "epsilon"),
        (functools.partial(dpmpp_2s_ancestral, eta=0.0), 2, "denoised"),
        (functools.partial(dpmpp_sde, eta=0.0), 2, "denoised"),
        (functools.partial(dpmpp_sde, eta=0.0, r=0.7), 2, "denoised"),
        (functools.partial(lms, order=2), 2, "epsilon"),
    ],
)
def test_order(solver: Any, order: float, quantity: str) -> None:
    check_order(solver, order, space="ve", quantity=quantity)


@pytest.mark.parametrize(
    ("solver", "order", "quantity"),
    [
        (functools.partial(lms, order=3), 3, "epsilon"),
        (functools.partial(lms, order=4), 4, "epsilon"),
        # As in the code of DPM-Solver's authors, the second derivative has half of the weight that order 3 needs.
        (functools.partial(dpmpp_3m_sde, eta=0.0), 2, "denoised"),
    ],
)
def test_order_of_multistep(solver: Any, order: int, quantity: str) -> None:
    def gently_started(count: int) -> Steps:
        # The first steps, of low order, so short that they do not show.
        sigmas = [step.sigma for step in log_spaced(count)] + [0.03]
        first = [sigmas[0] * (sigmas[1] / sigmas[0]) ** (2.0**-k) for k in range(10, 0, -1)]
        return steps_of([sigmas[0], *first, *sigmas[1:]])

    errors = [gaussian_error(solver, gently_started(count), space="ve", quantity=quantity) for count in (80, 160, 320)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def brownian_motion(rng: np.random.Generator, shape: tuple[int, ...]) -> Callable[[float, float], Array]:
    """One path, asked for first from the start of a step to its middle, then to its end."""
    middle: tuple[float, float, Array] = (0.0, 0.0, np.zeros(shape))

    def increment(sigma: float, sigma_next: float) -> Array:
        nonlocal middle
        since, known = (middle[1], middle[2]) if middle[0] == sigma else (sigma, np.zeros(shape))
        known = known + math.sqrt(since - sigma_next) * rng.standard_normal(shape)
        middle = sigma, sigma_next, known
        return known / math.sqrt(sigma - sigma_next)

    return increment


@pytest.mark.parametrize(
    ("solver", "options", "count"),
    [
        (euler_ancestral, {}, 500),
        (dpm2_ancestral, {}, 60),
        (dpmpp_2s_ancestral, {}, 60),
        (dpmpp_sde, {}, 60),
        (dpmpp_3m_sde, {}, 60),
        (dpmpp_3m_sde, {"eta": 0.5}, 60),
        (euler, {"s_churn": 20.0}, 500),
        (heun, {"s_churn": 20.0}, 60),
        (dpm2, {"s_churn": 20.0}, 60),
    ],
)
def test_noise_keeps_the_distribution(solver: Any, options: dict[str, Any], count: int) -> None:
    # Data from N(MEAN, SPREAD^2), whose denoiser is known: what comes out must have that mean and spread again.
    def exact(x: Array, sigma: float) -> Array:
        return (SPREAD**2 * x + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)

    rng = np.random.default_rng(7)
    x = MEAN + math.hypot(14.6, SPREAD) * rng.standard_normal((1, 1, 200, 200))
    steps = log_spaced(count)
    if solver is dpmpp_sde:
        options = {**options, "brownian": brownian_motion(rng, x.shape)}
    result = run(solver, x, steps, model=exact, noise=rng.standard_normal, **options)
    assert result.mean() == pytest.approx(MEAN, abs=0.015)
    assert result.std() == pytest.approx(math.hypot(SPREAD, steps[-1].sigma_next), rel=0.02)


def test_increments_that_are_asked_of_a_brownian_motion() -> None:
    asked: list[tuple[float, float]] = []

    def brownian(sigma: float, sigma_next: float) -> Array:
        asked.append((sigma, sigma_next))
        return np.zeros(SHAPE)

    x = next(drawn())
    sigmas = (8.0, 2.0, 0.5, 0.0)
    run(dpmpp_3m_sde, x, steps_of(sigmas), brownian=brownian)
    assert asked == [(8.0, 2.0), (2.0, 0.5)]
    asked.clear()
    run(dpmpp_sde, x, steps_of(sigmas), brownian=brownian)
    assert np.asarray(asked) == pytest.approx(np.asarray([(8, 4), (8, 2), (2, 1), (2, 0.5)]))
    asked.clear()
    run(dpmpp_sde, x, steps_of(sigmas), brownian=brownian, eta=0.0)
    assert asked == []


@pytest.mark.parametrize("sampler", ["dpmpp_sde", "dpmpp_3m_sde"])
def test_brownian_noise_of_a_plan(sampler: str) -> None:
    plan = plan_sampling(NoiseSchedule.from_config(STABLE_DIFFUSION), resolve_sampler(sampler), 6, spacing="karras")
    start = np.random.default_rng(0).standard_normal((2, *SHAPE[1:]), np.float32) * np.float32(plan.init_noise_sigma)

    def result(rows: slice) -> Array:
        seeds = [5, 6][rows]
        brownian = BrownianNoise(seeds, start[rows].shape, plan.steps[-1].sigma, plan.steps[0].sigma)
        running = start_sampler(plan, start[rows], noise=lambda shape: np.full(shape, np.nan), brownian=brownian)
        *_, last = drive(running, lambda wanted: np.tanh(wanted.sample))
        return last.latents

    both = result(slice(0, 2))
    assert both.dtype == np.float32
    assert np.isfinite(both).all()
    np.testing.assert_array_equal(both, np.concatenate([result(slice(0, 1)), result(slice(1, 2))]))


def restarts_by_hand(sigmas: Sequence[float], restarts: dict[float, tuple[int, int, float]]) -> list[list[float]]:
    """The levels that are visited, one list for each way down."""

    def at(value: float) -> int:
        return min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - value))

    ways, way = [], [sigmas[0]]
    for sigma in sigmas[1:]:
        way.append(sigma)
        for low, (count, times, high) in restarts.items():
            if sigmas[at(low)] == sigma and at(high) < at(low):
                ways.append(way)
                ramp = np.linspace(sigmas[at(high)] ** (1 / 7), sigma ** (1 / 7), count) ** 7
                ways += [ramp.tolist()] * (times - 1)
                way = [*ramp.tolist()]
    return [*ways, way]


@pytest.mark.parametrize(
    ("count", "again", "times"), [(1, 0, 0), (19, 0, 0), (20, 9, 1), (35, 9, 1), (36, 9, 2), (50, 12, 2)]
)
def test_restarts_chosen_by_the_number_of_steps(count: int, again: int, times: int) -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    steps = restart_steps(schedule, count)
    assert [step.index for step in steps] == list(range(count))
    high, low = schedule.sigmas[-1], schedule.sigmas[0]
    if times:
        ramp = np.linspace(high ** (1 / 7), low ** (1 / 7), count - again * times) ** 7
        ways = restarts_by_hand([*ramp.tolist(), 0.0], {0.1: (again + 1, times, 2.0)})
        assert len(ways) == times + 1
        expected = [pair for way in ways for pair in itertools.pairwise(way)]
        np.testing.assert_allclose([(s.sigma, s.sigma_next) for s in steps], expected, rtol=1e-6)
    jumps = [b.sigma / a.sigma_next for a, b in itertools.pairwise(steps) if b.sigma != a.sigma_next]
    assert len(jumps) == times
    assert all(jump > 10 for jump in jumps)
    timesteps = [schedule.sigma_to_timestep(step.sigma) for step in steps]
    np.testing.assert_allclose([step.timestep for step in steps], timesteps, atol=0.02)


def test_restarts_of_a_list() -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    restarts = {0.05: (3, 2, 0.9), 1.0: (4, 1, 5.0), 3.0: (5, 1, 3.1)}
    plain = restart_steps(schedule, 12, restart_list={})
    steps = restart_steps(schedule, 12, restart_list=restarts)
    sigmas = [*(step.sigma for step in plain), 0.0]
    ways = restarts_by_hand(sigmas, restarts)
    assert len(ways) == 4, "the last of the list goes to where it came from"
    expected = [pair for way in ways for pair in itertools.pairwise(way)]
    np.testing.assert_allclose([(s.sigma, s.sigma_next) for s in steps], expected, rtol=1e-6)

    def exact(x: Array, sigma: float) -> Array:
        return (SPREAD**2 * x + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)

    rng = np.random.default_rng(1)
    x = MEAN + math.hypot(steps[0].sigma, SPREAD) * rng.standard_normal((1, 1, 200, 200))
    draws: list[Array] = []

    def noise(shape: tuple[int, ...]) -> Array:
        draws.append(rng.standard_normal(shape))
        return draws[-1]

    fine = restart_steps(schedule, 40, restart_list={0.1: (12, 1, 2.0)})
    result = run(restart, x, fine, model=exact, noise=noise)
    assert len(draws) == 1
    assert result.mean() == pytest.approx(MEAN, abs=0.015)
    assert result.std() == pytest.approx(SPREAD, rel=0.02)


@pytest.mark.parametrize("count", range(8, 60, 3))
def test_rounding_is_not_a_restart(count: int) -> None:
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    steps = restart_steps(schedule, count, restart_list={0.2: (6, 3, 2.5)})
    jumps = [b.sigma / a.sigma_next for a, b in itertools.pairwise(steps) if b.sigma != a.sigma_next]
    assert len(jumps) == 3
    assert min(jumps) > 2


@pytest.mark.parametrize("s_noise", [1.0, 1.003])
def test_noise_of_restarts(s_noise: float) -> None:
    ways = [[8.0, 3.0, 1.0, 0.4], [3.0, 1.2, 0.4], [3.0, 1.2, 0.4, 0.1, 0.0]]
    steps = [pair for way in ways for pair in itertools.pairwise(way)]
    x = 8.0 * next(drawn())
    ours, theirs = drawn(1), drawn(1)
    actual = run(
        restart,
        x,
        tuple(Step(i, 0.0, *pair) for i, pair in enumerate(steps)),
        s_noise=s_noise,
        noise=lambda _: next(ours),
    )
    still = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}
    for i, way in enumerate(ways):
        if i:
            x = x + next(theirs) * s_noise * (3.0**2 - 0.4**2) ** 0.5
        x = k_churned("heun")(x, way, theirs, **still)
    close(actual, x)


@pytest.mark.parametrize("solver", [euler, heun, dpm2, restart])
def test_a_step_starts_from_the_latents_before_noise_is_added(solver: Any) -> None:
    steps = (*steps_of((8.0, 2.0)), Step(1, 0.0, 4.0, 1.0)) if solver is restart else steps_of((8.0, 2.0, 1.0))
    options = {} if solver is restart else {"s_churn": 1.0}
    started: dict[int, list[Array]] = {}
    noised = []

    def answer(wanted: Evaluation) -> Array:
        started.setdefault(wanted.step_index, []).append(wanted.latents)
        noised.append(wanted.sample is not wanted.latents)
        return np.zeros_like(wanted.sample)

    x = next(drawn())
    results = [result.latents for result in drive(solver(x, steps, noise=np.ones, **options), answer)]
    assert all(latents is x for latents in started[0])
    assert all(latents is results[0] for latents in started[1])
    assert noised[-1]
