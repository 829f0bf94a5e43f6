"""The networks of a checkpoint on disk: their configs, and weights that are read when they are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.bundle import read_config
from latentrt.runtime.errors import ArtifactError, ConfigError
from latentrt.runtime.manifest import key_of

from .known_models import model_of_class
from .safetensors_file import read_safetensors
from .weights import Weights

SAFETY_CHECKER = "safety_checker"


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint.

    Attributes:
        name: text_encoder, text_encoder_2, unet, vae, controlnet, controlnet_2…, taesd, safety_checker.
        origin: the folder or file that it came from.
        config: of the network, as its config.json has it.
        model_class: of diffusers or transformers.
        weights: by their names in the library's layout, of whatever release.
        files: what it was made from, by `<name>/<file>`.
        changes: LoRAs and the like that are folded into the weights.
    """

    name: str
    origin: Path
    config: Mapping[str, Any]
    model_class: str
    weights: Weights
    files: Mapping[str, Path]
    changes: tuple[Mapping[str, Any], ...] = ()

    def hashes(self, known: Mapping[Path, str]) -> dict[str, str]:
        """What it was made from, by `<name>/<file>`.

        Args:
            known: SHA-256 by file.
        """
        found = {name: known[path] for name, path in self.files.items()}
        if self.changes:
            found[f"{self.name}/changes"] = key_of({"changes": list(self.changes)})
        return found


def controlnet_name(number: int) -> str:
    """The name of a checkpoint's ControlNet, counted from 1."""
    return "controlnet" if number == 1 else f"controlnet_{number}"


def open_part(name: str, path: Path, model_class: str) -> Part:
    """Find a network's files in its folder.

    Raises:
        ArtifactError: the config or a weight file is missing, truncated or pickled.
    """
    config = checkpoint_config(path / "config.json")
    transformers = model_class.startswith("CLIP") or name == SAFETY_CHECKER
    names = _weight_files(path, "model" if transformers else "diffusion_pytorch_model")
    weights = {key: weight for file in names for key, weight in read_safetensors(path / file).weights.items()}
    files = {f"{name}/{file}": path / file for file in ("config.json", *names)}
    return Part(name=name, origin=path, config=config, model_class=model_class, weights=weights, files=files)


def open_separate_part(name: str, path: Path, model_class: str) -> Part:
    """Find the files of a network that comes in a folder of its own, such as a ControlNet.

    Raises:
        ArtifactError: the folder, its config or a weight file is missing, truncated or pickled.
        ConfigError: the config is of another class.
    """
    if not (path / "config.json").is_file():
        article = "an" if model_class[0] in "AEIOU" else "a"
        raise ArtifactError(
            f"{path}: expected the folder of {article} {model_class}, with config.json, found none. Check the path."
        )
    found = checkpoint_config(path / "config.json").get("_class_name")
    if found != model_class:
        raise ConfigError(
            f"{path}: expected {model_class}, got {found}.{model_of_class(found)} It is not supported yet."
        )
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


def _weight_files(path: Path, stem: str) -> tuple[str, ...]:
    """The names of a component's safetensors files; where there are two sets, those in full precision."""
    for middle in ("", ".fp16"):
        single = path / f"{stem}{middle}.safetensors"
        index = path / f"{stem}.safetensors.index{middle}.json"
        if single.is_file():
            return (single.name,)
        if index.is_file():
            names = set(map(str, checkpoint_config(index).get("weight_map", {}).values()))
            if outside := sorted(name for name in names if Path(name).name != name):
                raise ArtifactError(f"{index}: expected the names of files beside it, got {outside[0]}. Copy it again.")
            return tuple(sorted(names))
    pickled = sorted(p.name for p in path.glob("*.bin"))
    hint = f" {pickled[0]} is a pickle and is not read: save it as safetensors." if pickled else " Copy it again."
    raise ArtifactError(f"{path / stem}.safetensors: expected the component's weights, found none.{hint}")
