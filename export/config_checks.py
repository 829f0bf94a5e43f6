"""Which options of a network's config a graph and its runtime can express; the others are named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentrt.runtime.errors import ConfigError

from .checkpoint_parts import Part
from .known_models import model_of_block, model_of_option

# Options of a U-Net or ControlNet that call for inputs or behaviour nothing here supplies: the values that do not.
_PLAIN = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "attention_type": (None, "default"),
    "global_pool_conditions": (None, False),
}
# Blocks with one skip connection for each layer and each halving, as ControlNets and `residual_specs` count them.
_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def check_unet(parts: Mapping[str, Part]) -> None:
    """Hold the U-Net's config, and how it fits the VAE and the text encoders, to what is supported.

    Raises:
        ConfigError: names the option and its value.
    """
    unet, vae = parts["unet"], parts["vae"]
    config, channels = unet.config, int(vae.config.get("latent_channels") or 4)
    _check_plain(unet, config)
    if config.get("in_channels") not in (channels, 2 * channels, 2 * channels + 1):
        raise ConfigError(
            f"{unet.origin}: expected in_channels of {channels} (the VAE's latent_channels), {2 * channels} (with a "
            f"picture) or {2 * channels + 1} (inpainting), got {config.get('in_channels')}."
            f"{model_of_option('in_channels', config.get('in_channels'))} It is not supported yet."
        )
    if config.get("out_channels") != channels:
        raise ConfigError(
            f"{unet.origin}: expected out_channels of {channels}, the VAE's latent_channels, "
            f"got {config.get('out_channels')}. It is not supported yet."
        )
    encoders = [part.config for name, part in parts.items() if name.startswith("text_encoder")]
    width = sum(int(encoder.get("hidden_size") or 512) for encoder in encoders)
    if config.get("cross_attention_dim") != width:
        raise ConfigError(
            f"{unet.origin}: expected cross_attention_dim of {width}, the text encoders' width together, "
            f"got {config.get('cross_attention_dim')}. It is not supported yet."
        )
    has_second = "text_encoder_2" in parts
    if (config.get("addition_embed_type") == "text_time") != has_second:
        raise ConfigError(
            f"{unet.origin}: expected addition_embed_type text_time exactly where there is a text_encoder_2, got "
            f"{config.get('addition_embed_type')!r} {'with' if has_second else 'without'} one. It is not supported yet."
        )
    if has_second:
        time_ids(config, int(parts["text_encoder_2"].config.get("projection_dim") or 512))
        if config.get("in_channels") == 2 * channels:
            raise ConfigError(
                f"{unet.origin}: expected in_channels of {channels} or {2 * channels + 1} for SDXL, "
                f"got {2 * channels}. This is InstructPix2Pix for SDXL. It is not supported yet."
            )


def time_ids(config: Mapping[str, Any], pooled: int) -> int:
    """How many time ids (sizes, crops, score) a U-Net with `text_time` takes.

    Args:
        config: of the U-Net or ControlNet.
        pooled: width of the pooled text embedding.

    Raises:
        ConfigError: the widths do not work out.
    """
    whole, each = (config.get(n) for n in ("projection_class_embeddings_input_dim", "addition_time_embed_dim"))
    if not isinstance(whole, int) or not isinstance(each, int) or whole <= pooled or (whole - pooled) % each:
        raise ConfigError(
            f"projection_class_embeddings_input_dim: expected {pooled} and a multiple of addition_time_embed_dim "
            f"({each}), got {whole}. The U-Net and text_encoder_2 belong to different models."
        )
    return (whole - pooled) // each


def check_controlnet(controlnet: Part, unet: Part, vae: Part) -> None:
    """Hold a ControlNet's config to the U-Net that takes its residuals.

    Raises:
        ConfigError: names the option and both values.
    """
    config, wanted = controlnet.config, unet.config
    _check_plain(controlnet, config)
    fits = ("block_out_channels", "cross_attention_dim", "layers_per_block", "addition_embed_type")
    for option in fits:
        if config.get(option) != wanted.get(option):
            raise ConfigError(
                f"{controlnet.origin}: expected {option} {wanted.get(option)}, as the U-Net's, "
                f"got {config.get(option)}. The ControlNet is for another model."
            )
    channels = int(vae.config.get("latent_channels") or 4)
    if config.get("in_channels") != channels:
        raise ConfigError(
            f"{controlnet.origin}: expected in_channels {channels}, as the VAE's latent_channels, "
            f"got {config.get('in_channels')}. It is not supported yet."
        )
    halvings, factor = len(config.get("conditioning_embedding_out_channels") or ()) - 1, vae_factor(vae)
    if 2**halvings != factor:
        raise ConfigError(
            f"{controlnet.origin}: expected conditioning_embedding_out_channels that divide pictures by {factor}, as "
            f"the VAE does, got {config.get('conditioning_embedding_out_channels')}. "
            "The ControlNet is for another model."
        )


def check_taesd(taesd: Part, vae: Part) -> None:
    """Hold a TAESD's config to the VAE that it stands in for.

    Raises:
        ConfigError: its latents have other channels or another size.
    """
    config = taesd.config
    if config.get("latent_channels") != vae.config.get("latent_channels"):
        raise ConfigError(
            f"{taesd.origin}: expected latent_channels {vae.config.get('latent_channels')}, as the VAE's, "
            f"got {config.get('latent_channels')}. It is for another model."
        )


def vae_factor(vae: Part) -> int:
    """Pixels per latent."""
    return int(2 ** (len(vae.config.get("block_out_channels") or (0,)) - 1))


def _check_plain(part: Part, config: Mapping[str, Any]) -> None:
    for option, values in _PLAIN.items():
        if config.get(option) not in values:
            raise ConfigError(
                f"{part.origin}: expected {option} {' or '.join(map(repr, values))}, got {config[option]!r}."
                f"{model_of_option(option, config[option])} It is not supported yet."
            )
    for option, known in _BLOCKS.items():
        blocks = config.get(option, known[0])
        for block in blocks if isinstance(blocks, list | tuple) else [blocks]:
            if block not in known:
                raise ConfigError(
                    f"{part.origin}: expected {option} of {' or '.join(map(str, known))}, got {block}."
                    f"{model_of_block(block)} It is not supported yet."
                )
    if not isinstance(config.get("cross_attention_dim"), int):
        raise ConfigError(
            f"{part.origin}: expected one cross_attention_dim, got {config.get('cross_attention_dim')!r}. "
            "It is not supported yet."
        )
