"""The normal numbers of PyTorch's CUDA generator, in NumPy: the noise a GPU made, on a machine that has none.

`torch.randn` on a CUDA device launches one kernel (ATen `native/cuda/DistributionTemplates.h`), followed here:

- Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): its key is the 64-bit seed, its
  counter holds the generator's offset / 4 in the lower 64 bits and the thread's number in the upper 64.
- Blocks of 256 threads, as many as the tensor needs, but no more than the GPU holds at once: multiprocessors x
  (threads per multiprocessor // 256). With T threads in all, thread t fills elements t, t + T, t + 2 T and t + 3 T from
  one Philox call, and goes round again, from the next counter, for 4 T elements more.
- cuRAND's `curand_normal4`: a Box-Muller pair, sine first, from words 0 and 1, another from words 2 and 3.
- A call advances the generator's offset by 4 for each time round.

So a tensor that needs fewer threads than the GPU has is the same on every GPU, and a larger one depends on the GPU's
two numbers: a T4 holds 40960 threads and an RTX 4090 196608, the latents of a 1024 x 1024 picture have 65536 elements.
A half-precision `torch.randn` gives these float32 numbers rounded.

The engine's integers are bit for bit PyTorch's. The normal numbers are within 2e-6 of what cuRAND's formula gives with
correctly rounded functions. On the device cuRAND takes the hardware's approximate sine and cosine, whose absolute error
NVIDIA states as about 2^-21 within half a turn, and the compiler's own logarithm: expect differences of 1e-6, and no
bit-for-bit equality between a GPU and any other machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .torch_rng import checked_seed

_BLOCK = 256
_UNROLL = 4
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
# Threads worked on together: their three arrays of 16 bytes a thread stay in a core's second-level cache.
_CHUNK = 16384
# Above 2 GiB PyTorch splits the tensor and launches one kernel for each part, which is not followed here.
_LARGEST = 2**29

_UNIT = np.float32(2.0**-32)
_HALF_UNIT = np.float32(2.0**-33)
_ANGLE = float(np.float32(2.0**-32) * np.float32(2.0 * math.pi))


class Gpu(NamedTuple):
    """What of a GPU decides the order of its random numbers (`torch.cuda.get_device_properties` gives both)."""

    multiprocessors: int
    threads_per_multiprocessor: int


GPUS: Mapping[str, Gpu] = {
    "T4": Gpu(40, 1024),
    "V100": Gpu(80, 2048),
    "A10": Gpu(72, 1536),
    "A10G": Gpu(80, 1536),
    "A100": Gpu(108, 2048),
    "L4": Gpu(58, 1536),
    "L40S": Gpu(142, 1536),
    "H100": Gpu(132, 2048),
    "H100 PCIe": Gpu(114, 2048),
    "H200": Gpu(132, 2048),
    "RTX 2080 Ti": Gpu(68, 1024),
    "RTX 3060": Gpu(28, 1536),
    "RTX 3090": Gpu(82, 1536),
    "RTX 4060": Gpu(24, 1536),
    "RTX 4070": Gpu(46, 1536),
    "RTX 4080": Gpu(76, 1536),
    "RTX 4090": Gpu(128, 1536),
    "RTX 5070": Gpu(48, 1536),
    "RTX 5080": Gpu(84, 1536),
    "RTX 5090": Gpu(170, 1536),
    "RTX A4000": Gpu(48, 1536),
    "RTX A6000": Gpu(84, 1536),
}
DEFAULT_GPU = "RTX 4090"


def gpu_of(name: str) -> Gpu:
    """The entry of `GPUS` with this name, in any case, with or without spaces and a leading "NVIDIA" or "GeForce".

    Raises:
        UsageError: the name is not in the table.
    """
    wanted = _plain(name)
    for known, gpu in GPUS.items():
        if _plain(known) == wanted:
            return gpu
    raise UsageError(
        f"gpu: expected one of {', '.join(GPUS)}, got {name!r}. Give its multiprocessors and threads per "
        "multiprocessor as Gpu(…, …): torch.cuda.get_device_properties tells them."
    )


def _plain(name: str) -> str:
    return "".join(word for word in name.lower().split() if word not in ("nvidia", "geforce", "tesla"))


class CudaGenerator:
    """`torch.Generator("cuda").manual_seed(seed)` as far as float32 `torch.randn` is concerned.

    Args:
        seed: any integer in [-2^63, 2^64), as `manual_seed` takes. All 64 bits count; -1 is 2^64 - 1.
        multiprocessors: how many streaming multiprocessors the GPU has.
        threads_per_multiprocessor: how many threads each of them holds at once.

    Raises:
        UsageError: the seed is out of range, or the GPU could not hold a block of threads.
    """

    def __init__(
        self,
        seed: int,
        *,
        multiprocessors: int = GPUS[DEFAULT_GPU].multiprocessors,
        threads_per_multiprocessor: int = GPUS[DEFAULT_GPU].threads_per_multiprocessor,
    ) -> None:
        """Set the key, and the offset to 0."""
        if multiprocessors < 1:
            raise UsageError(f"multiprocessors: expected at least 1, got {multiprocessors}. A GPU has tens of them.")
        if threads_per_multiprocessor < _BLOCK:
            raise UsageError(
                f"threads_per_multiprocessor: expected at least {_BLOCK}, got {threads_per_multiprocessor}. "
                "GPUs have 1024, 1536 or 2048."
            )
        self._blocks = multiprocessors * (threads_per_multiprocessor // _BLOCK)
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> CudaGenerator:
        """Start again from this seed, at offset 0; returns itself, as PyTorch's does.

        Raises:
            UsageError: the seed is no integer or out of range.
        """
        key = checked_seed(seed) % 2**64
        self._key = (key & 0xFFFFFFFF, key >> 32)
        self._calls = 0
        return self

    @property
    def offset(self) -> int:
        """PyTorch's Philox offset: 4 for each counter used, what `Generator.get_offset` gives."""
        return _UNROLL * self._calls

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The next `torch.randn(shape, generator=self, device="cuda")`: float32 standard normal numbers.

        Raises:
            UsageError: the shape has more than 2^29 elements.
        """
        size = math.prod(shape)
        if size > _LARGEST:
            raise UsageError(f"shape: expected at most 2^29 elements, got {size}. Draw the images one at a time.")
        if size == 0:
            return np.empty(tuple(shape), np.float32)
        threads = _BLOCK * min(-(-size // _BLOCK), self._blocks)
        rows = -(-size // threads)
        values = np.empty((rows, threads), np.float32)
        for row in range(0, rows, _UNROLL):
            for start in range(0, threads, _CHUNK):
                part = values[row : row + _UNROLL, start : start + _CHUNK]
                _fill(part, self._key, self._calls, start)
            self._calls += 1
        return values.reshape(-1)[:size].reshape(tuple(shape))


def _fill(part: NDArray[np.float32], key: tuple[int, int], calls: int, first_thread: int) -> None:
    """Normal numbers for up to 4 rows of neighbouring threads, from one Philox call a thread."""
    rows, threads = part.shape
    counters = np.zeros((4, threads), np.uint64)
    counters[0] = calls & 0xFFFFFFFF
    counters[1] = calls >> 32
    counters[2] = np.arange(first_thread, first_thread + threads, dtype=np.uint64)
    words = philox4x32(counters, key)
    for pair in range(0, rows, 2):
        _box_muller(words[pair], words[pair + 1], part[pair : pair + 2])


def philox4x32(counters: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Philox4x32-10 of many counters under one key.

    Args:
        counters: shape (4, n): words 0 to 3 of n counters, each below 2^32. Overwritten.
        key: its two 32-bit words.

    Returns:
        Shape (4, n): the four 32-bit words each counter gives, the upper halves 0.
    """
    # Even words are multiplied, odd ones only mixed in. The high half of one product goes with the low half of the
    # same product, to the other pair: so the rows of a product are taken in reverse.
    even, odd = counters[0::2].copy(), counters[1::2].copy()
    product = np.empty_like(even)
    crossed = product[::-1]
    steps = np.array(_KEY_STEPS, np.uint64)
    round_key = np.array(key, np.uint64)
    for _ in range(_ROUNDS):
        np.multiply(even, _MULTIPLIERS, out=product)
        np.right_shift(crossed, _SHIFT, out=even)
        even ^= odd
        even ^= round_key[:, None]
        np.bitwise_and(crossed, _LOW, out=odd)
        round_key = (round_key + steps) & _LOW
    counters[0::2] = even
    counters[1::2] = odd
    return counters


def _box_muller(x: NDArray[np.uint64], y: NDArray[np.uint64], out: NDArray[np.float32]) -> None:
    """CuRAND's `_curand_box_muller` of two words: the sine to out[0], the cosine, if there is a second row, to out[1].

    The device rounds each product and sum once (fused multiply-add): here by way of float64 for the angle, whose
    product is inexact; the product of the other is a power of two, so that float32 rounds once by itself.
    """
    uniform = x.astype(np.float32) * _UNIT + _HALF_UNIT
    radius = np.sqrt(np.float32(-2.0) * np.log(uniform))
    angle = (y.astype(np.float32).astype(np.float64) * _ANGLE + _ANGLE / 2.0).astype(np.float32)
    np.multiply(radius, np.sin(angle), out=out[0])
    if len(out) == 2:
        np.multiply(radius, np.cos(angle), out=out[1])


def cuda_randn(
    shape: Sequence[int],
    seed: int,
    *,
    multiprocessors: int = GPUS[DEFAULT_GPU].multiprocessors,
    threads_per_multiprocessor: int = GPUS[DEFAULT_GPU].threads_per_multiprocessor,
) -> NDArray[np.float32]:
    """`torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")`, within 2e-6."""
    generator = CudaGenerator(
        seed, multiprocessors=multiprocessors, threads_per_multiprocessor=threads_per_multiprocessor
    )
    return generator.randn(shape)
