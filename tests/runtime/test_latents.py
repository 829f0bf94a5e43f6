from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch_vae import TorchSession, decoder, encoder, scene_pictures, shapes_vae

from latentrt.runtime.errors import BackendError, ConfigError, UsageError
from latentrt.runtime.latents import (
    LatentDistribution,
    check_pictures,
    decode_latents,
    encode_image,
    latent_shape,
    sample_latents,
    vae_factor,
)
from latentrt.runtime.pixels import to_sample


def test_encoding_is_diffusers_latent_distribution() -> None:
    pictures = scene_pictures(2)
    with torch.no_grad():
        expected = shapes_vae().encode(torch.from_numpy(to_sample(pictures))).latent_dist
    distribution = encode_image(encoder(), pictures)
    # The values reach 14, and PyTorch sums a batch of two in another order than one picture.
    np.testing.assert_allclose(distribution.mean, expected.mean.numpy(), rtol=0, atol=5e-5)
    np.testing.assert_allclose(distribution.std, expected.std.numpy(), rtol=1e-4)
    noise = np.random.default_rng(0).standard_normal(distribution.mean.shape).astype(np.float32)
    latents = sample_latents(distribution, noise, scaling_factor=0.26618, shift_factor=0.1)
    drawn = expected.mean + expected.std * torch.from_numpy(noise)
    np.testing.assert_allclose(latents, ((drawn - 0.1) * 0.26618).numpy(), rtol=0, atol=1e-5)
    mode = sample_latents(distribution, None, scaling_factor=0.26618)
    np.testing.assert_allclose(mode, (expected.mode() * 0.26618).numpy(), rtol=0, atol=1e-5)


def test_log_variance_is_clipped_as_in_diffusers() -> None:
    rng = np.random.default_rng(0)
    parameters = (rng.standard_normal((1, 8, 4, 4)) * 40).astype(np.float32)
    assert parameters[:, 4:].min() < -30
    assert parameters[:, 4:].max() > 20
    session = TorchSession("vae_encoder", "latent_parameters", lambda _: torch.from_numpy(parameters))
    distribution = encode_image(session, np.zeros((1, 32, 32, 3), np.uint8))
    expected = DiagonalGaussianDistribution(torch.from_numpy(parameters))
    np.testing.assert_array_equal(distribution.mean, expected.mean.numpy())
    np.testing.assert_allclose(distribution.std, expected.std.numpy(), rtol=1e-6)


def test_pictures_come_back_and_do_not_depend_on_their_batch() -> None:
    pictures = scene_pictures(3)
    latents = sample_latents(encode_image(encoder(), pictures), None, scaling_factor=0.5, shift_factor=0.25)
    decoded = decode_latents(decoder(), latents, scaling_factor=0.5, shift_factor=0.25)
    assert 10 * np.log10(255**2 / np.mean((decoded.astype(float) - pictures) ** 2)) > 25
    alone = decode_latents(decoder(), latents[1:2], scaling_factor=0.5, shift_factor=0.25)
    np.testing.assert_array_equal(decoded[1:2], alone)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_is_refused_on_the_way_out_and_in(value: float) -> None:
    def spoilt(tensor: torch.Tensor) -> torch.Tensor:
        result = torch.zeros(1, 8, 8, 8)
        result[0, 1, 2, 3] = value
        return result

    with pytest.raises(BackendError, match=r"vae_decoder \(torch\): expected finite numbers.* in fp32"):
        decode_latents(TorchSession("vae_decoder", "sample", spoilt), np.zeros((2, 4, 1, 1)), scaling_factor=1)
    with pytest.raises(BackendError, match=r"vae_encoder \(torch\): expected finite numbers.* in fp32"):
        encode_image(TorchSession("vae_encoder", "latent_parameters", spoilt), np.zeros((1, 64, 64, 3), np.uint8))


def test_a_black_picture_is_refused_by_its_number() -> None:
    pictures = np.zeros((3, 4, 4, 3), np.uint8)
    pictures[0, 3, 3, 2] = pictures[2] = 1
    with pytest.raises(BackendError, match=r"picture \[1\] of 3.*fp16.*fp32"):
        check_pictures(pictures)
    check_pictures(pictures[[0, 2]])


def test_noise_of_another_shape_is_refused() -> None:
    one = np.ones((1, 4, 2, 2), np.float32)
    with pytest.raises(UsageError, match="noise: expected shape"):
        sample_latents(LatentDistribution(one, one), one[:, :, :1], scaling_factor=1)


@pytest.mark.parametrize("config", [{}, {"block_out_channels": []}, {"block_out_channels": 3}])
def test_factor_needs_blocks(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="block_out_channels"):
        vae_factor(config)


def test_latent_shape() -> None:
    assert vae_factor({"block_out_channels": [1, 2, 3, 4]}) == 8
    assert latent_shape(2, 64, 128, channels=4, factor=8) == (2, 4, 8, 16)
    with pytest.raises(UsageError, match=r"width: expected a positive multiple of 8, got 100\. Use 96 or 104"):
        latent_shape(1, 64, 100, channels=4, factor=8)
