"""diffusers' ControlNetModel, with one timestep and one strength per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from latentrt.runtime.specs import ModelSpec, TensorSpec

from .component import Component
from .unet import conditions, example_size, ramp, residual_specs

DOWN_SAMPLE, MID_SAMPLE = "down_block_res_sample_", "mid_block_res_sample"


class ControlNet(nn.Module):
    """The ControlNet as a function of its tensors."""

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.controlnet = controlnet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        *,
        controlnet_cond: torch.Tensor,
        conditioning_scale: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """What to add to the U-Net's skip connections and, last, to its middle block.

        Args:
            controlnet_cond: pictures (b, 3, h, w) in [0, 1].
            conditioning_scale: factor of everything returned, (b,).
        """
        down, mid = self.controlnet(
            sample,
            timestep,
            encoder_hidden_states,
            controlnet_cond=controlnet_cond,
            added_cond_kwargs=None if time_ids is None else {"text_embeds": text_embeds, "time_ids": time_ids},
            return_dict=False,
        )
        scale = conditioning_scale[:, None, None, None]
        return tuple(residual * scale for residual in (*down, mid))


def controlnet_component(controlnet: Any, name: str, *, pooled: int | None = None, ids: int | None = None) -> Component:
    """Wrap a `ControlNetModel` (float32, eval).

    Args:
        name: of the component: controlnet, controlnet_2…
        pooled: width of SDXL's pooled text embedding.
        ids: number of SDXL's time ids.
    """
    config = controlnet.config
    text, channels, colours = (
        int(config[name]) for name in ("cross_attention_dim", "in_channels", "conditioning_channels")
    )
    height, width = example_size(config)
    factor = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    extra = conditions(config, pooled=pooled, ids=ids)
    return Component(
        module=ControlNet(controlnet).eval(),
        example_inputs={
            "sample": ramp(2, channels, height, width, low=-2, high=2),
            "timestep": torch.tensor([1.0, 500.0]),
            "encoder_hidden_states": ramp(2, 77, text),
            **{name: example for name, (example, _) in extra.items()},
            "controlnet_cond": ramp(2, colours, factor * height, factor * width, low=0),
            "conditioning_scale": torch.tensor([0.5, 1.0]),
        },
        spec=ModelSpec(
            name=name,
            inputs=(
                TensorSpec("sample", "float32", ("batch", channels, "latent_height", "latent_width")),
                TensorSpec("timestep", "float32", ("batch",)),
                TensorSpec("encoder_hidden_states", "float32", ("batch", "sequence_length", text)),
                *(spec for _, spec in extra.values()),
                TensorSpec("controlnet_cond", "float32", ("batch", colours, "height", "width")),
                TensorSpec("conditioning_scale", "float32", ("batch",)),
            ),
            outputs=tuple(residual_specs(config, down=DOWN_SAMPLE, mid=MID_SAMPLE)),
        ),
    )
