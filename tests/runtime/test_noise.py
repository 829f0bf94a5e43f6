"""noise against torch generators, and A1111's rules written out one column and one image at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.runtime import torch_rng
from latentrt.runtime.cuda_rng import Gpu, cuda_randn
from latentrt.runtime.errors import UsageError
from latentrt.runtime.noise import RNGS, Rng, batch_noise, batch_seeds, noise_generator, variation_noise
from latentrt.runtime.torch_rng import torch_randn

# As in test_torch_rng.
ATOL = 2e-6

rngs = st.sampled_from(RNGS)


def torch_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


def test_a_batch_draws_row_i_from_seed_plus_i_and_draws_on() -> None:
    noise = batch_noise(7, 3)
    generators = [torch.Generator("cpu").manual_seed(7 + i) for i in range(3)]
    for _ in range(3):
        expected = np.concatenate([torch.randn((1, 4, 5, 5), generator=each).numpy() for each in generators])
        actual = noise((3, 4, 5, 5))
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("rng", RNGS)
def test_each_kind_is_its_own_generators(rng: Rng) -> None:
    noise = batch_noise(11, 2, rng=rng)
    kinds: dict[Rng, Callable[[int], np.ndarray]] = {
        "cpu": lambda seed: torch_randn((1, 4, 6, 5), seed),
        "cuda": lambda seed: cuda_randn((1, 4, 6, 5), seed),
        "numpy": lambda seed: np.random.default_rng(seed).standard_normal((1, 4, 6, 5), np.float32),
    }
    np.testing.assert_array_equal(noise((2, 4, 6, 5)), np.concatenate([kinds[rng](11), kinds[rng](12)]))


@given(
    seed=st.integers(-(2**63), 2**64 - 5),
    size=st.integers(1, 4),
    rng=rngs,
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3),
    variation=st.sampled_from([0.0, 0.3, 1.0]),
    resize=st.sampled_from([None, (3, 4), (12, 2)]),
)
@settings(max_examples=80, deadline=None)
def test_an_image_is_the_same_in_any_batch(
    seed: int,
    size: int,
    rng: Rng,
    shapes: list[tuple[int, int, int]],
    variation: float,
    resize: tuple[int, int] | None,
) -> None:
    options: dict[str, Any] = {"rng": rng, "variation_strength": variation, "resize_from": resize}
    seeds, variation_seeds = batch_seeds(seed, size, variation_seed=5, variation_strength=variation)
    together = batch_noise(seed, size, variation_seed=5, **options)
    alone = [
        batch_noise(own, 1, variation_seed=other, **options) for own, other in zip(seeds, variation_seeds, strict=True)
    ]
    by_list = batch_noise(seeds, variation_seed=variation_seeds, **options)
    for shape in shapes:
        expected = np.concatenate([each((1, *shape)) for each in alone])
        np.testing.assert_array_equal(together((size, *shape)), expected)
        np.testing.assert_array_equal(by_list((size, *shape)), expected)


def test_a_list_of_seeds_is_one_for_each_row() -> None:
    seeds = [3, 2**64 - 1, -1, 3]
    values = batch_noise(seeds)((4, 2, 3, 3))
    np.testing.assert_array_equal(values, np.concatenate([torch_randn((1, 2, 3, 3), seed) for seed in seeds]))


def test_the_gpu_is_chosen_by_name_or_by_its_numbers() -> None:
    shape = (1, 4, 128, 128)
    on_t4 = batch_noise(1, rng="cuda", gpu="T4")(shape)
    np.testing.assert_array_equal(on_t4, cuda_randn(shape, 1, multiprocessors=40, threads_per_multiprocessor=1024))
    np.testing.assert_array_equal(on_t4, batch_noise(1, rng="cuda", gpu=Gpu(40, 1024))(shape))
    assert (on_t4 != batch_noise(1, rng="cuda")(shape)).any()


def test_the_earlier_name_still_works() -> None:
    np.testing.assert_array_equal(torch_rng.batch_noise(4, 2)((2, 3)), batch_noise(4, 2)((2, 3)))


# Seeds of a batch


def test_seeds_count_up_without_a_variation_and_stay_with_one() -> None:
    assert batch_seeds(10, 3) == ([10, 11, 12], [0, 1, 2])
    assert batch_seeds(10, 3, variation_seed=50, variation_strength=0.0) == ([10, 11, 12], [50, 51, 52])
    assert batch_seeds(10, 3, variation_seed=50, variation_strength=0.1) == ([10, 10, 10], [50, 51, 52])
    assert batch_seeds([1, 9], variation_strength=0.5) == ([1, 9], [0, 1])
    assert batch_seeds(-1, 2) == ([-1, 0], [0, 1])
    assert batch_seeds(5) == ([5], [0])


def test_seeds_past_the_last_are_refused() -> None:
    assert batch_seeds(2**64 - 2, 2)[0] == [2**64 - 2, 2**64 - 1]
    with pytest.raises(
        UsageError, match=r"seed: expected seed \+ 2 below 2\^64 for 3 images, got 18446744073709551614"
    ):
        batch_noise(2**64 - 2, 3)
    with pytest.raises(UsageError, match=r"variation_seed: expected variation_seed \+ 1 below 2\^64"):
        batch_noise(0, 2, variation_seed=2**64 - 1, variation_strength=0.5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": [1, 2], "batch_size": 3},
        {"seed": []},
        {"seed": 1, "batch_size": 0},
        {"seed": [1, 2], "variation_seed": [1, 2, 3]},
    ],
)
def test_seeds_that_do_not_fit_the_batch_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="seeds: expected one for each of"):
        batch_noise(**arguments)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, True, math.nan, "1", None, [1.5]])
@pytest.mark.parametrize("rng", RNGS)
def test_a_seed_out_of_range_is_refused(seed: Any, rng: Rng) -> None:
    with pytest.raises(UsageError, match="seed"):
        batch_noise(seed, rng=rng)


def test_other_arguments_are_checked() -> None:
    with pytest.raises(UsageError, match="rng: expected one of cpu, cuda, numpy, got 'gpu'"):
        batch_noise(0, rng="gpu")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="variation_strength: expected 0 to 1, got nan"):
        batch_noise(0, variation_strength=math.nan)
    with pytest.raises(UsageError, match=r"noise: expected a shape of 2 rows, got \(3, 4\)"):
        batch_noise(0, 2)((3, 4))
    with pytest.raises(UsageError, match=r"variation: expected the noise's shape \(1, 2\), got \(2, 1\)"):
        variation_noise(np.zeros((1, 2), np.float32), np.zeros((2, 1), np.float32), 0.5)


# Variations


def turned(low: np.ndarray, high: np.ndarray, strength: float) -> np.ndarray:
    """Spherical interpolation of one image (c, h, w), column by column, in float64."""
    out = np.empty(low.shape)
    for channel in range(low.shape[0]):
        for column in range(low.shape[2]):
            a, b = low[channel, :, column].astype(float), high[channel, :, column].astype(float)
            angle = math.acos(np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b)))
            out[channel, :, column] = (math.sin((1 - strength) * angle) * a + math.sin(strength * angle) * b) / (
                math.sin(angle)
            )
    return out


@pytest.mark.parametrize("strength", [0.05, 0.5, 0.9, 1.0])
def test_a_variation_is_turned_along_the_arc(strength: float) -> None:
    shape = (4, 9, 7)
    noise = batch_noise(1, 2, variation_seed=100, variation_strength=strength)
    expected = [turned(torch_noise(1, shape), torch_noise(100 + i, shape), strength) for i in range(2)]
    np.testing.assert_allclose(noise((2, *shape)), np.stack(expected), rtol=0, atol=1e-5)
    # What comes after the first draw is the seed's own, and the same for both images.
    generator = torch.Generator("cpu").manual_seed(1)
    torch.randn(shape, generator=generator)
    second = torch.randn(shape, generator=generator).numpy()
    np.testing.assert_allclose(noise((2, *shape)), np.stack([second, second]), rtol=0, atol=ATOL)


def test_the_ends_of_the_arc() -> None:
    a, b = torch_noise(1, (2, 3, 8, 8)), torch_noise(2, (2, 3, 8, 8))
    np.testing.assert_array_equal(variation_noise(a, b, 0.0), a)
    np.testing.assert_allclose(variation_noise(a, b, 1.0), b, rtol=0, atol=1e-5)


def test_a_variation_keeps_the_variance() -> None:
    a, b = torch_noise(1, (1, 4, 64, 64)), torch_noise(2, (1, 4, 64, 64))
    halfway = variation_noise(a, b, 0.5)
    # A straight line would halve it; 16384 numbers estimate it to 0.011.
    assert abs(halfway.var() - 1.0) < 0.05


def test_parallel_noises_are_interpolated_straight() -> None:
    a = torch_noise(1, (2, 3, 8, 8))
    np.testing.assert_allclose(variation_noise(a, np.float32(1.5) * a, 0.25), a * 1.125, rtol=1e-6)
    np.testing.assert_allclose(variation_noise(a, a, 0.7), a, rtol=1e-6)


def test_single_rows_do_not_divide_by_zero() -> None:
    # Over a height of one the angle is 0 or pi, and its sine 0.
    assert np.isfinite(variation_noise(torch_noise(1, (1, 4, 1, 8)), torch_noise(2, (1, 4, 1, 8)), 0.5)).all()


# Resizing


@pytest.mark.parametrize(
    ("shape", "smaller", "into", "out_of"),
    [
        ((8, 10), (4, 6), (slice(2, 6), slice(2, 8)), (slice(0, 4), slice(0, 6))),
        ((8, 10), (12, 6), (slice(0, 8), slice(2, 8)), (slice(2, 10), slice(0, 6))),
        ((8, 10), (5, 13), (slice(1, 6), slice(0, 9)), (slice(0, 5), slice(2, 11))),
        ((8, 10), (8, 10), (slice(0, 8), slice(0, 10)), (slice(0, 8), slice(0, 10))),
    ],
)
def test_a_picture_resized_keeps_its_centre(
    shape: tuple[int, int], smaller: tuple[int, int], into: tuple[slice, slice], out_of: tuple[slice, slice]
) -> None:
    noise = batch_noise(6, 2, resize_from=smaller)
    expected = np.stack([torch_noise(6 + i, (4, *shape)) for i in range(2)])
    for i in range(2):
        expected[(i, slice(None), *into)] = torch_noise(6 + i, (4, *smaller))[(slice(None), *out_of)]
    np.testing.assert_allclose(noise((2, 4, *shape)), expected, rtol=0, atol=ATOL)


def test_a_variation_is_made_at_the_size_it_is_resized_from() -> None:
    noise = batch_noise(6, variation_seed=9, variation_strength=0.4, resize_from=(4, 4))
    expected = torch_noise(6, (4, 8, 8))
    expected[:, 2:6, 2:6] = turned(torch_noise(6, (4, 4, 4)), torch_noise(9, (4, 4, 4)), 0.4)
    np.testing.assert_allclose(noise((1, 4, 8, 8))[0], expected, rtol=0, atol=1e-5)


def test_later_draws_from_other_seeds() -> None:
    noise = batch_noise(6, 2, later_seed_delta=31337)
    first = np.stack([torch_noise(6 + i, (4, 5, 5)) for i in range(2)])
    np.testing.assert_allclose(noise((2, 4, 5, 5)), first, rtol=0, atol=ATOL)
    generators = [torch.Generator("cpu").manual_seed(31343 + i) for i in range(2)]
    for _ in range(2):
        expected = np.stack([torch.randn((4, 5, 5), generator=each).numpy() for each in generators])
        np.testing.assert_allclose(noise((2, 4, 5, 5)), expected, rtol=0, atol=ATOL)


@given(seed=st.integers(-(2**63), 2**64 - 1), rng=rngs, size=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_a_generator_starts_again_with_its_seed(seed: int, rng: Rng, size: int) -> None:
    generator = noise_generator(seed, rng=rng)
    first = generator.randn((size,))
    np.testing.assert_array_equal(generator.manual_seed(seed).randn((size,)), first)
