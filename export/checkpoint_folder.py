"""Checkpoints in a diffusers folder: the networks and texts that its model_index.json names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import ArtifactError, ConfigError

from .checkpoint_parts import SAFETY_CHECKER, Part, checkpoint_config, controlnet_name, open_part, open_separate_part
from .known_models import model_of_class

PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
)
# Component folder -> the class that model_index.json has to name.
MODELS = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}
REQUIRED = ("unet", "vae")
# What a pipeline runs without.
OPTIONAL = (SAFETY_CHECKER, "image_encoder")
# Folders copied into a bundle as they are.
COPIED = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")


@dataclass(frozen=True)
class Folder:
    """What a diffusers folder holds; weights are not yet read.

    Attributes:
        parts: the networks by name.
        model_index: model_index.json.
        scheduler_config: scheduler/scheduler_config.json.
        texts: the index and the files of scheduler, tokenizers and preprocessing, by their names there.
        left_out: components that are not taken: image encoders and the like.
    """

    parts: Mapping[str, Part]
    model_index: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    texts: Mapping[str, bytes]
    left_out: tuple[str, ...]


def open_folder(path: Path) -> Folder:
    """Open a diffusers folder; of its weights, only names and shapes are read.

    Raises:
        ArtifactError: it is no checkpoint, or a file is missing or damaged.
        ConfigError: its pipeline or a component is not supported.
    """
    index = _index_of(path)
    if class_of(index, "scheduler") is None:
        raise ConfigError(f"{path}/scheduler: expected a scheduler class in model_index.json, got none.")
    scheduler = checkpoint_config(path / "scheduler/scheduler_config.json")
    for folder, expected in MODELS.items():
        found = class_of(index, folder)
        if found != expected and (found is not None or folder in REQUIRED):
            raise ConfigError(
                f"{path}/{folder}: expected {expected}, got {found}.{model_of_class(found)} It is not supported yet."
            )
    present = [folder for folder in MODELS if class_of(index, folder)]
    if "text_encoder" not in present and "text_encoder_2" not in present:
        raise ConfigError(f"{path}: expected a text encoder in model_index.json, got none. It is not supported yet.")
    for folder in present:
        if folder.startswith("text_encoder"):
            _check_tokenizer(path / folder.replace("text_encoder", "tokenizer"))
    parts = {folder: open_part(folder, path / folder, MODELS[folder]) for folder in present}
    for number, source in enumerate(_controlnet_folders(path, index), start=1):
        parts[controlnet_name(number)] = open_separate_part(controlnet_name(number), source, "ControlNetModel")
    if class_of(index, SAFETY_CHECKER) and (path / SAFETY_CHECKER).is_dir():
        parts[SAFETY_CHECKER] = open_part(SAFETY_CHECKER, path / SAFETY_CHECKER, "StableDiffusionSafetyChecker")
    return Folder(
        parts=parts,
        model_index=index,
        scheduler_config=scheduler,
        texts=_texts(path, index),
        left_out=tuple(name for name in OPTIONAL if class_of(index, name) and name not in parts),
    )


def _texts(path: Path, index: Mapping[str, Any]) -> dict[str, bytes]:
    files = [path / "model_index.json"]
    for folder in COPIED:
        if index.get(folder) and (path / folder).is_dir():
            files += [file for file in sorted((path / folder).iterdir()) if file.is_file()]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def _index_of(path: Path) -> dict[str, Any]:
    if not (path / "model_index.json").is_file():
        found = "no model_index.json in it" if path.exists() else "nothing"
        raise ArtifactError(
            f"{path}: expected a diffusers checkpoint, a folder with model_index.json, or a .safetensors file, "
            f"found {found}. Give one of those, or the id of a repository on the Hugging Face hub."
        )
    index = checkpoint_config(path / "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ConfigError(
            f"{path}: expected one of {', '.join(PIPELINES)}, got {name}.{model_of_class(name)} "
            "It is not supported yet."
        )
    known = {*MODELS, *OPTIONAL, *COPIED, "controlnet"}
    for entry in index:
        if entry not in known and (found_class := class_of(index, entry)) is not None:
            raise ConfigError(
                f"{path}/{entry}: expected no such component, got {found_class}.{model_of_class(found_class)} "
                "It is not supported yet."
            )
    return index


def class_of(index: Mapping[str, Any], folder: str) -> str | None:
    """The class that model_index.json names for a component; None where it has none."""
    entry = index.get(folder)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else None


def _controlnet_folders(path: Path, index: Mapping[str, Any]) -> list[Path]:
    """Those of the checkpoint itself; diffusers saves several as controlnet, controlnet_1 and so on."""
    own = class_of(index, "controlnet")
    folders = [] if own is None else [path / "controlnet"]
    while own == "MultiControlNetModel" and (following := path / f"controlnet_{len(folders)}").is_dir():
        folders.append(following)
    return folders


def _check_tokenizer(folder: Path) -> None:
    if (folder / "tokenizer.json").is_file():
        return
    for required in ("vocab.json", "merges.txt"):
        if not (folder / required).is_file():
            raise ArtifactError(f"{folder / required}: expected a tokenizer file, found none. Copy it again.")
