"""The denoiser: diffusers' UNet2DConditionModel, with one timestep per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from latentrt.runtime.specs import ModelSpec, TensorSpec

from .component import Component


class UNet(nn.Module):
    """The U-Net as a function of its three tensors."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Latents (b, c, h/8, w/8), timesteps (b,), text (b, 77·k, d) to the prediction, shaped as the latents."""
        out: torch.Tensor = self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0]
        return out


def unet_component(unet: Any) -> Component:
    """Wrap a `UNet2DConditionModel` (float32, eval).

    It is traced on latents that its downsampling does not divide: diffusers then upsamples to the size of the
    skip connection instead of by two, which gives the same numbers on every size and a graph that takes them all.
    """
    config = unet.config
    factor = 2 ** (len(config.block_out_channels) - 1)
    text, channels = int(config.cross_attention_dim), int(config.in_channels)
    height, width = 3 * factor + 1, 2 * factor + 1
    shape = ("batch", channels, "latent_height", "latent_width")
    return Component(
        module=UNet(unet).eval(),
        example_inputs={
            "sample": torch.linspace(-2, 2, 2 * channels * height * width).reshape(2, channels, height, width),
            "timestep": torch.tensor([1.0, 500.0]),
            "encoder_hidden_states": torch.linspace(-1, 1, 2 * 77 * text).reshape(2, 77, text),
        },
        spec=ModelSpec(
            name="unet",
            inputs=(
                TensorSpec("sample", "float32", shape),
                TensorSpec("timestep", "float32", ("batch",)),
                TensorSpec("encoder_hidden_states", "float32", ("batch", "sequence_length", text)),
            ),
            outputs=(TensorSpec("out_sample", "float32", (shape[0], int(config.out_channels), shape[2], shape[3])),),
        ),
    )
