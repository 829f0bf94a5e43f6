"""VAEs with the names of the original implementation: their names, weights and structure in diffusers' terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .ldm_names import Pairs, weight_and_bias
from .weight_shapes import shape_of
from .weights import Weight, Weights, changed

_BLOCK = re.compile(r"encoder\.down\.(\d{1,2})\.block\.(\d{1,2})\.")
_ENDS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


@dataclass(frozen=True)
class VaeStructure:
    """Blocks of a VAE.

    Attributes:
        channels: of each level, from the picture's side.
        layers: residual blocks of a level of the encoder; the decoder has one more.
    """

    channels: tuple[int, ...]
    layers: int


def vae_structure(weights: Weights, origin: Path) -> VaeStructure:
    """The structure of a VAE with the original names.

    Raises:
        ArtifactError: weights that show the structure are missing.
    """
    blocks = [match for match in map(_BLOCK.match, weights) if match]
    levels = max((int(match[1]) + 1 for match in blocks), default=1)
    layers = max((int(match[2]) + 1 for match in blocks), default=1)
    names = [f"encoder.down.{level}.block.0.conv2.bias" for level in range(levels)]
    return VaeStructure(tuple(shape_of(weights, name, 1, origin)[0] for name in names), layers)


def vae_names(structure: VaeStructure) -> dict[str, str]:
    """All weights of a VAE, diffusers' name -> the original one."""
    names: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        for there, here in _ENDS.items():
            names.update(weight_and_bias(f"{half}.{there}", f"{half}.{here}"))
        for number in (0, 1):
            names.update(_resnet(f"{half}.mid.block_{number + 1}", f"{half}.mid_block.resnets.{number}"))
        for there, here in _ATTENTION.items():
            names.update(weight_and_bias(f"{half}.mid.attn_1.{there}", f"{half}.mid_block.attentions.0.{here}"))
    for single in ("quant_conv", "post_quant_conv"):
        names.update(weight_and_bias(single, single))
    channels = structure.channels
    for level, width in enumerate(channels):
        # The original counts the decoder's levels from the picture's side, diffusers from the latents'.
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{len(channels) - 1 - level}"
        for layer in range(structure.layers):
            widens = layer == 0 and width != channels[max(level - 1, 0)]
            names.update(_resnet(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", shortcut=widens))
        for layer in range(structure.layers + 1):
            narrows = layer == 0 and width != channels[min(level + 1, len(channels) - 1)]
            names.update(_resnet(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}", shortcut=narrows))
        if level < len(channels) - 1:
            names.update(weight_and_bias(f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv"))
        if level > 0:
            names.update(weight_and_bias(f"decoder.up.{level}.upsample.conv", f"{up}.upsamplers.0.conv"))
    return names


def _resnet(original: str, own: str, *, shortcut: bool = False) -> Pairs:
    for layer in ("norm1", "conv1", "norm2", "conv2"):
        yield from weight_and_bias(f"{original}.{layer}", f"{own}.{layer}")
    if shortcut:
        yield from weight_and_bias(f"{original}.nin_shortcut", f"{own}.conv_shortcut")


def vae_weight(name: str, weight: Weight) -> Weight:
    """A weight as diffusers has it: its attention is of linear layers, the original's of 1 x 1 convolutions.

    Args:
        name: diffusers'.
    """
    shape = weight.shape
    if ".attentions." in name and shape[2:] == (1, 1):
        return changed(weight, lambda values: values.reshape(shape[:2]), shape[:2])
    return weight


def vae_config(structure: VaeStructure, weights: Weights, published: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    """The config of a VAE.

    Args:
        weights: by diffusers' names.
        published: config of a VAE of the family, for what weights do not show, such as the scaling factor.
        origin: where the weights came from, for messages.

    Raises:
        ArtifactError: weights that it is read from are missing.
    """
    levels = len(structure.channels)
    return {
        **published,
        "block_out_channels": list(structure.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": shape_of(weights, "encoder.conv_in.weight", 4, origin)[1],
        "latent_channels": shape_of(weights, "decoder.conv_in.weight", 4, origin)[1],
        "layers_per_block": structure.layers,
        "out_channels": shape_of(weights, "decoder.conv_out.weight", 4, origin)[0],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
