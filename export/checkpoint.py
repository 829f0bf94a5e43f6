"""Opening a diffusers checkpoint: what it consists of, and whether that can be exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import ArtifactError, ConfigError

from .checkpoint_parts import Part, checkpoint_config, open_part, open_separate_part
from .config_checks import check_controlnet, check_taesd, check_unet

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
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
# Folders copied into a bundle as they are.
COPIED = ("scheduler", "tokenizer", "tokenizer_2")


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder whose layout, classes and configs were checked; weights are not yet read.

    Attributes:
        path: the folder.
        pipeline_class: `_class_name` of model_index.json.
        scheduler_class: the class of the scheduler, by name.
        parts: the networks by name, those from other folders included.
        index: model_index.json.
        left_out: what it holds and a bundle does not take: the safety checker, image encoders.
    """

    path: Path
    pipeline_class: str
    scheduler_class: str
    parts: Mapping[str, Part]
    index: Mapping[str, Any]
    left_out: tuple[str, ...] = ()

    @property
    def components(self) -> dict[str, str]:
        """Component of the bundle -> the part that it is made from, in the order of a run."""
        controlnets = [name for name in self.parts if name.startswith("controlnet")]
        encoders = [name for name in ("text_encoder", "text_encoder_2") if name in self.parts]
        return {
            **{name: name for name in (*encoders, "unet")},
            **({"unet_control": "unet"} if controlnets else {}),
            **{name: name for name in controlnets},
            "vae_decoder": "vae",
            "vae_encoder": "vae",
            **({"taesd_decoder": "taesd"} if "taesd" in self.parts else {}),
        }

    def hashes(self, part: str) -> dict[str, str]:
        """SHA-256 of one part's config and weights, by `<part>/<file>`."""
        return self.parts[part].hashes()

    def copied_files(self) -> dict[str, Path]:
        """Bundle name -> file: what a bundle takes over unchanged. Both VAE halves get the VAE's config."""
        files = {"model_index.json": self.path / "model_index.json"}
        for folder in COPIED:
            if self.index.get(folder) and (self.path / folder).is_dir():
                files |= {f"{folder}/{p.name}": p for p in sorted((self.path / folder).iterdir()) if p.is_file()}
        for component, part in self.components.items():
            if component != "unet_control":
                files[f"{component}/config.json"] = self.parts[part].path / "config.json"
        return files


def open_checkpoint(path: Path, *, controlnets: Sequence[Path] = (), taesd: Path | None = None) -> Checkpoint:
    """Check a checkpoint's layout and configs without reading its weights.

    Args:
        path: a diffusers folder.
        controlnets: folders of ControlNets to add to those that the checkpoint holds itself.
        taesd: the folder of an `AutoencoderTiny` for previews.

    Raises:
        ArtifactError: a folder is missing or no diffusers checkpoint, or a file of it is missing or truncated.
        ConfigError: its pipeline, a component or an option of one is not supported.
    """
    index = _index_of(path)
    scheduler = _class_of(index, "scheduler")
    if scheduler is None:
        raise ConfigError(f"{path}/scheduler: expected a scheduler class in model_index.json, got none.")
    checkpoint_config(path / "scheduler/scheduler_config.json")
    for folder, expected in MODELS.items():
        found = _class_of(index, folder)
        if found != expected and (found is not None or folder in REQUIRED):
            raise ConfigError(f"{path}/{folder}: expected {expected}, got {found}. It is not supported yet.")
    present = [folder for folder in MODELS if _class_of(index, folder)]
    if "text_encoder" not in present and "text_encoder_2" not in present:
        raise ConfigError(f"{path}: expected a text encoder in model_index.json, got none. It is not supported yet.")
    for folder in present:
        if folder.startswith("text_encoder"):
            _check_tokenizer(path / folder.replace("text_encoder", "tokenizer"))
    parts = {folder: open_part(folder, path / folder, MODELS[folder]) for folder in present}
    for name, controlnet in _controlnet_folders(path, index, controlnets).items():
        parts[name] = open_separate_part(name, controlnet, "ControlNetModel")
    if taesd is not None:
        parts["taesd"] = open_separate_part("taesd", taesd, "AutoencoderTiny")
    check_unet(parts)
    for name, part in parts.items():
        if name.startswith("controlnet"):
            check_controlnet(part, parts["unet"], parts["vae"])
    if "taesd" in parts:
        check_taesd(parts["taesd"], parts["vae"])
    return Checkpoint(
        path=path,
        pipeline_class=str(index["_class_name"]),
        scheduler_class=scheduler,
        parts=parts,
        index=index,
        left_out=tuple(name for name in OPTIONAL if _class_of(index, name)),
    )


def _index_of(path: Path) -> dict[str, Any]:
    if not (path / "model_index.json").is_file():
        found = "nothing" if not path.exists() else "a file" if path.is_file() else "no model_index.json in it"
        raise ArtifactError(
            f"{path}: expected a diffusers checkpoint, a folder with model_index.json, found {found}. "
            "Convert a single-file checkpoint first, with diffusers' from_single_file and save_pretrained."
        )
    index = checkpoint_config(path / "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ConfigError(f"{path}: expected one of {', '.join(PIPELINES)}, got {name}. It is not supported yet.")
    known = {*MODELS, *OPTIONAL, *COPIED, "controlnet"}
    for entry in index:
        if entry not in known and (found_class := _class_of(index, entry)) is not None:
            raise ConfigError(
                f"{path}/{entry}: expected no such component, got {found_class}. It is not supported yet."
            )
    return index


def _class_of(index: Mapping[str, Any], folder: str) -> str | None:
    entry = index.get(folder)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else None


def _controlnet_folders(path: Path, index: Mapping[str, Any], others: Sequence[Path]) -> dict[str, Path]:
    """Component name -> folder; diffusers saves several as controlnet, controlnet_1 and so on."""
    folders = []
    own = _class_of(index, "controlnet")
    if own == "MultiControlNetModel":
        folders = [path / "controlnet"]
        while (following := path / f"controlnet_{len(folders)}").is_dir():
            folders.append(following)
    elif own is not None:
        folders = [path / "controlnet"]
    names = ["controlnet", *(f"controlnet_{number}" for number in range(2, 2 + len(folders) + len(others)))]
    return dict(zip(names, [*folders, *others], strict=False))


def _check_tokenizer(folder: Path) -> None:
    if (folder / "tokenizer.json").is_file():
        return
    for required in ("vocab.json", "merges.txt"):
        if not (folder / required).is_file():
            raise ArtifactError(f"{folder / required}: expected a tokenizer file, found none. Copy it again.")
