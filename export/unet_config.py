"""Configs of U-Nets and ControlNets, from their blocks and weights and a published config of their family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import ConfigError

from .unet_structure import UnetStructure
from .weight_shapes import shape_of
from .weights import Weights

# Of all models with linear projections: Stable Diffusion 2 and SDXL. Those of version 1 have eight heads.
_HEAD_WIDTH = 64
# diffusers' values where a published config is silent.
_DEFAULTS: dict[str, Any] = {
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "reverse_transformer_layers_per_block": None,
    "transformer_layers_per_block": 1,
    "use_linear_projection": False,
}
# What a ControlNet's config has of its U-Net's.
_SHARED = (
    "act_fn",
    "addition_embed_type",
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "attention_head_dim",
    "class_embed_type",
    "cross_attention_dim",
    "downsample_padding",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "flip_sin_to_cos",
    "freq_shift",
    "mid_block_scale_factor",
    "norm_eps",
    "norm_num_groups",
    "num_class_embeds",
    "only_cross_attention",
    "resnet_time_scale_shift",
    "upcast_attention",
)


def unet_config(
    structure: UnetStructure, weights: Weights, published: Mapping[str, Any], origin: Path
) -> dict[str, Any]:
    """The config of a U-Net; equal to the published one where the weights are as published.

    Args:
        weights: by diffusers' names, all of them.
        published: config of a U-Net of the family, for what weights do not show, such as norms and activations.
        origin: where the weights came from, for messages.

    Raises:
        ArtifactError: weights that it is read from are missing.
        ConfigError: diffusers has no such U-Net, or its heads are not known.
    """
    found = _shared_options(structure, weights, origin)
    types = ["CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in structure.up]
    found |= {
        "out_channels": shape_of(weights, "conv_out.weight", 4, origin)[0],
        "reverse_transformer_layers_per_block": _depths_up(structure, origin),
        "up_block_types": types,
    }
    return {**published, **_news(found, published)}


def controlnet_config(
    structure: UnetStructure, weights: Weights, published: Mapping[str, Any], origin: Path
) -> dict[str, Any]:
    """The config of a ControlNet.

    Args:
        weights: by diffusers' names, all of them.
        published: config of a U-Net of its family.
        origin: where the weights came from, for messages.

    Raises:
        ArtifactError: weights that it is read from are missing.
        ConfigError: diffusers has no such ControlNet, or its heads are not known.
    """
    embedding = "controlnet_cond_embedding"
    shared = {name: published[name] for name in _SHARED if name in published}
    # Each width comes twice: a block that keeps it, and one that halves the picture and widens.
    blocks = sum(name.startswith(f"{embedding}.blocks.") and name.endswith(".bias") for name in weights)
    wide = [f"{embedding}.conv_in.bias", *(f"{embedding}.blocks.{number}.bias" for number in range(1, blocks, 2))]
    return {
        "_class_name": "ControlNetModel",
        **shared,
        "conditioning_channels": shape_of(weights, f"{embedding}.conv_in.weight", 4, origin)[1],
        "conditioning_embedding_out_channels": [shape_of(weights, name, 1, origin)[0] for name in wide],
        "controlnet_conditioning_channel_order": "rgb",
        "global_pool_conditions": False,
        **_news(_shared_options(structure, weights, origin), shared),
    }


def _news(found: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a published config does not have already, if only by its silence."""
    return {
        option: value
        for option, value in found.items()
        if option not in {**_DEFAULTS, **published} or value != {**_DEFAULTS, **published}[option]
    }


def _shared_options(structure: UnetStructure, weights: Weights, origin: Path) -> dict[str, Any]:
    types = ["CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in structure.down]
    found: dict[str, Any] = {
        "block_out_channels": list(structure.channels),
        "down_block_types": types,
        "in_channels": shape_of(weights, "conv_in.weight", 4, origin)[1],
        "layers_per_block": structure.layers,
        "mid_block_type": _middle(structure),
        "transformer_layers_per_block": _depths_down(structure, origin),
    }
    if (added := "add_embedding.linear_1.weight") in weights:
        found["projection_class_embeddings_input_dim"] = shape_of(weights, added, 2, origin)[1]
    context = next((name for name in weights if name.endswith(".attn2.to_k.weight")), None)
    if context is not None:
        projection = weights.get(f"{context.partition('.transformer_blocks.')[0]}.proj_in.weight")
        found["cross_attention_dim"] = shape_of(weights, context, 2, origin)[1]
        found["use_linear_projection"] = projection is not None and len(projection.shape) == 2
        if found["use_linear_projection"]:
            if any(width % _HEAD_WIDTH for width in structure.channels):
                raise ConfigError(
                    f"{origin}: expected levels of multiples of {_HEAD_WIDTH} channels, as heads of linear attention "
                    f"have, got {structure.channels}. Give the model's own configs with --config."
                )
            found["attention_head_dim"] = [width // _HEAD_WIDTH for width in structure.channels]
    return found


def _middle(structure: UnetStructure) -> str | None:
    if structure.mid is None:
        return None
    return "UNetMidBlock2DCrossAttn" if structure.mid else "UNetMidBlock2D"


def _level(depths: tuple[int, ...], origin: Path) -> int | list[int]:
    """One level's transformer blocks in diffusers' spelling: a number where all are alike, 0 for none."""
    if len(set(depths)) == 1:
        return depths[0]
    if 0 in depths:
        raise ConfigError(
            f"{origin}: expected attention behind all residual blocks of a level or none, got {depths}. "
            "It is not supported yet."
        )
    return list(depths)


def _depths_down(structure: UnetStructure, origin: Path) -> int | list[int | list[int]]:
    levels = [_level(depths, origin) for depths in structure.down]
    if structure.mid and levels[-1] not in (0, structure.mid):
        raise ConfigError(
            f"{origin}: expected as many transformer blocks in the middle as in the lowest level, {levels[-1]}, "
            f"got {structure.mid}. It is not supported yet."
        )
    if structure.mid:
        # diffusers takes the middle's from the last level.
        levels[-1] = structure.mid
    depths = [depth for depth in levels if depth] or [1]
    first = depths[0]
    if isinstance(first, int) and all(depth == first for depth in depths):
        return first
    return [depth or 1 for depth in levels]


def _depths_up(structure: UnetStructure, origin: Path) -> list[int | list[int]] | None:
    """What diffusers has to be told of the way up: nothing where it mirrors the way down."""
    mirrored = [(depths[0],) * (structure.layers + 1) for depths in reversed(structure.down)]
    if list(structure.up) == mirrored and all(len(set(depths)) == 1 for depths in structure.down):
        return None
    return [_level(depths, origin) or 1 for depths in structure.up]
