"""torch_rng against torch.randn itself, whole arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.runtime.errors import UsageError
from latentrt.runtime.torch_rng import TorchGenerator, torch_randn

# PyTorch's float32 log, sin and cos are vectorised approximations: 1 ulp of log near its zero and 1 ulp of an angle
# up to 2 pi (2.4e-7), times a radius up to 5.9. Measured: 4.8e-7. Another stream of integers is off by about 1.
ATOL = 2e-6

seeds = st.integers(-(2**63), 2**64 - 1)


def reference(generator: torch.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return torch.randn(shape, generator=generator).numpy()


@given(seed=seeds, size=st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_any_seed_and_size(seed: int, size: int) -> None:
    expected = reference(torch.Generator("cpu").manual_seed(seed), (size,))
    actual = torch_randn((size,), seed)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ATOL)


@given(seed=seeds, size=st.integers(1, 10**6))
@settings(max_examples=30, deadline=None)
def test_any_seed_and_size_up_to_a_million(seed: int, size: int) -> None:
    expected = reference(torch.Generator("cpu").manual_seed(seed), (size,))
    np.testing.assert_allclose(torch_randn((size,), seed), expected, rtol=0, atol=ATOL)


@given(seed=seeds, sizes=st.lists(st.integers(0, 40), min_size=2, max_size=8))
@settings(max_examples=150, deadline=None)
def test_successive_draws_share_one_state(seed: int, sizes: list[int]) -> None:
    # Sizes on both sides of 16: the kept half of a small draw's pair must survive a large draw.
    ours, theirs = TorchGenerator(seed), torch.Generator("cpu").manual_seed(seed)
    for size in sizes:
        np.testing.assert_allclose(ours.randn((size,)), reference(theirs, (size,)), rtol=0, atol=ATOL)


@pytest.mark.parametrize("shape", [(1, 4, 64, 64), (2, 4, 8, 8), (1, 4, 96, 97), (3, 5), (4, 4), ()])
@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 2**32, 2**63])
def test_shapes_of_latents(shape: tuple[int, ...], seed: int) -> None:
    expected = reference(torch.Generator("cpu").manual_seed(seed), shape)
    actual = torch_randn(shape, seed)
    assert actual.shape == shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=ATOL)


def test_a_million_elements_in_any_shape() -> None:
    shape = (5, 8, 1000, 25)
    expected = reference(torch.Generator("cpu").manual_seed(3), shape)
    np.testing.assert_allclose(torch_randn(shape, 3), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_are_these_rounded(dtype: torch.dtype) -> None:
    generator = torch.Generator("cpu").manual_seed(8)
    expected = torch.randn((2, 4, 24, 40), generator=generator, dtype=dtype)
    rounded = torch.from_numpy(torch_randn((2, 4, 24, 40), 8)).to(dtype)
    # The last bit of float32 decides a rounding now and then: by one ulp.
    assert (rounded != expected).float().mean() < 1e-3
    torch.testing.assert_close(rounded, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_manual_seed_starts_again() -> None:
    # After one number: the other of its pair must not be kept.
    ours, theirs = TorchGenerator(1), torch.Generator("cpu").manual_seed(1)
    ours.randn((1,))
    reference(theirs, (1,))
    actual = ours.manual_seed(-2).randn((5,))
    np.testing.assert_allclose(actual, reference(theirs.manual_seed(-2), (5,)), rtol=0, atol=ATOL)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.5, True, math.nan, "1", None])
def test_a_seed_out_of_range_is_refused(seed: object) -> None:
    with pytest.raises(UsageError, match="seed: expected an integer"):
        TorchGenerator(seed)  # type: ignore[arg-type]
