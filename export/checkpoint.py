"""Opening a diffusers checkpoint: every expected weight present, none unexpected, nothing unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.bundle import read_config
from latentrt.runtime.errors import ArtifactError, ConfigError
from latentrt.runtime.manifest import sha256_of

PIPELINES = ("StableDiffusionPipeline",)
# Component folder -> the class that model_index.json has to name.
MODELS = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
# Folders copied into a bundle as they are.
COPIED = ("scheduler", "tokenizer")


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder whose layout and classes were checked; weights are not yet read.

    Attributes:
        path: the folder.
        pipeline_class: `_class_name` of model_index.json.
        scheduler_class: the class of the scheduler, by name.
        weights: component folder -> its safetensors files, relative to the checkpoint.
        variant: "fp16" where only the `.fp16.safetensors` files exist.
    """

    path: Path
    pipeline_class: str
    scheduler_class: str
    weights: Mapping[str, tuple[str, ...]]
    variant: str | None

    def hashes(self, folder: str) -> dict[str, str]:
        """SHA-256 of one component's config and weights, by file name relative to the checkpoint."""
        names = [f"{folder}/config.json", *self.weights[folder]]
        return {name: sha256_of(self.path / name) for name in names}

    def copied_files(self) -> dict[str, Path]:
        """Bundle name -> file: what a bundle takes over unchanged. Both VAE halves get the VAE's config."""
        files = {"model_index.json": self.path / "model_index.json"}
        for folder in COPIED:
            files |= {f"{folder}/{p.name}": p for p in sorted((self.path / folder).iterdir()) if p.is_file()}
        for component, folder in (
            ("text_encoder", "text_encoder"),
            ("unet", "unet"),
            ("vae_decoder", "vae"),
            ("vae_encoder", "vae"),
        ):
            files[f"{component}/config.json"] = self.path / folder / "config.json"
        return files


def open_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint's layout without reading its weights.

    Raises:
        ArtifactError: the folder is missing or no diffusers checkpoint, or a file of it is missing or truncated.
        ConfigError: its pipeline or a component is of a class that is not supported.
    """
    if not (path / "model_index.json").is_file():
        found = "nothing" if not path.exists() else "a file" if path.is_file() else "no model_index.json in it"
        raise ArtifactError(
            f"{path}: expected a diffusers checkpoint, a folder with model_index.json, found {found}. "
            "Convert a single-file checkpoint first, with diffusers' from_single_file and save_pretrained."
        )
    index = read_config(path / "model_index.json")
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise ConfigError(f"{path}: expected {' or '.join(PIPELINES)}, got {name}. It is not supported yet.")
    for folder, expected in MODELS.items():
        if (found_class := _class_of(index, folder)) != expected:
            raise ConfigError(f"{path}/{folder}: expected {expected}, got {found_class}. It is not supported yet.")
    scheduler = _class_of(index, "scheduler")
    if scheduler is None:
        raise ConfigError(f"{path}/scheduler: expected a scheduler class in model_index.json, got none.")
    for required in ("scheduler/scheduler_config.json", *(f"{folder}/config.json" for folder in MODELS)):
        _config(path / required)
    tokenizer = path / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file():
        for required in ("vocab.json", "merges.txt"):
            if not (tokenizer / required).is_file():
                raise ArtifactError(f"{tokenizer / required}: expected a tokenizer file, found none. Copy it again.")
    found_weights = {folder: _weight_files(path, folder) for folder in MODELS}
    weights = {folder: names for folder, (names, _) in found_weights.items()}
    _check_unet(path)
    variant = next((variant for _, variant in found_weights.values() if variant), None)
    return Checkpoint(path=path, pipeline_class=str(name), scheduler_class=scheduler, weights=weights, variant=variant)


def _class_of(index: Mapping[str, Any], folder: str) -> str | None:
    entry = index.get(folder)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else None


def _config(path: Path) -> dict[str, Any]:
    """A config of the checkpoint; `read_config` speaks of exporting again, which does not help here."""
    try:
        return read_config(path)
    except ArtifactError as err:
        raise ArtifactError(f"{path}: expected a JSON config of the checkpoint, found none. Copy it again.") from err


def _check_unet(path: Path) -> None:
    unet, vae = _config(path / "unet/config.json"), _config(path / "vae/config.json")
    if unet.get("in_channels") != vae.get("latent_channels"):
        raise ConfigError(
            f"{path}/unet: expected as many input channels as the VAE's {vae.get('latent_channels')} latent channels, "
            f"got {unet.get('in_channels')}. Inpainting and other extended U-Nets are not supported yet."
        )
    for option in ("class_embed_type", "addition_embed_type", "num_class_embeds", "time_cond_proj_dim"):
        if unet.get(option) is not None:
            raise ConfigError(f"{path}/unet: expected no {option}, got {unet[option]!r}. It is not supported yet.")


def _weight_files(path: Path, folder: str) -> tuple[tuple[str, ...], str | None]:
    """The safetensors files of a component, complete and whole, and their variant."""
    stem = "model" if folder == "text_encoder" else "diffusion_pytorch_model"
    for variant in (None, "fp16"):
        middle = f".{variant}" if variant else ""
        single = path / folder / f"{stem}{middle}.safetensors"
        index = path / folder / f"{stem}.safetensors.index{middle}.json"
        if single.is_file():
            names: tuple[str, ...] = (single.name,)
        elif index.is_file():
            names = tuple(sorted(set(_config(index).get("weight_map", {}).values())))
        else:
            continue
        for name in names:
            check_safetensors(path / folder / name)
        return tuple(f"{folder}/{name}" for name in names), variant
    pickled = sorted(p.name for p in (path / folder).glob("*.bin"))
    hint = f" {pickled[0]} is a pickle and is not read: save it as safetensors." if pickled else " Copy it again."
    raise ArtifactError(f"{path / folder / stem}.safetensors: expected the component's weights, found none.{hint}")


def check_safetensors(path: Path) -> None:
    """Check a safetensors file's header against its size.

    Raises:
        ArtifactError: the file is missing, truncated or something else.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ArtifactError(f"{path}: expected the component's weights, found none. Copy the file again.")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError) as err:
        raise ArtifactError(
            f"{path}: expected a whole safetensors file, got {path.stat().st_size} bytes that are not one ({err}). "
            "The file is truncated or damaged: copy it again."
        ) from err
