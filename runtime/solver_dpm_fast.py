"""DPM fast: blocks of DPM-Solver of orders 3, 2 and 1 that take a given number of evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from .noise_schedule import NoiseSchedule
from .parametrisation import Array, combine
from .sampler_loop import Evaluation, Sampler
from .solver_parts import NoiseSource, add_noise, ancestral_step
from .steps import NOT_GIVEN, Given, Step, Steps, chain, sigma_steps


def dpm_fast_steps(schedule: NoiseSchedule, count: int, *, given: Given = NOT_GIVEN) -> Steps:
    """`count` evaluations between the extremes of training, or of what is given; they end at the lowest, not at 0."""
    high, low = float(schedule.sigmas[-1]), float(schedule.sigmas[0])
    if len(given):
        steps = sigma_steps(schedule, count, given=given)
        high, low = steps[0].sigma, steps[-1].sigma_next or steps[-1].sigma
    levels = [
        sigma_high * (sigma_low / sigma_high) ** (i / order)
        for order, sigma_high, sigma_low in _blocks(count, high, low)
        for i in range(order)
    ]
    timesteps = np.array([schedule.sigma_to_timestep(sigma) for sigma in levels])
    return chain(timesteps, np.array(levels), float(np.float32(low)))


def dpm_fast(
    x: Array, steps: Steps, *, eta: float = 0.0, s_noise: float = 1.0, noise: NoiseSource | None = None
) -> Sampler:
    """DPM-Solver-fast, section 3.4 of Lu et al. 2022 (arXiv 2206.00927): k-diffusion's `sample_dpm_fast`.

    Asks for epsilon. Each evaluation is a step; a slice of the steps is divided into blocks anew. With `eta` above 0 a
    block goes past its end, though not past the last level, and noise is added.
    """
    if not steps:
        return x
    places, lowest = iter(steps), steps[-1].sigma_next
    for order, high, low in _blocks(len(steps), steps[0].sigma, lowest):
        down = max(ancestral_step(high, low, eta=eta)[0], lowest)
        x = yield from _block(x, [next(places) for _ in range(order)], high, down)
        x = add_noise(x, s_noise * math.sqrt(max(low**2 - down**2, 0.0)), noise)
    return x


def _blocks(count: int, high: float, low: float) -> Iterator[tuple[int, float, float]]:
    """(order, sigma at the start, sigma at the end) of blocks of equal length in log sigma, of `count` evaluations."""
    number = count // 3 + 1
    orders = [3] * (number - 1) + [count % 3] if count % 3 else [3] * (number - 2) + [2, 1]
    for order, (start, end) in zip(orders, pairwise(range(number + 1)), strict=True):
        yield order, high * (low / high) ** (start / number), high * (low / high) ** (end / number)


def _block(x: Array, places: Sequence[Step], high: float, low: float) -> Sampler:
    """One block of as many evaluations as there are places, evenly spread in log sigma."""
    order, h = len(places), math.log(high / low)
    first, latents, sigma = x, x, high
    for i, place in enumerate(places):
        epsilon = yield Evaluation(latents, sigma, None, place.index, latents)
        first = epsilon if i == 0 else first
        sigma = high * (low / high) ** ((i + 1) / order)
        if i == 0 or order == 2:
            latents = combine((1.0, x), (sigma - high, epsilon))
        else:
            length = h * (i + 1) / order
            bend = (i + 1) / i * ((high - sigma) / length - sigma)
            latents = combine((1.0, x), (sigma - high + bend, first), (-bend, epsilon))
    return latents
