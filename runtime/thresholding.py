"""Dynamic thresholding of denoised latents."""

from __future__ import annotations

import math

import numpy as np

from .parametrisation import Array


def dynamic_threshold(denoised: Array, *, ratio: float, sample_max_value: float) -> Array:
    """Section 2.3 of Saharia et al. 2022 (arXiv 2205.11487): clip each row at a percentile of its absolute values.

    Args:
        denoised: (b, ...).
        ratio: the percentile as a share, in [0, 1], linear between two values. What is clipped is divided by it.
        sample_max_value: the percentile is taken at 1 at least, and then at this at most. diffusers' default of 1
            makes it plain clipping.
    """
    flat = np.abs(denoised.reshape(len(denoised), -1))
    # np.quantile gives the same in several times the time.
    position = ratio * (flat.shape[1] - 1)
    low, high = math.floor(position), math.ceil(position)
    ordered = np.partition(flat, (low, high), axis=1)
    percentile = ordered[:, low] + (ordered[:, high] - ordered[:, low]) * (position - low)
    limit = np.minimum(np.maximum(percentile, 1), sample_max_value).astype(denoised.dtype)
    limit = limit.reshape(-1, *[1] * (denoised.ndim - 1))
    clipped: Array = np.clip(denoised, -limit, limit)
    clipped /= limit
    return clipped
