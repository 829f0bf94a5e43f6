"""The networks of a checkpoint on disk: their configs and weight files, whole and nothing to unpickle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.bundle import read_config
from latentrt.runtime.errors import ArtifactError, ConfigError
from latentrt.runtime.manifest import sha256_of


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint; its weights are not yet read.

    Attributes:
        name: text_encoder, text_encoder_2, unet, vae, controlnet, controlnet_2…, taesd.
        path: its folder, with config.json.
        model_class: of diffusers or transformers.
        weights: the safetensors files in the folder.
        variant: "fp16" where only the `.fp16.safetensors` files exist.
    """

    name: str
    path: Path
    model_class: str
    weights: tuple[str, ...]
    variant: str | None

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return checkpoint_config(self.path / "config.json")

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the config and the weights, by `<name>/<file>`."""
        return {f"{self.name}/{file}": sha256_of(self.path / file) for file in ("config.json", *self.weights)}


def open_part(name: str, path: Path, model_class: str) -> Part:
    """Find a network's files.

    Raises:
        ArtifactError: the config or a weight file is missing, truncated or pickled.
    """
    checkpoint_config(path / "config.json")
    weights, variant = _weight_files(path, "model" if name.startswith("text_encoder") else "diffusion_pytorch_model")
    return Part(name=name, path=path, model_class=model_class, weights=weights, variant=variant)


def open_separate_part(name: str, path: Path, model_class: str) -> Part:
    """Find the files of a network that comes in a folder of its own, such as a ControlNet.

    Raises:
        ArtifactError: the folder, its config or a weight file is missing, truncated or pickled.
        ConfigError: the config is of another class.
    """
    if not (path / "config.json").is_file():
        raise ArtifactError(f"{path}: expected the folder of a {model_class}, with config.json, found none.")
    found = checkpoint_config(path / "config.json").get("_class_name")
    if found != model_class:
        raise ConfigError(f"{path}: expected {model_class}, got {found}. It is not supported yet.")
    return open_part(name, path, model_class)


def checkpoint_config(path: Path) -> dict[str, Any]:
    """A config of the checkpoint; `read_config` speaks of exporting again, which does not help here.

    Raises:
        ArtifactError: it is missing or no JSON object.
    """
    try:
        return read_config(path)
    except ArtifactError as err:
        raise ArtifactError(f"{path}: expected a JSON config of the checkpoint, found none. Copy it again.") from err


def _weight_files(path: Path, stem: str) -> tuple[tuple[str, ...], str | None]:
    """The safetensors files of a component, complete and whole, and their variant."""
    for variant in (None, "fp16"):
        middle = f".{variant}" if variant else ""
        single = path / f"{stem}{middle}.safetensors"
        index = path / f"{stem}.safetensors.index{middle}.json"
        if single.is_file():
            names: tuple[str, ...] = (single.name,)
        elif index.is_file():
            names = tuple(sorted(set(checkpoint_config(index).get("weight_map", {}).values())))
        else:
            continue
        for name in names:
            check_safetensors(path / name)
        return names, variant
    pickled = sorted(p.name for p in path.glob("*.bin"))
    hint = f" {pickled[0]} is a pickle and is not read: save it as safetensors." if pickled else " Copy it again."
    raise ArtifactError(f"{path / stem}.safetensors: expected the component's weights, found none.{hint}")


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
