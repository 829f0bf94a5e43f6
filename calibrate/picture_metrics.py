"""How far pictures are from others that should be the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from latentrt.runtime.errors import UsageError
from latentrt.runtime.image import Pictures

from .budget import METRICS, decibels

Doubles: TypeAlias = NDArray[np.float64]
PictureMetric: TypeAlias = Callable[[Pictures, Pictures], Doubles]

_PEAK = 255.0
# Wang et al. 2004: an 11 x 11 window of weights with a standard deviation of 1.5, and two constants for flat ones.
_SIGMA = 1.5
_REACH = 5
_C1, _C2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
_RESAMPLES = 2000
_TAIL = 0.05


@dataclass(frozen=True)
class Spread:
    """A metric over pictures.

    Attributes:
        mean: over the pictures.
        low: end of the 95 % interval of the mean; percentile bootstrap over pictures (Efron 1979).
        high: other end.
        tail: what all but the worst 5 % of the pictures reach.
        worst: of all pictures.
        values: of each picture.
    """

    mean: float
    low: float
    high: float
    tail: float
    worst: float
    values: tuple[float, ...]


def psnr(reference: Pictures, pictures: Pictures) -> Doubles:
    """Peak signal-to-noise ratio of each picture in dB, (n,); LARGEST_DB for equal ones.

    Args:
        reference: (n, h, w, 3) uint8.
        pictures: of the same shape.

    Raises:
        UsageError: they are not two such arrays.
    """
    check_pictures(reference, pictures)
    errors = [np.mean(np.square(a.astype(np.float64) - b)) for a, b in zip(reference, pictures, strict=True)]
    return np.array([decibels(_PEAK**2, float(error)) for error in errors])


def ssim(reference: Pictures, pictures: Pictures) -> Doubles:
    """Structural similarity of each picture, (n,): Wang et al. 2004, mean of the three channels.

    As scikit-image's `structural_similarity` with `gaussian_weights=True, use_sample_covariance=False,
    data_range=255, channel_axis=-1`: the mean is over the windows that lie within the picture.

    Args: as `psnr`.

    Raises:
        UsageError: as `psnr`, or the pictures are smaller than a window.
    """
    check_pictures(reference, pictures)
    if min(reference.shape[1:3]) <= 2 * _REACH:
        raise UsageError(f"ssim: expected pictures of at least 11 x 11 pixels, got {reference.shape[1:3]}.")
    return np.array([_ssim(a, b) for a, b in zip(reference, pictures, strict=True)])


def flip(reference: Pictures, pictures: Pictures) -> Doubles:
    """Mean FLIP error of each picture, (n,), 0 for equal ones and at most 1: Andersson et al. 2020.

    NVIDIA's own implementation of LDR-FLIP, at its default of 67 pixels per degree of the viewer's sight.

    Args, raises: as `psnr`; UsageError too if `flip-evaluator` is not installed.
    """
    try:
        from flip_evaluator import evaluate
    except ImportError as err:
        raise UsageError(
            "flip: expected the package flip-evaluator, found none. Run: pip install 'latentrt[calibrate]'"
        ) from err
    check_pictures(reference, pictures)
    pairs = zip(reference, pictures, strict=True)
    return np.array([evaluate(_unit(a), _unit(b), "LDR", applyMagma=False)[1] for a, b in pairs], np.float64)


BUILT_IN: Mapping[str, PictureMetric] = {"psnr": psnr, "ssim": ssim, "flip": flip}


def spread(metric: str, values: Doubles, *, seed: int = 0) -> Spread:
    """The figures of a metric from its value for each picture.

    Args:
        metric: a key of METRICS, which says what is worse.
        values: (n,), n of 1 or more.
        seed: of the bootstrap.

    Raises:
        UsageError: there is no value, or one is not finite.
    """
    if not (values.size and np.isfinite(values).all()):
        raise UsageError(f"{metric}: expected finite values of pictures, got {values.size} with NaN or infinity.")
    low, high = mean_interval(values, seed=seed)
    rising = METRICS[metric].rising
    return Spread(
        mean=float(values.mean()),
        low=low,
        high=high,
        tail=float(np.quantile(values, _TAIL if rising else 1 - _TAIL)),
        worst=float(values.min() if rising else values.max()),
        values=tuple(float(value) for value in values),
    )


def mean_interval(values: Doubles, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the mean of (n,) values: percentile bootstrap, the same for the same seed."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (_RESAMPLES, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def check_pictures(reference: Pictures, pictures: Pictures) -> None:
    """Refuse what is not two uint8 arrays (n, h, w, 3) of one shape.

    Raises:
        UsageError: says what was given.
    """
    for given in (reference, pictures):
        if given.dtype != np.uint8 or given.ndim != 4 or given.shape[3] != 3 or given.shape != reference.shape:
            raise UsageError(
                f"pictures: expected two uint8 arrays (n, h, w, 3) of one shape, got {reference.dtype} "
                f"{reference.shape} and {pictures.dtype} {pictures.shape}."
            )


def _ssim(one: Pictures, other: Pictures) -> float:
    from scipy.ndimage import gaussian_filter

    def windows(values: Doubles) -> Doubles:
        """Weighted means of the windows that lie within the picture."""
        means: Doubles = gaussian_filter(values, _SIGMA, radius=_REACH, axes=(0, 1))
        return means[_REACH:-_REACH, _REACH:-_REACH]

    x, y = one.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = windows(x), windows(y)
    variances = windows(x * x) - mean_x**2 + windows(y * y) - mean_y**2
    covariance = windows(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    return float(np.mean(similarity / ((mean_x**2 + mean_y**2 + _C1) * (variances + _C2))))


def _unit(picture: Pictures) -> NDArray[np.float32]:
    return picture.astype(np.float32) / np.float32(_PEAK)
