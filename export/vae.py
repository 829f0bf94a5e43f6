"""The two halves of diffusers' AutoencoderKL, and the decoder of AutoencoderTiny (TAESD).

`scaling_factor` is not part of either half: the loop applies it. TAESD takes the latents as the loop has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from latentrt.runtime.specs import ModelSpec, TensorSpec

from .component import Component

LATENT = ("latent_height", "latent_width")
PIXEL = ("height", "width")


class VaeDecoder(nn.Module):
    """Latents to pictures. Holds its half of the VAE only, so that it counts its own parameters."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        """Latents (b, c, h/8, w/8), already divided by scaling_factor, to pictures (b, 3, h, w) in about [-1, 1]."""
        hidden = latent_sample if self.post_quant_conv is None else self.post_quant_conv(latent_sample)
        out: torch.Tensor = self.decoder(hidden)
        return out


class VaeEncoder(nn.Module):
    """Pictures to the parameters of the latent Gaussian. Holds its half of the VAE only."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.encoder = vae.encoder
        self.quant_conv = vae.quant_conv

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """Pictures (b, 3, h, w) in [-1, 1] to (b, 2·c, h/8, w/8): the mean, then the log variance."""
        hidden = self.encoder(sample)
        out: torch.Tensor = hidden if self.quant_conv is None else self.quant_conv(hidden)
        return out


class TinyDecoder(nn.Module):
    """The decoder half of an `AutoencoderTiny`."""

    def __init__(self, taesd: Any) -> None:
        super().__init__()
        self.decoder = taesd.decoder

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        """Latents (b, c, h/8, w/8), not divided by scaling_factor, to pictures (b, 3, h, w) in about [-1, 1]."""
        out: torch.Tensor = self.decoder(latent_sample)
        return out


def vae_decoder_component(vae: Any) -> Component:
    """Wrap the decoder half of an `AutoencoderKL` (float32, eval)."""
    return _decoder("vae_decoder", VaeDecoder(vae), vae.config, _factor(vae.config.block_out_channels))


def taesd_decoder_component(taesd: Any) -> Component:
    """Wrap the decoder half of an `AutoencoderTiny` (float32, eval)."""
    return _decoder("taesd_decoder", TinyDecoder(taesd), taesd.config, _factor(taesd.config.decoder_block_out_channels))


def _factor(widths: Sequence[int]) -> int:
    """Pixels per latent of a network that halves its size between these levels."""
    return int(2 ** (len(widths) - 1))


def _decoder(name: str, module: nn.Module, config: Any, factor: int) -> Component:
    channels = int(config.latent_channels)
    # An expression of the input's names, which optimum evaluates to allocate buffers.
    pixels = [f"{size} * {factor}" for size in LATENT]
    return Component(
        module=module.eval(),
        example_inputs={"latent_sample": torch.linspace(-2, 2, 2 * channels * 35).reshape(2, channels, 5, 7)},
        spec=ModelSpec(
            name=name,
            inputs=(TensorSpec("latent_sample", "float32", ("batch", channels, *LATENT)),),
            outputs=(TensorSpec("sample", "float32", ("batch", int(config.out_channels), *pixels)),),
        ),
    )


def vae_encoder_component(vae: Any) -> Component:
    """Wrap the encoder half of an `AutoencoderKL` (float32, eval)."""
    config = vae.config
    channels, factor = int(config.in_channels), _factor(config.block_out_channels)
    height, width = 5 * factor, 7 * factor
    latents = [f"{size} / {factor}" for size in PIXEL]
    return Component(
        module=VaeEncoder(vae).eval(),
        example_inputs={
            "sample": torch.linspace(-1, 1, 2 * channels * height * width).reshape(2, channels, height, width)
        },
        spec=ModelSpec(
            name="vae_encoder",
            inputs=(TensorSpec("sample", "float32", ("batch", channels, *PIXEL)),),
            outputs=(TensorSpec("latent_parameters", "float32", ("batch", 2 * int(config.latent_channels), *latents)),),
        ),
    )
