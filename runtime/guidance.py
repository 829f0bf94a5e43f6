"""Classifier-free guidance: how strong at which step, and what it makes of the U-Net's rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .parametrisation import Array


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a run is guided.

    Attributes:
        scale: Ho and Salimans 2022 (arXiv 2207.12598); 1 and below are off, as in diffusers.
        end: scale at the last step; None keeps it.
        curve: "linear" or "cosine", from `scale` to `end`.
        interval: shares of the steps between which it is on: Kynkäänniemi et al. 2024 (arXiv 2404.07724). They name
            noise levels; a share of the steps means the same whatever the checkpoint.
        rescale: phi of Lin et al. 2023 (arXiv 2305.08891), section 3.4.
    """

    scale: float = 7.5
    end: float | None = None
    curve: str = "linear"
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def at(self, position: int, count: int) -> float:
        """The scale at a step, counted from 0; 1 where guidance is off."""
        low, high = self.interval
        if not low <= position / count < high:
            return 1.0
        if self.end is None:
            return self.scale
        progress = position / max(count - 1, 1)
        weight = progress if self.curve == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.scale + (self.end - self.scale) * weight

    def anywhere(self, count: int) -> bool:
        """Whether any of so many steps is guided, so that negative prompts are needed."""
        return any(self.at(position, count) > 1 for position in range(count))


def guide(
    negative: Array, positive: Array, owner: NDArray[np.intp], weights: Array, scale: float, *, rescale: float = 0.0
) -> Array:
    """The guided prediction of each image: negative + scale * sum of weight * (positive - negative).

    Args:
        negative: the U-Net's answer to the negative prompts, (b, c, h, w).
        positive: its answers to the parts of the prompts, (p, c, h, w), at least one for each image.
        owner: the image of each part, (p,).
        weights: of each part, (p,); several for one image are a composition (Liu et al. 2022, arXiv 2206.01714).
        scale: of guidance.
        rescale: how far to bring the result's standard deviation back to the positive answer's.
    """
    if len(positive) == len(negative):
        scales = np.float32(scale) if (weights == 1).all() else (scale * weights).reshape(-1, 1, 1, 1)
        result: Array = negative + scales * (positive - negative)
    else:
        result = negative.copy()
        np.add.at(result, owner, (scale * weights).reshape(-1, 1, 1, 1) * (positive - negative[owner]))
    if rescale == 0:
        return result
    axes = tuple(range(1, result.ndim))
    mean = compose(positive, owner, weights, len(negative))
    ratio = mean.std(axis=axes, keepdims=True, ddof=1) / result.std(axis=axes, keepdims=True, ddof=1)
    rescaled: Array = result * (np.float32(rescale) * ratio + np.float32(1 - rescale))
    return rescaled


def compose(positive: Array, owner: NDArray[np.intp], weights: Array, images: int) -> Array:
    """The weighted mean of each image's parts; the parts themselves where each image has one."""
    if len(positive) == images:
        return positive
    total = np.zeros((images, *positive.shape[1:]), positive.dtype)
    np.add.at(total, owner, weights.reshape(-1, 1, 1, 1) * positive)
    sums = np.zeros(images, positive.dtype)
    np.add.at(sums, owner, weights)
    return total / np.where(sums == 0, 1, sums).reshape(-1, 1, 1, 1)


def guidance_embedding(scale: float, width: int) -> NDArray[np.float32]:
    """What a guidance-distilled U-Net is told of the scale, (width,): diffusers' `get_guidance_scale_embedding`.

    Sinusoids of 1000 (scale - 1), as timesteps are embedded: Luo et al. 2023 (arXiv 2310.04378).
    """
    half = width // 2
    rates = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10000.0) / (half - 1)))
    angles = np.float32((scale - 1) * 1000) * rates
    row = np.concatenate([np.sin(angles), np.cos(angles)])
    return np.pad(row, (0, width - 2 * half)).astype(np.float32)
