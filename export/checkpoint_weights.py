"""Loading a checkpoint's weights, and refusing those that do not fit to the last one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from latentrt.runtime.errors import ArtifactError, ConfigError

from .checkpoint import Checkpoint


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
    """The checkpoint as a diffusers `StableDiffusionPipeline` in float32 on the CPU, in eval mode.

    The safety checker is left out; nothing is downloaded and nothing is unpickled.

    Raises:
        ArtifactError: a weight is missing, unexpected or of another shape, or a file cannot be read.
        ConfigError: diffusers does not know the scheduler.
    """
    with libraries_quiet():
        import diffusers
        import torch
        from transformers import CLIPTextModel, CLIPTokenizer

        classes = {
            "text_encoder": CLIPTextModel,
            "unet": diffusers.UNet2DConditionModel,
            "vae": diffusers.AutoencoderKL,
        }
        # Sizes that differ come back in the loading info, by name, only from transformers and only on request.
        options: dict[str, dict[str, Any]] = {
            "text_encoder": {"dtype": torch.float32, "ignore_mismatched_sizes": True},
            "unet": {"torch_dtype": torch.float32},
            "vae": {"torch_dtype": torch.float32},
        }
        models = {
            folder: _load(checkpoint, folder, model_class, options[folder]) for folder, model_class in classes.items()
        }
        scheduler_class = getattr(diffusers, checkpoint.scheduler_class, None)
        if scheduler_class is None:
            raise ConfigError(
                f"{checkpoint.path}/scheduler: expected a scheduler of diffusers, got {checkpoint.scheduler_class}."
            )
        try:
            tokenizer = CLIPTokenizer.from_pretrained(checkpoint.path / "tokenizer", local_files_only=True)
        except Exception as err:
            raise ArtifactError(f"{checkpoint.path}/tokenizer: expected a CLIP tokenizer, got: {err}") from err
        pipeline = diffusers.StableDiffusionPipeline(
            **models,
            tokenizer=tokenizer,
            scheduler=scheduler_class.from_pretrained(checkpoint.path / "scheduler", local_files_only=True),
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load(checkpoint: Checkpoint, folder: str, model_class: Any, options: dict[str, Any]) -> Any:
    where = checkpoint.path / folder
    try:
        model, info = model_class.from_pretrained(
            where,
            local_files_only=True,
            use_safetensors=True,
            variant=checkpoint.variant,
            output_loading_info=True,
            **options,
        )
    except Exception as err:
        raise ArtifactError(
            f"{where}: expected weights that fit its config.json, got: {err}. "
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
                f"{where}: expected exactly the weights of {model_class.__name__}, got {len(keys)} {problem}: "
                f"{', '.join(keys[:3])}{'…' if len(keys) > 3 else ''}. "
                "The config and the weights belong to different models, or a file is damaged."
            )
    return model.eval().requires_grad_(False)
