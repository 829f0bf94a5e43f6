"""Tiny random-weight Stable Diffusion pipelines and checkpoints, in diffusers' own layout, made in a second.

The networks have every kind of layer that the real ones have (cross-attention, resampling, GroupNorm, a VAE of
factor 8) in the smallest sizes that diffusers accepts, and weights large enough that every layer matters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# Of its bundle, in the order of a run.
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = ("r e", "re d</w>", "c i", "b l", "o n</w>")
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 64,
}
TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 32,
}
NOISE_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
}


def _vocabulary() -> dict[str, int]:
    """CLIP's byte-level alphabet, a handful of merges and the two special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    words = [*symbols, *(s + "</w>" for s in symbols), *("".join(m.split()) for m in MERGES), START, END]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def write_tiny_tokenizer(folder: Path) -> Path:
    """Write vocab.json, merges.txt and the configs of a CLIP tokenizer of some 518 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    (folder / "vocab.json").write_text(json.dumps(_vocabulary(), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _randomize(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Norms and biases too: an exporter that drops one of them must not pass unseen."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def tiny_pipeline(seed: int = 0, *, tokenizer_folder: Path) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline with random float32 weights.

    Args:
        seed: of the weights; the same seed gives the same weights.
        tokenizer_folder: where the tokenizer's files are written, because CLIPTokenizer reads them from disk.
    """
    vocabulary = _vocabulary()
    ids = {"bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END], "pad_token_id": vocabulary[END]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(vocabulary), **TEXT_CONFIG, **ids))
        unet = UNet2DConditionModel(**UNET_CONFIG)
        vae = AutoencoderKL(scaling_factor=0.5, **VAE_CONFIG)
    generator = torch.Generator().manual_seed(seed + 1)
    for module in (text_encoder, unet, vae):
        _randomize(module, generator)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=CLIPTokenizer.from_pretrained(write_tiny_tokenizer(tokenizer_folder)),
        unet=unet.eval(),
        scheduler=PNDMScheduler(**NOISE_CONFIG),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )


def save_tiny_checkpoint(folder: Path, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write `tiny_pipeline(seed)` as a diffusers folder with safetensors weights; returns the folder.

    The tokenizer is kept as vocab.json and merges.txt, the layout of published Stable Diffusion checkpoints.
    """
    pipeline = tiny_pipeline(seed, tokenizer_folder=folder / "tokenizer").to(dtype)
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    write_tiny_tokenizer(folder / "tokenizer")
    return folder
