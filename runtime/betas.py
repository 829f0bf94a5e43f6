"""Betas of the published schedules and the alphas_cumprod they give, with diffusers' own float32 roundings.

The roundings are kept (betas in float32, the cumulative product accumulated in float64 and rounded) because those of
1 - beta alone add up to 1e-6 over 1000 timesteps.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

BetaFormula = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]

Float32Array = npt.NDArray[np.float32]


def betas_from_formula(formula: BetaFormula, start: float, end: float, count: int) -> Float32Array:
    """Betas of `count` training timesteps.

    `linear` is DDPM's (Ho et al. 2020), `scaled_linear` Stable Diffusion's (linear in sqrt(beta)), `squaredcos_cap_v2`
    Glide's cosine schedule, which has no start and end.
    """
    if formula == "linear":
        return _linspace(start, end, count)
    if formula == "scaled_linear":
        return _linspace(start**0.5, end**0.5, count) ** 2
    alpha_bar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    return np.array([min(1 - alpha_bar[i + 1] / alpha_bar[i], 0.999) for i in range(count)], np.float32)


def _linspace(start: float, end: float, count: int) -> Float32Array:
    """`torch.linspace` in float32: from both ends to the middle, each value with one rounding."""
    low, high = np.float32(start), np.float32(end)
    step = float((high - low) / np.float32(count - 1))
    i = np.arange(count)
    values = np.where(i < count // 2, float(low) + step * i, float(high) - step * (count - 1 - i))
    return values.astype(np.float32)


def alphas_cumprod_from_betas(betas: Float32Array) -> Float32Array:
    """`torch.cumprod(1 - betas)` on the CPU: accumulated in float64, each value rounded to float32."""
    return np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)


def rescale_zero_terminal_snr(betas: Float32Array) -> Float32Array:
    """Betas that end at pure noise: Algorithm 1 of Lin et al. 2023 (arXiv 2305.08891)."""
    roots = np.sqrt(alphas_cumprod_from_betas(betas))
    first, last = roots[0], roots[-1]
    roots = (roots - last) * (first / (first - last))
    alpha_bar = roots**2
    alphas = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return np.asarray(np.float32(1) - alphas, np.float32)
