from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from latentrt.calibrate.budget import LARGEST_DB
from latentrt.calibrate.picture_metrics import BUILT_IN, flip, mean_interval, psnr, spread, ssim
from latentrt.runtime.errors import UsageError
from latentrt.runtime.image import Pictures

WHOLE = hnp.arrays(np.uint8, (1, 12, 13, 3))


def flat(*levels: int, side: int = 16) -> Pictures:
    """A picture of one grey for each level."""
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def noisy(seed: int, *, count: int = 3, side: int = 24) -> tuple[Pictures, Pictures]:
    rng = np.random.default_rng(seed)
    reference = rng.integers(0, 256, (count, side, side + 5, 3), dtype=np.uint8)
    moved = reference.astype(int) + rng.integers(-30, 31, reference.shape)
    return reference, np.clip(moved, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("step", [1, 5, 100])
def test_psnr_of_a_known_error(step: int) -> None:
    reference = flat(20, 120)
    moved = reference + np.uint8(step)
    np.testing.assert_allclose(psnr(reference, moved), 20 * np.log10(255 / step))
    moved[0, :8] = reference[0, :8]  # half of the pixels: half of the power
    np.testing.assert_allclose(psnr(reference, moved)[0], 20 * np.log10(255 / step) + 10 * np.log10(2))


def test_psnr_of_gaussian_noise() -> None:
    # The study's figures for noise of standard deviation 1, 2 and 4; rounding to levels adds a twelfth.
    rng = np.random.default_rng(0)
    reference = flat(128, side=256)
    for sigma in (2.0, 4.0):
        moved = np.rint(reference + rng.normal(0, sigma, reference.shape)).astype(np.uint8)
        assert psnr(reference, moved)[0] == pytest.approx(10 * np.log10(255**2 / (sigma**2 + 1 / 12)), abs=0.05)


def window_weights() -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    one = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.outer(one, one) / one.sum() ** 2
    return weights


def test_ssim_is_that_of_wang_et_al() -> None:
    reference, moved = noisy(1, count=2, side=17)
    weights = window_weights()
    expected = []
    for one, other in zip(reference.astype(float), moved.astype(float), strict=True):
        values = []
        for channel in range(3):
            for y in range(one.shape[0] - 10):
                for x in range(one.shape[1] - 10):
                    a, b = (each[y : y + 11, x : x + 11, channel] for each in (one, other))
                    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
                    spread_a, spread_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
                    both = (weights * (a - mean_a) * (b - mean_b)).sum()
                    c1, c2 = 2.55**2, 7.65**2
                    values.append(
                        (2 * mean_a * mean_b + c1)
                        * (2 * both + c2)
                        / ((mean_a**2 + mean_b**2 + c1) * (spread_a + spread_b + c2))
                    )
        expected.append(np.mean(values))
    np.testing.assert_allclose(ssim(reference, moved), expected, rtol=1e-9)


def test_ssim_of_flat_pictures_compares_their_brightness() -> None:
    c1 = 2.55**2
    expected = (2 * 50 * 80 + c1) / (50**2 + 80**2 + c1)
    np.testing.assert_allclose(ssim(flat(50), flat(80)), [expected])


def hunt_adjusted(rgb: tuple[float, float, float]) -> tuple[float, float, float]:
    """L*a*b* of linear RGB under D65, chroma scaled by lightness as FLIP does (Hunt effect)."""
    to_xyz = np.array(
        [[0.4123908, 0.3575843, 0.1804808], [0.2126390, 0.7151687, 0.0721923], [0.0193308, 0.1191948, 0.9505322]]
    )
    relative = to_xyz @ np.array(rgb) / to_xyz.sum(1)
    fx, fy, fz = (t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in relative)
    lightness = 116 * fy - 16
    return lightness, 0.01 * lightness * 500 * (fx - fy), 0.01 * lightness * 200 * (fy - fz)


def hyab(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    return float(abs(one[0] - other[0]) + np.hypot(one[1] - other[1], one[2] - other[2]))


def test_flip_of_black_and_white_is_that_of_andersson_et_al() -> None:
    # Flat pictures have no edges, so only the colour term is left: section 4.1 of the paper, written out.
    largest = hyab(hunt_adjusted((0, 1, 0)), hunt_adjusted((0, 0, 1))) ** 0.7
    error = hyab(hunt_adjusted((0, 0, 0)), hunt_adjusted((1, 1, 1))) ** 0.7
    expected = 0.95 + (error - 0.4 * largest) / (largest - 0.4 * largest) * 0.05
    np.testing.assert_allclose(flip(flat(0), flat(255)), [expected], atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(WHOLE)
def test_equal_pictures_are_perfect(picture: Pictures) -> None:
    assert psnr(picture, picture).tolist() == [LARGEST_DB]
    assert ssim(picture, picture).tolist() == pytest.approx([1.0])
    assert flip(picture, picture).tolist() == [0.0]


@settings(max_examples=20, deadline=None)
@given(WHOLE, WHOLE)
def test_psnr_and_ssim_do_not_depend_on_which_is_the_reference(one: Pictures, other: Pictures) -> None:
    np.testing.assert_allclose(psnr(one, other), psnr(other, one))
    np.testing.assert_allclose(ssim(one, other), ssim(other, one))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_picture_s_value_is_its_own(name: str) -> None:
    reference, moved = noisy(2)
    moved[1] = reference[1]
    together = BUILT_IN[name](reference, moved)
    alone = [BUILT_IN[name](reference[i : i + 1], moved[i : i + 1])[0] for i in range(3)]
    np.testing.assert_array_equal(together, alone)
    assert together[1] == {"psnr": LARGEST_DB, "ssim": pytest.approx(1), "flip": 0}[name]


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_no_pair_of_pictures_is_refused(name: str) -> None:
    pictures = flat(1, 2)
    others: list[Any] = [pictures[:1], pictures[0], pictures[..., :1], pictures.astype(np.float32)]
    for other in others:
        with pytest.raises(UsageError, match=r"expected two uint8 arrays \(n, h, w, 3\) of one shape"):
            BUILT_IN[name](pictures, other)


def test_ssim_needs_a_whole_window() -> None:
    ssim(flat(1, side=11), flat(2, side=11))
    with pytest.raises(UsageError, match="at least 11 x 11"):
        ssim(flat(1, side=10), flat(2, side=10))


def test_spread_knows_which_end_is_bad() -> None:
    values = np.arange(101.0)
    rising, falling = spread("psnr", values), spread("flip", values)
    assert (rising.worst, rising.tail) == (0.0, 5.0)
    assert (falling.worst, falling.tail) == (100.0, 95.0)
    assert rising.mean == falling.mean == 50.0
    assert rising.values == tuple(values)


def test_interval_of_the_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(3).normal(10, 2, 400)
    half = 1.96 * values.std() / 20
    low, high = mean_interval(values)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert mean_interval(values) == (low, high)
    assert mean_interval(values, seed=1) != (low, high)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf]])
def test_values_that_are_none_are_refused(values: list[float]) -> None:
    with pytest.raises(UsageError, match="expected finite values of pictures"):
        spread("psnr", np.array(values))
