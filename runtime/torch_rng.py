"""The normal numbers of PyTorch's CPU generator, in NumPy: same seed, same picture, without torch in the process.

`torch.randn` on the CPU draws from an MT19937 engine seeded with the low 32 bits of the seed and turns its output into
normal numbers in one of two ways, both followed here (ATen `native/cpu/DistributionTemplates.h`, `normal_fill`, and
`core/DistributionsHelper.h`, `normal_distribution<double>`):

- 16 elements or more: 24-bit uniforms, Box-Muller in blocks of 16 (8 radii, then 8 angles), in float32. If the size is
  no multiple of 16, the last 16 elements are drawn again from fresh uniforms.
- fewer: one 53-bit Box-Muller pair at a time in float64, the second of a pair kept for the next small draw.

The engine's integers are bit for bit PyTorch's. The normal numbers agree to a few float32 ulps (5e-7 absolute), not
bit for bit, because PyTorch's own float32 log, sin and cos differ from build to build (AVX2, AVX512, scalar).

A half-precision `torch.randn` gives these numbers rounded, if there is a multiple of 16 of them, as there is of latents
(PyTorch 2.13; older versions drew half-precision uniforms, from other bits).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from .errors import UsageError

_BLOCK = 16
_TWO_PI = np.float32(2.0 * math.pi)


def checked_seed(seed: int) -> int:
    """The seed as a plain integer, if `torch.Generator.manual_seed` would take it.

    Raises:
        UsageError: it is no integer, or not in [-2^63, 2^64).
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not -(2**63) <= seed < 2**64:
        raise UsageError(f"seed: expected an integer from -2^63 to 2^64 - 1, got {seed!r}. Choose another seed.")
    return int(seed)


class TorchGenerator:
    """`torch.Generator("cpu").manual_seed(seed)` as far as float32 `torch.randn` is concerned.

    Args:
        seed: any integer in [-2^63, 2^64), as `manual_seed` takes. PyTorch uses its low 32 bits only.

    Raises:
        UsageError: if `seed` is no integer or out of that range.
    """

    def __init__(self, seed: int) -> None:
        """Seed the engine."""
        self._engine = np.random.MT19937(0)
        self._kept: float | None = None
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> TorchGenerator:
        """Start again from this seed, far cheaper than a new generator; returns itself, as PyTorch's does.

        Raises:
            UsageError: if `seed` is no integer or out of range.
        """
        # RandomState seeds MT19937 as Knuth and PyTorch do; the newer MT19937(seed) hashes the seed first.
        np.random.RandomState(self._engine).seed(checked_seed(seed) & 0xFFFFFFFF)
        self._kept = None
        return self

    def randn(self, shape: Sequence[int]) -> npt.NDArray[np.float32]:
        """The next `torch.randn(shape, generator=self)`: float32 standard normal numbers of this shape."""
        size = math.prod(shape)
        values = self._small(size) if size < _BLOCK else self._blocks(size)
        return values.reshape(tuple(shape))

    def _raw(self, size: int) -> npt.NDArray[np.uint64]:
        return self._engine.random_raw(size)

    def _uniform24(self, size: int) -> npt.NDArray[np.float32]:
        low = self._raw(size).astype(np.uint32) & np.uint32(0xFFFFFF)
        return low.astype(np.float32) * np.float32(2.0**-24)

    def _uniform53(self) -> float:
        high, low = (int(value) for value in self._raw(2))
        return (((high << 32) | low) & (2**53 - 1)) * 2.0**-53

    def _blocks(self, size: int) -> npt.NDArray[np.float32]:
        values = self._uniform24(size)
        whole = size - size % _BLOCK
        values[:whole] = _box_muller(values[:whole])
        if whole != size:
            values[-_BLOCK:] = _box_muller(self._uniform24(_BLOCK))
        return values

    def _small(self, size: int) -> npt.NDArray[np.float32]:
        values = np.empty(size, np.float32)
        for i in range(size):
            if self._kept is not None:
                values[i], self._kept = self._kept, None
                continue
            theta = 2.0 * math.pi * self._uniform53()
            radius = math.sqrt(-2.0 * math.log1p(-self._uniform53()))
            values[i], self._kept = radius * math.cos(theta), radius * math.sin(theta)
        return values


def _box_muller(uniform: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Box-Muller over consecutive blocks of 16 uniforms in [0, 1): 8 for the radius, 8 for the angle."""
    blocks = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - blocks[:, 0]))
    theta = _TWO_PI * blocks[:, 1]
    normal = np.empty_like(blocks)
    np.multiply(radius, np.cos(theta), out=normal[:, 0])
    np.multiply(radius, np.sin(theta), out=normal[:, 1])
    return normal.reshape(-1)


def torch_randn(shape: Sequence[int], seed: int) -> npt.NDArray[np.float32]:
    """`torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`, within 5e-7."""
    return TorchGenerator(seed).randn(shape)


def batch_noise(seed: int, batch_size: int) -> Callable[[tuple[int, ...]], npt.NDArray[np.float32]]:
    """`noise.batch_noise`, which took this function's place: import it from there."""
    from . import noise

    return noise.batch_noise(seed, batch_size)
