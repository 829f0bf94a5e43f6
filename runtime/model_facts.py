"""What a checkpoint's configs say of its networks: channels, sizes, scaling, and which inputs its U-Net takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .errors import ConfigError
from .latents import vae_factor
from .noise_schedule import NoiseSchedule
from .sampler_spec import SamplerSpec


@dataclass(frozen=True, eq=False)
class ModelFacts:
    """Read from the configs once, when a bundle is opened.

    Attributes:
        latent_channels: of the VAE.
        unet_channels: of the U-Net's input: latent_channels, and more for inpainting (9) and editing (8).
        vae_factor: pixels per latent along a side.
        scaling_factor: what the VAE's latents are multiplied by for the U-Net.
        shift_factor: what is subtracted from them first.
        latents_mean: per channel (1, c, 1, 1), of VAEs that normalise their latents; None for others.
        latents_std: likewise.
        default_size: pixels along a side that the checkpoint was trained at.
        time_ids: how many numbers an SDXL U-Net is told of the picture's size: 6, 5 for the refiner, 0 for others.
        time_cond_width: width of the guidance embedding of a distilled U-Net (LCM); 0 for others.
        zero_negative: whether a negative prompt that was not given is all zeros (SDXL).
    """

    latent_channels: int
    unet_channels: int
    vae_factor: int
    scaling_factor: float
    shift_factor: float
    latents_mean: NDArray[np.float32] | None
    latents_std: NDArray[np.float32] | None
    default_size: int
    time_ids: int
    time_cond_width: int
    zero_negative: bool

    @property
    def is_sdxl(self) -> bool:
        """Whether the U-Net takes pooled text and the picture's size."""
        return self.time_ids > 0

    @property
    def default_guidance(self) -> float:
        """The scale that diffusers' pipeline of this family has if none is given."""
        if self.is_lcm:
            return 8.5
        return 5.0 if self.is_sdxl and not self.is_inpainting else 7.5

    @property
    def is_lcm(self) -> bool:
        """Whether diffusers has pipelines of their own for it: latent consistency models, but not distilled SDXL."""
        return bool(self.time_cond_width) and not self.is_sdxl

    @property
    def is_inpainting(self) -> bool:
        """Whether the U-Net takes a mask and a masked picture beside the latents."""
        return self.unet_channels == 2 * self.latent_channels + 1

    @property
    def is_editing(self) -> bool:
        """Whether the U-Net takes a picture to edit beside the latents (InstructPix2Pix)."""
        return self.unet_channels == 2 * self.latent_channels


def read_facts(bundle: Bundle) -> ModelFacts:
    """The facts of a bundle.

    Raises:
        ConfigError: a config lacks a value or holds one that no supported family has.
        ArtifactError: a config is missing or damaged.
    """
    unet, vae = bundle.config("unet/config.json"), bundle.config("vae_decoder/config.json")
    index = bundle.config("model_index.json") if (bundle.path / "model_index.json").exists() else {}
    latent, channels = int(vae.get("latent_channels") or 4), int(unet["in_channels"])
    if channels not in (latent, 2 * latent, 2 * latent + 1):
        raise ConfigError(
            f"unet.in_channels: expected {latent}, {2 * latent} (editing) or {2 * latent + 1} (inpainting), got "
            f"{channels}. This family is not supported."
        )
    factor, time_ids = vae_factor(vae), _time_ids(bundle, unet)
    return ModelFacts(
        latent_channels=latent,
        unet_channels=channels,
        vae_factor=factor,
        scaling_factor=float(vae.get("scaling_factor") or 0.18215),
        shift_factor=float(vae.get("shift_factor") or 0.0),
        latents_mean=_per_channel(vae.get("latents_mean"), latent),
        latents_std=_per_channel(vae.get("latents_std"), latent),
        default_size=_sample_size(unet) * factor,
        time_ids=time_ids,
        time_cond_width=int(unet.get("time_cond_proj_dim") or 0),
        zero_negative=bool(time_ids and index.get("force_zeros_for_empty_prompt", True)),
    )


# What diffusers' pipelines of Stable Diffusion 1 and 2 change in a scheduler when they are made with it.
_CORRECTIONS: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionImg2ImgPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}


@dataclass(frozen=True, eq=False)
class Schedules:
    """A bundle's noise schedule, as diffusers' pipeline of its class has it: values of old configs are corrected.

    Attributes:
        own: for the sampler of the config's own class, with the values that the config lacks corrected too.
        other: for other classes, which diffusers makes from the config with their own defaults for those.
    """

    own: NoiseSchedule
    other: NoiseSchedule

    def of(self, sampler: SamplerSpec) -> NoiseSchedule:
        """The schedule for a sampler."""
        return self.own if sampler.scheduler == self.own.class_name else self.other


def read_schedules(bundle: Bundle) -> Schedules:
    """The schedules of a bundle.

    Raises:
        ConfigError: a value of scheduler_config.json is not supported, or an option is unknown.
        ArtifactError: a config is missing or damaged.
    """
    index = bundle.config("model_index.json") if (bundle.path / "model_index.json").exists() else {}
    config = bundle.config("scheduler/scheduler_config.json")
    corrections = _CORRECTIONS.get(str(index.get("_class_name")), {})
    held = {name: value for name, value in corrections.items() if name in config}
    return Schedules(
        own=NoiseSchedule.from_config({**config, **corrections}), other=NoiseSchedule.from_config({**config, **held})
    )


def _sample_size(unet: Mapping[str, Any]) -> int:
    size = unet.get("sample_size") or 64
    return int(size[0] if isinstance(size, list) else size)


def _per_channel(values: Any, channels: int) -> NDArray[np.float32] | None:
    if values is None:
        return None
    row = np.asarray(values, np.float32)
    if row.shape != (channels,):
        raise ConfigError(f"vae: expected {channels} values of latents_mean and latents_std, got {row.shape}.")
    return row.reshape(1, channels, 1, 1)


def _time_ids(bundle: Bundle, unet: Mapping[str, Any]) -> int:
    if unet.get("addition_embed_type") is None:
        return 0
    if unet["addition_embed_type"] != "text_time":
        raise ConfigError(
            f"unet.addition_embed_type: expected text_time, got {unet['addition_embed_type']!r}. It is not supported."
        )
    pooled = int(bundle.config("text_encoder_2/config.json")["projection_dim"])
    width = int(unet["addition_time_embed_dim"])
    count, rest = divmod(int(unet["projection_class_embeddings_input_dim"]) - pooled, width)
    if rest or count not in (5, 6):
        raise ConfigError(
            f"unet.projection_class_embeddings_input_dim: expected {pooled} + 5 or 6 x {width}, got "
            f"{unet['projection_class_embeddings_input_dim']}. The text encoder belongs to another U-Net."
        )
    return count
