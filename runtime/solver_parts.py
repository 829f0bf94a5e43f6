"""What solvers share: asking for an evaluation, drawing noise, exact steps between two noise levels.

A solver is a generator: it yields where it needs the denoiser, is sent its answer, and returns the final latent. It
knows sigmas and denoised latents (or noise) only; what the model predicts is added around it (`sampler_loop.py`).

Latents are carried in the space of the diffusers class of the same sampler, so that they can be compared after every
step (see `parametrisation.py`). Arrays keep their dtype, usually float32; coefficients are computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy.typing as npt

from .errors import UsageError
from .parametrisation import Array, alpha_sigma, combine
from .sampler_loop import Evaluation
from .steps import Step

NoiseSource: TypeAlias = Callable[[tuple[int, ...]], npt.NDArray[Any]]
"""Draws standard normal numbers of the given shape, as `noise.batch_noise` does."""

BrownianSource: TypeAlias = Callable[[float, float], npt.NDArray[Any]]
"""Increment of a Brownian motion between two sigmas, divided by its standard deviation: unit variance."""

Levels: TypeAlias = Callable[[float], tuple[float, float]]
"""(alpha, sigma_t) of a noise-to-signal ratio in the space of the latents, as `Parametrisation.levels`."""


def at(x: Array, step: Step) -> Evaluation:
    """The denoiser at the start of a step."""
    return Evaluation(x, step.sigma, step.timestep, step.index, x)


def transfer(x: Array, denoised: Array, sigma: float, sigma_next: float, *, levels: Levels = alpha_sigma) -> Array:
    """The exact solution from one noise level to the next if the denoised latent stayed as it is (DDIM's step)."""
    alpha, sigma_t = levels(sigma)
    alpha_next, sigma_t_next = levels(sigma_next)
    ratio = sigma_t_next / sigma_t
    return combine((ratio, x), (alpha_next - ratio * alpha, denoised))


def ancestral_step(sigma: float, sigma_next: float, *, eta: float = 1.0) -> tuple[float, float]:
    """(sigma_down, sigma_up): how far to step down, and how much noise to add, to end at `sigma_next`."""
    sigma_up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    return math.sqrt(sigma_next**2 - sigma_up**2), sigma_up


def draw(noise: NoiseSource | None, x: Array) -> Array:
    """Standard normal numbers of the shape and dtype of a latent.

    Raises:
        UsageError: there is no source of noise.
    """
    if noise is None:
        raise UsageError("noise: expected a source of noise for a stochastic sampler, got None. Pass noise=.")
    return noise(x.shape).astype(x.dtype, copy=False)


def add_noise(x: Array, std: float, noise: NoiseSource | None) -> Array:
    """A latent with noise of a standard deviation added; the latent itself for 0, and then nothing is drawn."""
    return combine((1.0, x), (std, draw(noise, x))) if std > 0 else x


def add_brownian(
    x: Array, std: float, sigma: float, sigma_next: float, *, noise: NoiseSource | None, brownian: BrownianSource | None
) -> Array:
    """A latent with a Brownian motion's increment between two sigmas added, scaled to a standard deviation.

    Without a `brownian` source the noise is independent; nothing is drawn for a deviation of 0.
    """
    if brownian is None or std == 0:
        return add_noise(x, std, noise)
    return combine((1.0, x), (std, brownian(sigma, sigma_next).astype(x.dtype, copy=False)))


def churned(
    x: Array,
    step: Step,
    steps: Sequence[Step],
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise: NoiseSource | None = None,
) -> Evaluation:
    """The denoiser at the start of a step, after noise was added to the latent: the churn of Karras et al. 2022.

    Lines 4 to 6 of Algorithm 2 of arXiv 2206.00364: `s_churn` is spread over all steps, and those between `s_tmin` and
    `s_tmax` get their share, of noise with standard deviation `s_noise`. With `s_churn` 0 this is `at`.
    """
    total = step.total or steps[-1].index + 1
    share = s_churn / total if s_tmin <= step.sigma <= s_tmax else 0.0
    if share <= 0:
        return at(x, step)
    sigma = step.sigma * (1 + min(share, math.sqrt(2) - 1))
    return Evaluation(add_noise(x, s_noise * math.sqrt(sigma**2 - step.sigma**2), noise), sigma, None, step.index, x)
