"""Checkpoints in one safetensors file, in the original layout of Stable Diffusion 1, 2, XL and the XL refiner.

Such a file holds weights alone. Configs, noise schedule and tokenizers are those that were published with its family,
adapted to the shapes found, or those of a folder that the caller names. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import ArtifactError, ConfigError

from .checkpoint_parts import Part, checkpoint_config
from .clip_names import clip_config, clip_layers, clip_names, open_clip_names, open_clip_weight
from .clip_tokenizer import END, VOCABULARY_SIZE, tokenizer_files
from .ldm_names import unet_names
from .ldm_vae import vae_config, vae_names, vae_structure, vae_weight
from .prediction_type import with_prediction_type
from .published_configs import Configs, published_configs
from .renaming import Renaming, below, check_names
from .safetensors_file import read_safetensors
from .single_file_extras import is_extra, notes_on
from .single_file_family import UNET, VAE, Encoder, Family, family_of
from .unet_config import unet_config
from .unet_structure import ldm_structure
from .weights import Weight, Weights

# Layers of OpenCLIP's encoder that Stable Diffusion 2 uses: all but the last, which most files hold all the same.
_SD2_LAYERS = 23
# Latents of 512 pixels, at which those models of Stable Diffusion 2 were trained that predict noise.
_SD2_EPSILON_SIZE = 64
_LATENTS = 4


@dataclass(frozen=True)
class SingleFile:
    """What a single file stands for, as a diffusers folder would hold it; weights are not yet read.

    Attributes:
        family: what the file was taken for, such as "Stable Diffusion 1 inpainting".
        parts: the networks by name.
        model_index: model_index.json.
        scheduler_config: scheduler/scheduler_config.json.
        tokenizer_files: the tokenizers' files by their names in a bundle.
        notes: what was decided or left out that a user may want to know.
    """

    family: str
    parts: Mapping[str, Part]
    model_index: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    tokenizer_files: Mapping[str, bytes]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Task:
    """What a U-Net with more inputs than latents is for.

    Attributes:
        title: behind the family's.
        pipeline: what its pipeline's name has.
        scheduler: the class that it was published with, where not the family's.
    """

    title: str
    pipeline: str
    scheduler: str | None = None


# By input channels.
_TASKS = {
    2 * _LATENTS: _Task(" InstructPix2Pix", "InstructPix2Pix", "EulerAncestralDiscreteScheduler"),
    2 * _LATENTS + 1: _Task(" inpainting", "Inpaint"),
}


def open_single_file(path: Path, *, prediction_type: str | None = None, config: Path | None = None) -> SingleFile:
    """Open a checkpoint in one file; of its weights, only names and shapes are read.

    Args:
        path: the file.
        prediction_type: epsilon or v_prediction, for files that do not tell.
        config: a diffusers folder of which the configs, scheduler and tokenizers go before the published ones, as far
            as it has them.

    Raises:
        ArtifactError: the file is damaged, lacks weights or has others than those of its family, or the folder has no
            configs.
        ConfigError: it is of a model that is not supported.
        UsageError: the prediction type is unknown, or needed and not given.
    """
    file = read_safetensors(path)
    weights = file.weights
    family = family_of(weights, path)
    published = published_configs(family.key)
    structure = ldm_structure(below(weights, UNET), path, goes_up=True)
    vae = vae_structure(below(weights, VAE), path)
    layers = {encoder.part: _layers(family, below(weights, encoder.prefix)) for encoder in family.encoders}
    renamings = {
        **{encoder.part: _encoder_renaming(encoder, layers[encoder.part], weights) for encoder in family.encoders},
        "unet": Renaming(UNET, unet_names(structure)),
        "vae": Renaming(VAE, vae_names(vae), vae_weight),
    }
    channels = _input_channels(weights)
    task = _TASKS.get(channels, _Task("", ""))
    title = family.title + task.title
    check_names(weights, list(renamings.values()), origin=path, taken_for=title, ignored=is_extra)
    own = {part: renaming.apply(weights) for part, renaming in renamings.items()}
    given = _given_configs(config, (*renamings, "model_index", "scheduler"))
    scheduler, notes = with_prediction_type(
        given.get("scheduler") or _scheduler(published, task),
        asked=prediction_type,
        metadata=file.metadata,
        names=weights.keys(),
        ambiguous=family.key == "sd2" and channels == _LATENTS and "scheduler" not in given,
        origin=path,
    )
    configs: dict[str, Mapping[str, Any]] = {
        **{part: clip_config(count, own[part], published[part], path) for part, count in layers.items()},
        "vae": vae_config(vae, own["vae"], published["vae"], path),
        **given,
    }
    if "unet" not in configs:
        configs["unet"] = unet_config(structure, own["unet"], published["unet"], path)
        if family.key == "sd2" and scheduler["prediction_type"] == "epsilon":
            configs["unet"] = {**configs["unet"], "sample_size": _SD2_EPSILON_SIZE}
    return SingleFile(
        family=title,
        parts={part: _part(part, path, configs[part], own[part], published, config) for part in renamings},
        model_index=given.get("model_index") or _model_index(published, task, str(scheduler["_class_name"])),
        scheduler_config=scheduler,
        tokenizer_files=_tokenizers(family, configs, config, path),
        notes=(*notes, *notes_on(weights)),
    )


def _layers(family: Family, weights: Weights) -> int:
    found = clip_layers(weights)
    return min(found, _SD2_LAYERS) if family.key == "sd2" else found


def _encoder_renaming(encoder: Encoder, layers: int, weights: Weights) -> Renaming:
    if encoder.open_clip:
        names = open_clip_names(layers, projected=encoder.part == "text_encoder_2")
        return Renaming(encoder.prefix, names, open_clip_weight)
    wrapped = any(name.startswith(f"{encoder.prefix}text_model.") for name in weights)
    return Renaming(encoder.prefix, clip_names(layers, wrapped=wrapped))


def _input_channels(weights: Weights) -> int:
    """Of the U-Net; as of most where the weight is missing, which is said with the others that are."""
    first = weights.get(f"{UNET}input_blocks.0.0.weight")
    return first.shape[1] if first is not None and len(first.shape) == 4 else _LATENTS


def _scheduler(published: Configs, task: _Task) -> dict[str, Any]:
    own = {"_class_name": task.scheduler} if task.scheduler else {}
    return {**published["scheduler"], **own}


def _model_index(published: Configs, task: _Task, scheduler: str) -> dict[str, Any]:
    index = {**published["model_index"], "scheduler": ["diffusers", scheduler]}
    if task.pipeline:
        model = "StableDiffusionXL" if "text_encoder_2" in index else "StableDiffusion"
        index["_class_name"] = f"{model}{task.pipeline}Pipeline"
    return index


def _given_configs(config: Path | None, components: tuple[str, ...]) -> dict[str, Mapping[str, Any]]:
    """The configs that a folder has, by component."""
    if config is None:
        return {}
    names = {
        component: {
            "model_index": "model_index.json",
            "scheduler": "scheduler/scheduler_config.json",
        }.get(component, f"{component}/config.json")
        for component in components
    }
    found: dict[str, Mapping[str, Any]] = {
        component: checkpoint_config(config / name) for component, name in names.items() if (config / name).is_file()
    }
    if not found:
        raise ArtifactError(f"{config}: expected a diffusers folder with configs, found none in it. Check the path.")
    return found


def _part(
    part: str,
    path: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Weight],
    published: Configs,
    folder: Path | None,
) -> Part:
    files = {f"{part}/{path.name}": path}
    if folder is not None and (folder / part / "config.json").is_file():
        files[f"{part}/config.json"] = folder / part / "config.json"
    return Part(
        name=part,
        origin=path,
        config=config,
        model_class=published["model_index"][part][1],
        weights=weights,
        files=files,
    )


def _tokenizers(
    family: Family, configs: Mapping[str, Mapping[str, Any]], config: Path | None, path: Path
) -> dict[str, bytes]:
    """The tokenizers' files by bundle name: the given folder's, or CLIP's."""
    found: dict[str, bytes] = {}
    for encoder in family.encoders:
        name = encoder.part.replace("text_encoder", "tokenizer")
        if config is not None and (config / name).is_dir():
            given = sorted(file for file in (config / name).iterdir() if file.is_file())
            found |= {f"{name}/{file.name}": file.read_bytes() for file in given}
            continue
        if configs[encoder.part]["vocab_size"] != VOCABULARY_SIZE:
            raise ConfigError(
                f"{path}: expected a {encoder.part} of CLIP's {VOCABULARY_SIZE} tokens, got one of "
                f"{configs[encoder.part]['vocab_size']}. Give a folder with its tokenizer: --config"
            )
        files = tokenizer_files("!" if encoder.open_clip else END)
        found |= {f"{name}/{file}": content for file, content in files.items()}
    return found
