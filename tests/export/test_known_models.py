"""What cannot be exported is named, by the class or the option that gives it away."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers
from families import KOALA_UNET, OPEN_CLIP_TEXT, SD_UNET, SD_VAE, SDXL_UNET, SSD_1B_UNET, TEXT

from latentrt.export.checkpoint_folder import PIPELINES
from latentrt.export.checkpoint_parts import Part
from latentrt.export.config_checks import check_unet
from latentrt.export.known_models import _CLASSES, model_of_class
from latentrt.runtime.errors import ConfigError


def check(unet: Mapping[str, Any]) -> None:
    """Hold a U-Net's config to those of the VAE and the text encoders of its family."""
    configs = {"unet": unet, "vae": SD_VAE, "text_encoder": TEXT}
    if unet["cross_attention_dim"] == SDXL_UNET["cross_attention_dim"]:
        configs["text_encoder_2"] = OPEN_CLIP_TEXT
    check_unet(
        {
            name: Part(name=name, origin=Path(name), config=config, model_class="", weights={}, files={})
            for name, config in configs.items()
        }
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("StableDiffusion3Pipeline", "Stable Diffusion 3, a diffusion transformer"),
        ("SD3Transformer2DModel", "Stable Diffusion 3"),
        ("FluxPipeline", "Flux, a diffusion transformer"),
        ("FluxTransformer2DModel", "Flux"),
        ("KandinskyV22Pipeline", "Kandinsky"),
        ("IFPipeline", "DeepFloyd IF"),
        ("AnimateDiffPipeline", "AnimateDiff, for videos"),
        ("UNetMotionModel", "motion modules"),
        ("MotionAdapter", "motion modules"),
        ("PixArtSigmaPipeline", "PixArt"),
        ("WuerstchenDecoderPipeline", "Wuerstchen"),
        ("StableDiffusionDepth2ImgPipeline", "Depth2Img"),
        ("StableDiffusionGLIGENPipeline", "GLIGEN"),
        ("StableDiffusionGLIGENTextImagePipeline", "GLIGEN"),
        ("StableUnCLIPPipeline", "Stable unCLIP"),
        ("UnCLIPPipeline", "unCLIP, DALL-E 2's"),
        ("StableDiffusionXLInstructPix2PixPipeline", "InstructPix2Pix for SDXL"),
        ("ControlNetUnionModel", "ControlNet-Union"),
        ("StableDiffusionXLControlNetUnionPipeline", "ControlNet-Union"),
    ],
)
def test_a_class_says_what_it_belongs_to(name: str, said: str) -> None:
    assert hasattr(diffusers, name)
    sentence = model_of_class(name)
    assert sentence.startswith(" This is ")
    assert said in sentence


def test_every_class_that_is_known_exists() -> None:
    # Kolors brings the code of its text encoder itself.
    names = [*dir(diffusers), *dir(transformers), "ChatGLMModel"]
    missing = [start for start in _CLASSES if not any(name.startswith(start) for name in names)]
    assert missing == []


def test_nothing_is_said_of_what_is_supported_or_unknown() -> None:
    supported = (*PIPELINES, "AutoencoderKL", "UNet2DConditionModel", "ControlNetModel", "CLIPTextModel")
    assert {model_of_class(name) for name in (*supported, "SomethingElse", None)} == {""}


@pytest.mark.parametrize(
    ("unet", "change", "said"),
    [
        (SD_UNET, {"attention_type": "gated"}, "attention_type .*got 'gated'. This is GLIGEN"),
        (SD_UNET, {"in_channels": 5}, "got 5. This is Depth2Img"),
        (SD_UNET, {"in_channels": 7, "num_class_embeds": 1000}, "got 1000. This is an upscaler"),
        (SD_UNET, {"in_channels": 7}, "got 7. This is the x4 upscaler"),
        (SD_UNET, {"class_embed_type": "projection"}, "got 'projection'. This is Stable unCLIP"),
        (SD_UNET, {"encoder_hid_dim_type": "ip_image_proj"}, "This is an IP-Adapter"),
        (SD_UNET, {"addition_embed_type": "image"}, "This is Kandinsky 2.2"),
        (SDXL_UNET, {"in_channels": 8}, "in_channels of 4 or 9 for SDXL, got 8. This is InstructPix2Pix for SDXL"),
        (SD_UNET, {"down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"]}, "got Resnet.*This is DeepFloyd"),
        (SD_UNET, {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type .*This is DeepFloyd"),
        (SD_UNET, {"up_block_types": ["KUpBlock2D", "UpBlock2D"]}, "got KUpBlock2D. This is the x2 latent upscaler"),
        (SD_UNET, {"up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}, "got AttnUpBlock2D. It is not supported yet"),
    ],
)
def test_an_option_says_what_it_belongs_to(unet: dict[str, Any], change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        check({**unet, **change})
    assert str(caught.value).startswith("unet: expected ")
    assert str(caught.value).endswith("It is not supported yet.")


@pytest.mark.parametrize("unet", [SD_UNET, SDXL_UNET, SSD_1B_UNET, KOALA_UNET])
def test_plain_and_pruned_unets_pass(unet: dict[str, Any]) -> None:
    check(unet)
