"""Brownian noise for SDE samplers: increments of one path per image, whatever the steps that ask for them.

DPM++ SDE, 2M SDE and 3M SDE draw their noise, in k-diffusion and diffusers, as increments of a Brownian motion over
sigma, W(sigma_next) - W(sigma): a picture then keeps its composition when the number of steps changes, and an interval
and its halves agree. The path is torchsde's `BrownianTree` (Li et al., "Scalable gradients for stochastic differential
equations", 2020; seeds by `numpy.random.SeedSequence`), whose numbers this gives: W over the whole range from one seed,
then the middle of an interval by Brownian bridge from another, halving down to the sigma asked for, to six decimals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cuda_rng import DEFAULT_GPU, Gpu
from .errors import UsageError
from .noise import Rng, noise_generator
from .torch_rng import checked_seed

_DECIMALS = 6
_POOL_SIZE = 24
# Intervals kept for the next query, which mostly shares the top of the tree, and points kept because samplers ask from
# where they last arrived. Increments are float32, as torchsde's; W itself is float64, for the sake of its differences.
_KEPT_LEVELS = 10
_KEPT_POINTS = 3


class BrownianNoise:
    """Unit-variance increments of Brownian paths over sigma: k-diffusion's `BrownianTreeNoiseSampler`.

    `noise(sigma, sigma_next)` is (W(sigma_next) - W(sigma)) / sqrt(|sigma_next - sigma|), float32, of `shape`. It does
    not depend on what was asked before. With rng "cpu" or "cuda" the numbers are those of torchsde on that device
    (within 1e-5 / sqrt(|sigma_next - sigma|), torchsde adding in float32), sigmas being rounded to float32 as there;
    with "numpy" the path is another one, drawn the same way. Image i's path depends on
    seed i alone, as with k-diffusion's list of seeds; ComfyUI has one path of one seed for the whole batch, which is
    this for a batch of one.

    Args:
        seeds: one for each image, taken modulo 2^64.
        shape: of the latents: (b, c, h/8, w/8).
        sigma_min: the smallest sigma above 0 that will be asked for.
        sigma_max: the largest.
        rng: whose normal numbers: "cpu", "cuda" or "numpy".
        gpu: for "cuda", as in `noise.batch_noise`.

    Raises:
        UsageError: the shape has not a row a seed, or the sigmas are not finite and in order.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, ...],
        sigma_min: float,
        sigma_max: float,
        *,
        rng: Rng = "cpu",
        gpu: str | Gpu = DEFAULT_GPU,
    ) -> None:
        """Draw the ends of the paths."""
        if not shape or shape[0] != len(seeds):
            raise UsageError(f"shape: expected {len(seeds)} rows, one for each seed, got {shape}. Seed each image.")
        low, high = _float32(sigma_min), _float32(sigma_max)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError(
                f"sigmas: expected sigma_min < sigma_max, got {sigma_min} and {sigma_max}. Check the steps."
            )
        self._paths = [_Path(seed, (1, *shape[1:]), low, high, rng=rng, gpu=gpu) for seed in seeds]

    def __call__(self, sigma: float, sigma_next: float) -> NDArray[np.float32]:
        """The noise of the step from sigma to sigma_next, in either direction.

        Raises:
            UsageError: the sigmas are equal, or one is outside the range of the path.
        """
        start, end = _float32(sigma), _float32(sigma_next)
        if start == end:
            raise UsageError(f"sigma_next: expected another sigma than {sigma}, got {sigma_next}. A step has a length.")
        scale = 1.0 / math.sqrt(abs(end - start))
        return np.concatenate([((path.at(end) - path.at(start)) * scale).astype(np.float32) for path in self._paths])


class _Interval(NamedTuple):
    start: float
    end: float
    before: NDArray[np.float64]
    """W(start)."""
    increment: NDArray[np.float32]
    """W(end) - W(start)."""
    key: int
    depth: int


class _Path:
    """One image's W, with W(sigma_min) = 0."""

    def __init__(self, seed: int, shape: tuple[int, ...], low: float, high: float, *, rng: Rng, gpu: str | Gpu) -> None:
        self._entropy = checked_seed(seed) % 2**64
        self._generator = noise_generator(0, rng=rng, gpu=gpu)
        self._shape = shape
        whole = self._normal((), words=3) * np.float32(math.sqrt(high - low))
        start, end = round(low, _DECIMALS), round(high, _DECIMALS)
        self._levels = [_Interval(start, end, np.zeros(shape), whole, 0, 0)]
        self._points: dict[float, NDArray[np.float64]] = {}

    def _normal(self, spawn_key: tuple[int, ...], *, words: int) -> NDArray[np.float32]:
        seeds = np.random.SeedSequence(self._entropy, spawn_key=spawn_key, pool_size=_POOL_SIZE)
        first = int(seeds.generate_state(words)[0])
        return self._generator.manual_seed(first).randn(self._shape)

    def at(self, sigma: float) -> NDArray[np.float64]:
        """W(sigma)."""
        point = round(sigma, _DECIMALS)
        if point not in self._points:
            value = self._found(point)
            if len(self._points) == _KEPT_POINTS:
                self._points.pop(next(iter(self._points)))
            self._points[point] = value
        return self._points[point]

    def _found(self, point: float) -> NDArray[np.float64]:
        whole = self._levels[0]
        if not whole.start <= point <= whole.end:
            raise UsageError(
                f"sigma: expected {whole.start} to {whole.end}, the range of the path, got {point}. "
                "Make the path from the smallest and the largest sigma of the steps."
            )
        # Back to an interval the point is inside of: at an end of a smaller one W would be rounded otherwise.
        while len(self._levels) > 1 and not self._levels[-1].start < point < self._levels[-1].end:
            self._levels.pop()
        interval = self._levels[-1]
        while interval.start < point < interval.end:
            interval = self._half_with(interval, point)
            if interval.depth < _KEPT_LEVELS:
                self._levels.append(interval)
        return interval.before if point == interval.start else interval.before + interval.increment

    def _half_with(self, interval: _Interval, point: float) -> _Interval:
        """The half of the interval that holds the point; the middle if it is the point is the left half's end."""
        start, end, before, increment, key, depth = interval
        middle = round(0.5 * (end + start), _DECIMALS)
        left, length = middle - start, end - start
        deviation = math.sqrt(left * (end - middle) / length)
        first = self._normal((key, depth), words=4)
        first *= np.float32(deviation)
        first += np.float32(left / length) * increment
        if point <= middle:
            return _Interval(start, middle, before, first, 2 * key, depth + 1)
        return _Interval(middle, end, before + first, increment - first, 2 * key + 1, depth + 1)


def _float32(sigma: float) -> float:
    return float(np.float32(sigma))
