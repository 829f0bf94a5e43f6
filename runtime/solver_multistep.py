"""What multistep solvers share: the outputs they remember, the order of a step, and the update itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

from .parametrisation import Array, combine
from .solver_parts import Levels
from .steps import Step, Steps

Past: TypeAlias = list[tuple[float, Array]]
"""Sigmas and model outputs, newest first."""


def remember(past: Past, sigma: float, output: Array, count: int) -> Past:
    """The newest `count` outputs."""
    return [(sigma, output), *past[: count - 1]]


def log_lengths(past: Past) -> list[float]:
    """Lengths in log sigma of the steps between what is remembered, newest first."""
    return [math.log(before[0] / after[0]) for after, before in pairwise(past)]


def total_of(steps: Steps) -> int:
    """How many steps the whole schedule has, of which `steps` may be a slice."""
    return steps[-1].total or steps[-1].index + 1 if steps else 0


def order_of(
    step: Step, total: int, *, known: int, solver_order: int, lower_order_final: bool, euler_at_final: bool = False
) -> int:
    """The order of a step of diffusers' DPM-Solver and DEIS: lower at the start, at the end of few steps, and to 0.

    Args:
        step: the step.
        total: of the whole schedule.
        known: how many outputs there are.
        solver_order: the highest.
        lower_order_final: whether the last two steps of fewer than 15 are of lower order.
        euler_at_final: whether the last step is of first order in any case.
    """
    left = total - step.index
    few = lower_order_final and total < 15
    if step.sigma_next == 0 or (left == 1 and (few or euler_at_final)):
        return 1
    return min(solver_order, known, 2) if left == 2 and few else min(solver_order, known)


def epsilon_of(x: Array, denoised: Array, sigma: float, levels: Levels) -> Array:
    """The noise in a latent whose clean part is known."""
    alpha, sigma_t = levels(sigma)
    return combine((1 / sigma_t, x), (-alpha / sigma_t, denoised))


def data_update(
    x: Array,
    sigma: float,
    sigma_next: float,
    weights: Sequence[float],
    past: Past,
    *,
    levels: Levels,
    decay: float = 1.0,
    noise: tuple[float, Array] | None = None,
) -> Array:
    """A step whose outputs are denoised latents: see `exponential_weights`.

    Args:
        x: latent at `sigma`.
        sigma: where the step starts.
        sigma_next: where it ends.
        weights: of `past`, newest first; those of 0 cost nothing.
        past: the outputs.
        levels: of the space.
        decay: what an SDE multiplies the latent by in addition.
        noise: standard deviation and noise to add.
    """
    sigma_t = levels(sigma)[1]
    alpha_next, sigma_t_next = levels(sigma_next)
    return combine((sigma_t_next / sigma_t * decay, x), *_terms(alpha_next, weights, past), *([noise] if noise else []))


def noise_update(
    x: Array,
    sigma: float,
    sigma_next: float,
    weights: Sequence[float],
    past: Past,
    *,
    levels: Levels,
    noise: tuple[float, Array] | None = None,
) -> Array:
    """A step whose outputs are noise, likewise; the weights are of a negative rate."""
    alpha = levels(sigma)[0]
    alpha_next, sigma_t_next = levels(sigma_next)
    return combine((alpha_next / alpha, x), *_terms(sigma_t_next, weights, past), *([noise] if noise else []))


def _terms(scale: float, weights: Sequence[float], past: Past) -> list[tuple[float, Array]]:
    return [(scale * weight, output) for weight, (_, output) in zip(weights, past, strict=False) if weight != 0]
