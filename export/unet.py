"""The denoiser: diffusers' UNet2DConditionModel, with one timestep per row."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from latentrt.runtime.specs import ModelSpec, TensorSpec

from .component import Component

DOWN_RESIDUAL, MID_RESIDUAL = "down_block_additional_residual_", "mid_block_additional_residual"


class UNet(nn.Module):
    """The U-Net as a function of its tensors; those that a family does not have are left out."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        residuals: tuple[torch.Tensor, ...] = (),
    ) -> torch.Tensor:
        """Latents (b, c, h/8, w/8), timesteps (b,), text (b, 77·k, d) to the prediction, shaped as the latents.

        Args:
            text_embeds: SDXL's pooled text (b, p).
            time_ids: SDXL's sizes, crops and scores (b, 6 or 5).
            timestep_cond: the embedded guidance scale (b, c) of a distilled model.
            residuals: of ControlNets, in order, the middle block's last.
        """
        *down, mid = residuals or (None,)
        out: torch.Tensor = self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=timestep_cond,
            added_cond_kwargs=None if time_ids is None else {"text_embeds": text_embeds, "time_ids": time_ids},
            down_block_additional_residuals=tuple(down) or None,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        return out


def example_size(config: Any) -> tuple[int, int]:
    """A latent size that the U-Net's downsampling does not divide.

    diffusers then upsamples to the size of the skip connection instead of by two, which gives the same numbers on
    every size and a graph that takes them all.
    """
    factor = 2 ** (len(config.block_out_channels) - 1)
    return 3 * factor + 1, 2 * factor + 1


def ramp(*shape: int, low: float = -1, high: float = 1) -> torch.Tensor:
    """Example values: evenly spaced over a range."""
    return torch.linspace(low, high, int(torch.Size(shape).numel())).reshape(shape)


def conditions(config: Any, *, pooled: int | None, ids: int | None) -> dict[str, tuple[torch.Tensor, TensorSpec]]:
    """What a U-Net or ControlNet takes beside latents, timestep and text: name -> example and spec."""
    found = {}
    if config.addition_embed_type == "text_time" and pooled is not None and ids is not None:
        found["text_embeds"] = ramp(2, pooled), TensorSpec("text_embeds", "float32", ("batch", pooled))
        found["time_ids"] = ramp(2, ids, low=0, high=64), TensorSpec("time_ids", "float32", ("batch", ids))
    width = config.get("time_cond_proj_dim")
    if width is not None:
        found["timestep_cond"] = ramp(2, width), TensorSpec("timestep_cond", "float32", ("batch", width))
    return found


def residual_specs(config: Any, *, down: str, mid: str) -> list[TensorSpec]:
    """The feature maps that a ControlNet adds to a U-Net: one for each skip connection, and the middle block's.

    Level n of the U-Net has latents of 1 / 2^n the size; its dimensions are latent_height_2, latent_height_4…
    """
    channels, layers = config.block_out_channels, config.layers_per_block
    layers = [layers] * len(channels) if isinstance(layers, int) else list(layers)
    levels = [(channels[0], 0)]
    for level, (width, count) in enumerate(zip(channels, layers, strict=True)):
        levels += [(width, level)] * count
        if level < len(channels) - 1:
            levels.append((width, level + 1))
    shapes = [_level_shape(width, level) for width, level in levels]
    middle = _level_shape(channels[-1], len(channels) - 1)
    return [
        *(TensorSpec(f"{down}{index}", "float32", shape) for index, shape in enumerate(shapes)),
        TensorSpec(mid, "float32", middle),
    ]


def _level_shape(width: int, level: int) -> tuple[int | str, ...]:
    suffix = f"_{2**level}" if level else ""
    return ("batch", width, f"latent_height{suffix}", f"latent_width{suffix}")


def residual_examples(config: Any, specs: list[TensorSpec]) -> dict[str, torch.Tensor]:
    """Example residuals for latents of `example_size`; halving rounds up."""
    height, width = example_size(config)
    found = {}
    for spec in specs:
        divisor = int(str(spec.shape[2]).rpartition("_")[2]) if spec.shape[2] != "latent_height" else 1
        found[spec.name] = ramp(2, int(spec.shape[1]), -(-height // divisor), -(-width // divisor))
    return found


def unet_component(
    unet: Any, *, pooled: int | None = None, ids: int | None = None, residuals: bool = False
) -> Component:
    """Wrap a `UNet2DConditionModel` (float32, eval).

    Args:
        pooled: width of SDXL's pooled text embedding.
        ids: number of SDXL's time ids.
        residuals: with inputs for what ControlNets add; the component is then `unet_control`.
    """
    config = unet.config
    text, channels = int(config.cross_attention_dim), int(config.in_channels)
    shape = ("batch", channels, "latent_height", "latent_width")
    extra = conditions(config, pooled=pooled, ids=ids)
    added = residual_specs(config, down=DOWN_RESIDUAL, mid=MID_RESIDUAL) if residuals else []
    return Component(
        module=UNet(unet).eval(),
        example_inputs={
            "sample": ramp(2, channels, *example_size(config), low=-2, high=2),
            "timestep": torch.tensor([1.0, 500.0]),
            "encoder_hidden_states": ramp(2, 77, text),
            **{name: example for name, (example, _) in extra.items()},
            **residual_examples(config, added),
        },
        spec=ModelSpec(
            name="unet_control" if residuals else "unet",
            inputs=(
                TensorSpec("sample", "float32", shape),
                TensorSpec("timestep", "float32", ("batch",)),
                TensorSpec("encoder_hidden_states", "float32", ("batch", "sequence_length", text)),
                *(spec for _, spec in extra.values()),
                *added,
            ),
            outputs=(TensorSpec("out_sample", "float32", (shape[0], int(config.out_channels), shape[2], shape[3])),),
        ),
    )
