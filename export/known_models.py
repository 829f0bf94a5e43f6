"""What models that cannot be exported are: by the classes and the options that give them away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The start of a class's name -> what it is; the longest start counts.
_CLASSES = {
    "AnimateDiff": "AnimateDiff, for videos",
    "UNetMotion": "AnimateDiff's U-Net with motion modules, for videos",
    "MotionAdapter": "AnimateDiff's motion modules, for videos",
    "StableVideoDiffusion": "Stable Video Diffusion",
    "UNetSpatioTemporal": "the U-Net of Stable Video Diffusion",
    "TextToVideo": "a text-to-video model",
    "UNet3DConditionModel": "the U-Net of a text-to-video model",
    "StableDiffusion3": "Stable Diffusion 3, a diffusion transformer",
    "SD3": "a network of Stable Diffusion 3, a diffusion transformer",
    "Flux": "Flux, a diffusion transformer",
    "Chroma": "Chroma, a diffusion transformer",
    "AuraFlow": "AuraFlow, a diffusion transformer",
    "PixArt": "PixArt, a diffusion transformer",
    "Sana": "Sana, a diffusion transformer",
    "Lumina": "Lumina, a diffusion transformer",
    "Hunyuan": "Hunyuan-DiT, a diffusion transformer",
    "Qwen": "Qwen-Image, a diffusion transformer",
    "DiT": "DiT, a diffusion transformer",
    "Kolors": "Kolors, SDXL with the text encoder ChatGLM",
    "Kandinsky": "Kandinsky",
    "UnCLIP": "unCLIP, DALL-E 2's way with a prior",
    "StableUnCLIP": "Stable unCLIP, Stable Diffusion 2.1 on embeddings of pictures",
    "StableDiffusionImageVariation": "Stable Diffusion on embeddings of pictures instead of texts",
    "IF": "DeepFloyd IF, which draws in pixels",
    "Wuerstchen": "Wuerstchen",
    "StableCascade": "Stable Cascade",
    "StableDiffusionDepth2Img": "Depth2Img, Stable Diffusion 2 with a depth map as fifth channel",
    "StableDiffusionUpscale": "the x4 upscaler of Stable Diffusion 2",
    "StableDiffusionLatentUpscale": "the x2 latent upscaler of Stable Diffusion",
    "StableDiffusionGLIGEN": "GLIGEN, which places objects in boxes",
    "StableDiffusionXLInstructPix2Pix": "InstructPix2Pix for SDXL",
    "StableDiffusionXLControlNetUnion": "SDXL with a ControlNet-Union, one ControlNet of several kinds",
    "ControlNetUnion": "a ControlNet-Union, one ControlNet of several kinds",
    "ControlNetXS": "a ControlNet-XS, which runs inside the U-Net",
    "UNetControlNetXS": "a U-Net with a ControlNet-XS inside",
    "StableDiffusionControlNetXS": "Stable Diffusion with a ControlNet-XS, which runs inside the U-Net",
    "StableDiffusionXLControlNetXS": "SDXL with a ControlNet-XS, which runs inside the U-Net",
    "SparseControlNet": "AnimateDiff's ControlNet, for videos",
    "T2IAdapter": "a T2I-Adapter",
    "StableDiffusionAdapter": "Stable Diffusion with a T2I-Adapter",
    "StableDiffusionXLAdapter": "SDXL with a T2I-Adapter",
    "AltDiffusion": "AltDiffusion, with a text encoder of many languages",
    "LDM": "latent diffusion as before Stable Diffusion",
    "UNet2DModel": "a U-Net without text",
    "T5EncoderModel": "the text encoder of DeepFloyd IF and of diffusion transformers",
    "ChatGLMModel": "the text encoder of Kolors",
    "AsymmetricAutoencoderKL": "a VAE with a larger decoder, for inpainting",
    "ConsistencyDecoderVAE": "OpenAI's consistency decoder",
    "VQModel": "a VAE with a codebook",
}
# Options of a U-Net or ControlNet, and the start of their values -> what has them.
_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "attention_type": {"gated": "GLIGEN, which places objects in boxes"},
    "class_embed_type": {"projection": "Stable unCLIP, which draws from embeddings of pictures"},
    "num_class_embeds": {"": "an upscaler of Stable Diffusion 2"},
    "encoder_hid_dim_type": {
        "text_proj": "DeepFloyd IF or Kolors",
        "text_image_proj": "Kandinsky 2.1",
        "image_proj": "Kandinsky 2.2",
        "ip_image_proj": "an IP-Adapter, which draws from pictures",
    },
    "addition_embed_type": {
        "text": "DeepFloyd IF",
        "text_image": "Kandinsky 2.1",
        "image": "Kandinsky 2.2",
        "image_hint": "Kandinsky 2.2 with a hint",
    },
    "global_pool_conditions": {"True": "the ControlNet Shuffle"},
}
# Channels that a U-Net takes, for latents of 4.
_CHANNELS = {
    5: "Depth2Img, Stable Diffusion 2 with a depth map",
    7: "the x4 upscaler of Stable Diffusion 2",
}
# Blocks, by the start of their names.
_BLOCKS = {
    "Resnet": "DeepFloyd IF or Kandinsky",
    "SimpleCrossAttn": "DeepFloyd IF or Kandinsky",
    "UNetMidBlock2DSimple": "DeepFloyd IF or Kandinsky",
    "K": "the x2 latent upscaler of Stable Diffusion",
}


def model_of_class(name: str | None) -> str:
    """What a class of diffusers or transformers belongs to, as a sentence to add to a message; "" if unknown."""
    return _sentence(_by_start(_CLASSES, name or ""))


def model_of_block(name: str | None) -> str:
    """What has a block of that class in its U-Net, as a sentence to add to a message; "" if unknown."""
    return _sentence(_by_start(_BLOCKS, name or ""))


def model_of_option(option: str, value: Any) -> str:
    """What has a value of a config's option, as a sentence to add to a message; "" if unknown."""
    if option == "in_channels":
        return _sentence(_CHANNELS.get(value))
    found = _OPTIONS.get(option, {})
    return _sentence(found.get(str(value), found.get("")))


def _by_start(known: Mapping[str, str], name: str) -> str | None:
    starts = [start for start in known if name.startswith(start)]
    return known[max(starts, key=len)] if starts else None


def _sentence(model: str | None) -> str:
    return f" This is {model}." if model else ""
