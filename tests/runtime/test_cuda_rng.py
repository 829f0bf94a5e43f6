"""cuda_rng against published vectors, cuRAND's headers, numbers that GPUs printed, and the kernel thread by thread."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from latentrt.runtime.cuda_rng import GPUS, CudaGenerator, Gpu, _box_muller, cuda_randn, gpu_of, philox4x32
from latentrt.runtime.errors import UsageError

# float32: 1 ulp of an angle up to 2 pi (2.4e-7) plus that of log, sqrt and sine, times a radius up to 6.8.
ATOL = 2e-6

seeds = st.integers(-(2**63), 2**64 - 1)

# Random123 1.14, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# cuRAND 10.4's headers compiled for the host: curand_init(seed, thread, offset), then curand4 and curand_normal4.
CURAND = [
    (
        *(0x0, 0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (-0.924662411, 0.991137743, -0.482068747, -0.617608845),
    ),
    (
        *(0x0, 5, 400),
        (0x95844EE8, 0x7F030615, 0xF077C997, 0x7344E4F7),
        (0.0251506474, -1.03677607, 0.108762242, -0.336678237),
    ),
    (
        *(0xE, 73727, 4),
        (0xC7F8856A, 0x41B1120C, 0x671F2138, 0xC06E4F80),
        (0.702254355, -0.0291744824, -1.34845614, 0.0142621538),
    ),
    (
        *(0xDEADBEEFCAFEBABE, 0, 0),
        (0xC386ABB7, 0xCB679089, 0x638B75AF, 0x9BD0B006),
        (-0.705571413, 0.202821448, -0.867119789, -1.06641614),
    ),
    (
        *(0xDEADBEEFCAFEBABE, 196607, 8),
        (0xC48639F1, 0xA34C3BCA, 0x91C551F6, 0x044B794A),
        (-0.554079592, -0.470933437, 0.111661702, 1.05537474),
    ),
    (
        *(0xFFFFFFFFFFFFFFFF, 270335, 12),
        (0xE65BA1CD, 0xD8133173, 0xF355C621, 0x018D3109),
        (-0.381541073, 0.255954266, 0.0121276649, 0.31832245),
    ),
    (
        *(0x100000000, 0, 0),
        (0xFDDE3E0B, 0xFA7E58B6, 0x3380EC46, 0xD8D55C4F),
        (-0.0174248964, 0.128145695, -1.46835387, 1.025177),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_random123_known_answers(counter: tuple[int, ...], key: tuple[int, int], result: tuple[int, ...]) -> None:
    words = philox4x32(np.array(counter, np.uint64)[:, None].repeat(3, axis=1), key)
    np.testing.assert_array_equal(words, np.array(result, np.uint64)[:, None].repeat(3, axis=1))


@pytest.mark.parametrize(
    ("seed", "thread", "offset", "words"),
    [row[:4] for row in CURAND]
    # An offset whose counter passes 32 bits, which no draw here reaches.
    + [(0xFFFFFFFFFFFFFFFF, 1, 2**34, (0x4A2391AD, 0x3FAE9345, 0xD134FD2C, 0x0A952A9F))],
)
def test_words_are_curands(seed: int, thread: int, offset: int, words: tuple[int, ...]) -> None:
    counter = np.array([[offset // 4 % 2**32], [offset // 4 >> 32], [thread], [0]], np.uint64)
    np.testing.assert_array_equal(philox4x32(counter, (seed % 2**32, seed >> 32))[:, 0], words)


@pytest.mark.parametrize(("seed", "thread", "offset", "words", "normals"), CURAND)
def test_normals_are_curands(
    seed: int, thread: int, offset: int, words: tuple[int, ...], normals: tuple[float, ...]
) -> None:
    # A GPU with just enough threads: the thread's four numbers lie one round of all threads apart.
    blocks = thread // 256 + 1
    threads = 256 * blocks
    generator = CudaGenerator(seed, multiprocessors=blocks, threads_per_multiprocessor=256)
    for _ in range(offset // 4):
        generator.randn((1,))
    assert generator.offset == offset
    values = generator.randn((4, threads))[:, thread]
    np.testing.assert_allclose(values, normals, rtol=0, atol=ATOL)


def test_the_values_that_other_projects_publish() -> None:
    expected = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    np.testing.assert_allclose(cuda_randn((3, 4), 0), expected, rtol=0, atol=ATOL)


# What people's GPUs printed, to four decimals, in reports that GPUs disagree: tensors larger than the GPU's threads.


def test_numbers_printed_by_an_rtx_a4000() -> None:
    # pytorch/pytorch issue 97097: manual_seed(14), FloatTensor(1000, 100).normal_(5, 5**.5); 100000 > 73728 threads.
    values = cuda_randn((1000, 100), 14, **GPUS["RTX A4000"]._asdict()) * np.float32(5**0.5) + np.float32(5)
    printed = [
        [2.8731, 5.2727, 2.9889, 1.6853, 9.6331, 6.6319],
        [3.9968, 3.8097, 5.7328, 4.4029, 3.9804, 7.4698],
        [6.5552, 4.0857, 4.2315, 2.7704, 3.5479, 3.3063],
        [8.6297, 2.3137, 6.2596, 7.9358, 4.4697, 2.7475],
        [7.0551, 7.8583, 3.9990, 4.1139, 8.9315, 4.2042],
        [2.7337, 2.2106, 7.7815, 8.2207, 6.5395, 4.2604],
    ]
    ends = np.ix_([0, 1, 2, -3, -2, -1], [0, 1, 2, -3, -2, -1])
    np.testing.assert_allclose(values[ends], printed, rtol=0, atol=6e-5)


@pytest.mark.parametrize(("gpu", "last"), [("H100", [-0.6970, -0.7780, 0.3267]), ("A100", [0.1549, -0.6797, -0.1656])])
def test_numbers_printed_by_an_h100_and_an_a100(gpu: str, last: list[float]) -> None:
    # pytorch/pytorch issue 143086: 9.5 million elements, nine and eleven times round.
    values = cuda_randn((1, 49 * 12 * 112 * 144), 1, **GPUS[gpu]._asdict())[0]
    np.testing.assert_allclose(values[:3], [-0.2963, 2.6764, -0.1408], rtol=0, atol=6e-5)
    np.testing.assert_allclose(values[-3:], last, rtol=0, atol=6e-5)


def test_numbers_printed_by_an_rtx_a6000() -> None:
    # pytorch/pytorch issue 62467.
    values = cuda_randn((1, 3, 128, 128), 43, **GPUS["RTX A6000"]._asdict())
    np.testing.assert_allclose(values[0, :, 0, 0], [1.9983, 0.8704, 2.1127], rtol=0, atol=6e-5)


def test_gpus_agree_up_to_the_smaller_ones_threads() -> None:
    # pytorch/pytorch issue 194676: a T4 and an L4 give the same 40960 numbers, and no longer the same 40961.
    def draw(gpu: str, size: int) -> Any:
        return cuda_randn((size,), 3, **GPUS[gpu]._asdict())

    np.testing.assert_array_equal(draw("T4", 40960), draw("L4", 40960))
    different = draw("T4", 40961) != draw("L4", 40961)
    np.testing.assert_array_equal(np.nonzero(different)[0], [40960])


def kernel(size: int, seed: int, offset: int, gpu: Gpu) -> tuple[list[float], int]:
    """ATen's distribution_elementwise_grid_stride_kernel and its launch, one thread after the other."""
    block_size, unroll = 256, 4
    grid = min((size + block_size - 1) // block_size, gpu[0] * (gpu[1] // block_size))
    out = [math.nan] * size
    stride = block_size * grid
    rounded_size = ((size - 1) // (stride * unroll) + 1) * stride * unroll
    for idx in range(stride):
        state = offset // 4
        for linear_index in range(idx, rounded_size, stride * unroll):
            normals = curand_normal4(seed, idx, state)
            state += 1
            for ii in range(unroll):
                if linear_index + stride * ii < size:
                    out[linear_index + stride * ii] = normals[ii]
    return out, ((size - 1) // (stride * unroll) + 1) * 4


def curand_normal4(seed: int, subsequence: int, state: int) -> list[float]:
    low, mask = 2**32, 2**32 - 1
    c, k = [state % low, state >> 32, subsequence % low, subsequence >> 32], [seed % low, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & mask, (a >> 32) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
    normals = []
    for x, y in ((c[0], c[1]), (c[2], c[3])):
        # Near 1, the logarithm of a uniform number is what its rounding to float32 has left of it.
        uniform = np.float32(float(np.float32(x)) / 2**32 + 0.5 / 2**32)
        radius = math.sqrt(-2.0 * math.log(uniform))
        angle = 2.0 * math.pi * (y + 0.5) / 2**32
        normals += [radius * math.sin(angle), radius * math.cos(angle)]
    return normals


@given(
    seed=st.integers(0, 2**64 - 1),
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=2),
    gpu=st.sampled_from([Gpu(1, 256), Gpu(1, 1024), Gpu(3, 400), Gpu(2, 1536), Gpu(40, 2048)]),
)
@settings(max_examples=25, deadline=None)
def test_the_kernel_thread_by_thread(seed: int, sizes: list[int], gpu: Gpu) -> None:
    generator, offset = CudaGenerator(seed, **gpu._asdict()), 0
    for size in sizes:
        expected, used = kernel(size, seed, offset, gpu)
        # float64 against float32 of the angle, near 2 pi, at a radius up to 5.
        np.testing.assert_allclose(generator.randn((size,)), expected, rtol=0, atol=5e-6)
        offset += used
        assert generator.offset == offset


@given(seed=seeds, shapes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300)), min_size=1, max_size=3))
@settings(max_examples=50, deadline=None)
def test_shape_and_type(seed: int, shapes: list[tuple[int, int]]) -> None:
    generator = CudaGenerator(seed)
    for shape in shapes:
        values = generator.randn(shape)
        assert values.shape == shape
        assert values.dtype == np.float32
        assert np.isfinite(values).all()


def test_an_empty_draw_uses_nothing_up() -> None:
    # distribution_nullary_kernel returns before it takes its share of the offset.
    generator = CudaGenerator(0)
    assert generator.randn((0, 4)).shape == (0, 4)
    assert generator.offset == 0


def test_all_64_bits_of_a_seed_count_and_a_negative_one_wraps() -> None:
    assert torch.Generator("cpu").manual_seed(-1).initial_seed() == 2**64 - 1
    np.testing.assert_array_equal(cuda_randn((8,), -1), cuda_randn((8,), 2**64 - 1))
    np.testing.assert_array_equal(cuda_randn((8,), -(2**63)), cuda_randn((8,), 2**63))
    assert (cuda_randn((8,), 1) != cuda_randn((8,), 2**32 + 1)).all()


def test_manual_seed_starts_again() -> None:
    generator = CudaGenerator(5)
    first = generator.randn((7,))
    generator.randn((3,))
    np.testing.assert_array_equal(generator.manual_seed(5).randn((7,)), first)


@pytest.mark.parametrize("gpu", [Gpu(2, 256), GPUS["H200"]])
def test_the_numbers_are_normal_and_uncorrelated(gpu: Gpu) -> None:
    size = 400_000
    values = cuda_randn((size,), 2024, **gpu._asdict()).astype(np.float64)
    # 5 standard errors of each estimate; the seed is fixed, so that this holds or does not.
    error = 5 / math.sqrt(size)
    assert abs(values.mean()) < error
    assert abs(values.var() - 1.0) < error * math.sqrt(2.0)
    assert abs(stats.skew(values)) < error * math.sqrt(6.0)
    assert abs(stats.kurtosis(values)) < error * math.sqrt(24.0)
    assert stats.kstest(values, "norm").pvalue > 1e-3
    for lag in (1, 256, 512):
        assert abs(np.mean(values[lag:] * values[:-lag])) < error


def test_words_at_both_ends_give_finite_numbers() -> None:
    # The smallest uniform is 2^-33. The largest word rounds up to 2^32, its uniform to 1, whose logarithm is 0; the
    # largest that does not is 2^-24 below.
    ends = np.array([0, 2**32 - 1, 2**32 - 129], np.uint64)
    out = np.empty((2, 3), np.float32)
    _box_muller(ends, np.array([0, 0, 0], np.uint64), out)
    np.testing.assert_allclose(out[1], [math.sqrt(66 * math.log(2)), 0.0, math.sqrt(2) * 2.0**-12], rtol=1e-6, atol=0)
    # An angle is half a unit above 0, so that its sine is not 0.
    np.testing.assert_allclose(out[0, 0] / out[1, 0], math.pi / 2**32, rtol=1e-6)
    assert np.isfinite(out).all()


def test_an_offset_of_more_than_32_bits() -> None:
    generator = CudaGenerator(0xFFFFFFFFFFFFFFFF)
    generator._calls = 2**32
    # The second thread's first number: cuRAND's curand_normal4 at offset 2^34.
    np.testing.assert_allclose(generator.randn((2,))[1], 1.57426882, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "geforce rtx 4090"])
def test_a_gpu_by_name(name: str) -> None:
    assert gpu_of(name) == Gpu(128, 1536)
    assert gpu_of("Tesla T4") == Gpu(40, 1024)


def test_a_gpu_that_is_not_known_is_refused() -> None:
    with pytest.raises(UsageError, match=r"gpu: expected one of T4, .*, got 'RTX 9999'"):
        gpu_of("RTX 9999")


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, True, None])
def test_a_seed_out_of_range_is_refused(seed: object) -> None:
    with pytest.raises(UsageError, match="seed: expected an integer"):
        CudaGenerator(seed)  # type: ignore[arg-type]


def test_what_no_gpu_has_is_refused() -> None:
    with pytest.raises(UsageError, match="multiprocessors: expected at least 1, got 0"):
        CudaGenerator(0, multiprocessors=0)
    with pytest.raises(UsageError, match="threads_per_multiprocessor: expected at least 256, got 128"):
        CudaGenerator(0, threads_per_multiprocessor=128)
    with pytest.raises(UsageError, match="shape: expected at most 2\\^29 elements"):
        CudaGenerator(0).randn((2**30,))
