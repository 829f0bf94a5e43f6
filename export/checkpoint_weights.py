"""Loading a checkpoint's weights, and refusing those that do not fit to the last one."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from latentrt.runtime.errors import ArtifactError, ConfigError

from .checkpoint import Checkpoint
from .checkpoint_parts import Part

# Components that a pipeline's constructor asks for and that a checkpoint may lack or a bundle leaves out.
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


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Hold back the notes and progress bars of diffusers and transformers, which would bury an error of ours."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import diffusers
            import transformers

            diffusers.utils.logging.disable_progress_bar()
            transformers.utils.logging.disable_progress_bar()
            yield
    finally:
        logging.disable(disabled)


def load_pipeline(checkpoint: Checkpoint) -> Any:
    """The checkpoint as the diffusers pipeline that draws with all of its U-Net's inputs, in float32 on the CPU.

    The networks are in eval mode. The safety checker, image encoders, ControlNets and TAESD are left out; nothing is
    downloaded and nothing is unpickled.

    Raises:
        ArtifactError: a weight is missing, unexpected or of another shape, or a file cannot be read.
        ConfigError: diffusers does not know the scheduler.
    """
    with libraries_quiet():
        import diffusers

        scheduler_class = getattr(diffusers, checkpoint.scheduler_class, None)
        if scheduler_class is None:
            raise ConfigError(
                f"{checkpoint.path}/scheduler: expected a scheduler of diffusers, got {checkpoint.scheduler_class}."
            )
        parts: dict[str, Any] = {name: _load(part) for name, part in checkpoint.parts.items() if not is_extra(name)}
        for name in [name for name in parts if name.startswith("text_encoder")]:
            tokenizer = name.replace("text_encoder", "tokenizer")
            parts[tokenizer] = _load_tokenizer(checkpoint, tokenizer)
        parts["scheduler"] = scheduler_class.from_pretrained(checkpoint.path / "scheduler", local_files_only=True)
        pipeline_class = getattr(diffusers, pipeline_that_draws(checkpoint))
        options = {
            **dict.fromkeys(_ABSENT),
            "requires_safety_checker": False,
            "requires_aesthetics_score": bool(checkpoint.index.get("requires_aesthetics_score", False)),
            "force_zeros_for_empty_prompt": bool(checkpoint.index.get("force_zeros_for_empty_prompt", True)),
            **parts,
        }
        taken = inspect.signature(pipeline_class.__init__).parameters
        pipeline = pipeline_class(**{name: value for name, value in options.items() if name in taken})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_extras(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ControlNets and the TAESD of a checkpoint, by part, in float32 on the CPU, in eval mode.

    Raises:
        ArtifactError: a weight is missing, unexpected or of another shape, or a file cannot be read.
    """
    with libraries_quiet():
        return {name: _load(part) for name, part in checkpoint.parts.items() if is_extra(name)}


def is_extra(part: str) -> bool:
    """Whether a part stands beside the pipeline: a ControlNet or a TAESD."""
    return part.startswith(("controlnet", "taesd"))


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


def _load_tokenizer(checkpoint: Checkpoint, folder: str) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(checkpoint.path / folder, local_files_only=True)
    except Exception as err:
        raise ArtifactError(f"{checkpoint.path}/{folder}: expected a CLIP tokenizer, got: {err}") from err


def _load(part: Part) -> Any:
    import diffusers
    import torch
    import transformers

    if part.name.startswith("text_encoder"):
        model_class = getattr(transformers, part.model_class)
        # Sizes that differ come back in the loading info, by name, only from transformers and only on request.
        options: dict[str, Any] = {"dtype": torch.float32, "ignore_mismatched_sizes": True}
    else:
        model_class, options = getattr(diffusers, part.model_class), {"torch_dtype": torch.float32}
    try:
        model, info = model_class.from_pretrained(
            part.path,
            local_files_only=True,
            use_safetensors=True,
            variant=part.variant,
            output_loading_info=True,
            **options,
        )
    except Exception as err:
        raise ArtifactError(
            f"{part.path}: expected weights that fit its config.json, got: {err}. "
            "The config and the weights belong to different models, or a file is damaged."
        ) from err
    # position_ids is a constant that older releases of transformers saved among the weights.
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.endswith("position_ids"))
    for problem, keys in (
        ("missing", sorted(info["missing_keys"])),
        ("unexpected", unexpected),
        ("mis-shaped", sorted(" ".join(map(str, key)) for key in info.get("mismatched_keys", ()))),
    ):
        if keys:
            raise ArtifactError(
                f"{part.path}: expected exactly the weights of {model_class.__name__}, got {len(keys)} {problem}: "
                f"{', '.join(keys[:3])}{'…' if len(keys) > 3 else ''}. "
                "The config and the weights belong to different models, or a file is damaged."
            )
    return model.eval().requires_grad_(False)
