"""The diffusers pipeline of a checkpoint, which is the reference that its graphs are held to."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentrt.runtime.errors import ArtifactError, ConfigError

from .checkpoint import Checkpoint
from .networks import Network, libraries_quiet

# Components that a pipeline's constructor asks for and that a checkpoint may lack or a reference does without.
_ABSENT = (
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
    "add_watermarker",
)


def reference_pipeline(checkpoint: Checkpoint, networks: Mapping[str, Network]) -> Any:
    """The pipeline that draws with all of the U-Net's inputs, on the CPU.

    The safety checker, image encoders, ControlNets and TAESD are left out. It draws inside `weights_at_hand`.

    Args:
        networks: of the checkpoint, by part.

    Raises:
        ArtifactError: a tokenizer cannot be read.
        ConfigError: diffusers does not know the scheduler.
    """
    with libraries_quiet():
        import diffusers

        scheduler_class = getattr(diffusers, checkpoint.scheduler_class, None)
        if scheduler_class is None:
            raise ConfigError(
                f"{checkpoint.path}/scheduler: expected a scheduler of diffusers, got {checkpoint.scheduler_class}."
            )
        parts: dict[str, Any] = {name: network.module for name, network in networks.items() if not is_beside(name)}
        for name in [name for name in parts if name.startswith("text_encoder")]:
            tokenizer = name.replace("text_encoder", "tokenizer")
            parts[tokenizer] = _tokenizer(checkpoint, tokenizer)
        parts["scheduler"] = scheduler_class.from_config(dict(checkpoint.scheduler))
        pipeline_class = getattr(diffusers, pipeline_that_draws(checkpoint))
        options = {
            **dict.fromkeys(_ABSENT),
            "requires_safety_checker": False,
            "requires_aesthetics_score": bool(checkpoint.index.get("requires_aesthetics_score", False)),
            "force_zeros_for_empty_prompt": bool(checkpoint.index.get("force_zeros_for_empty_prompt", True)),
            **parts,
        }
        taken = inspect.signature(pipeline_class.__init__).parameters
        pipeline = _on_the_cpu(pipeline_class)(**{name: value for name, value in options.items() if name in taken})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _on_the_cpu(pipeline_class: Any) -> Any:
    """A pipeline class that draws on the CPU, though the weights at rest are on the meta device."""
    cpu = torch.device("cpu")
    return type(pipeline_class.__name__, (pipeline_class,), {"_execution_device": cpu, "device": cpu})


def is_beside(part: str) -> bool:
    """Whether a part is not one of the pipeline's: what it does without, or has nowhere to put."""
    return part.startswith(("controlnet", "taesd", "safety_checker"))


def pipeline_that_draws(checkpoint: Checkpoint) -> str:
    """The pipeline of diffusers whose calls feed every input of the U-Net, by what the configs say."""
    unet, latent = checkpoint.parts["unet"].config, int(checkpoint.parts["vae"].config.get("latent_channels") or 4)
    inpainting = unet["in_channels"] == 2 * latent + 1
    if unet.get("addition_embed_type") == "text_time":
        if inpainting:
            return "StableDiffusionXLInpaintPipeline"
        refiner = checkpoint.index.get("requires_aesthetics_score") or "text_encoder" not in checkpoint.parts
        return "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline"
    if inpainting:
        return "StableDiffusionInpaintPipeline"
    if unet["in_channels"] == 2 * latent:
        return "StableDiffusionInstructPix2PixPipeline"
    return "StableDiffusionPipeline"


def _tokenizer(checkpoint: Checkpoint, folder: str) -> Any:
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        for name, content in checkpoint.texts.items():
            if name.startswith(f"{folder}/"):
                (Path(scratch) / Path(name).name).write_bytes(content)
        try:
            return CLIPTokenizer.from_pretrained(scratch, local_files_only=True)
        except Exception as err:
            raise ArtifactError(f"{checkpoint.path}/{folder}: expected a CLIP tokenizer, got: {err}") from err
