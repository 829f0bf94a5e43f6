"""Opening a checkpoint: what it consists of, and whether that can be exported."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import UsageError
from latentrt.runtime.manifest import sha256_of
from latentrt.runtime.textual_inversion import load_textual_inversion

from .checkpoint_folder import MODELS, class_of, open_folder
from .checkpoint_parts import SAFETY_CHECKER, Part, checkpoint_config, controlnet_name, open_separate_part
from .config_checks import check_controlnet, check_taesd, check_unet
from .fold_embeddings import folded
from .hub import download, is_hub_id
from .lora import fused
from .lora_file import read_lora
from .part_files import open_controlnet_file, open_vae_file
from .single_file import open_single_file
from .tokenizer_layouts import with_slow_files

# Components that are made from parts which not every checkpoint has.
BESIDE = {SAFETY_CHECKER: SAFETY_CHECKER, "taesd_decoder": "taesd"}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose layout, classes and configs were checked; weights are not yet read.

    Attributes:
        path: the folder or file.
        parts: the networks by name, those from other folders included.
        index: model_index.json.
        scheduler: scheduler_config.json.
        texts: what a bundle takes over unchanged beside configs, such as tokenizers, by its name there.
        left_out: what it holds and a bundle does not take: image encoders and the like.
        notes: what was decided about it that a user may want to know.
        hub: repository and commit, where it came from there.
    """

    path: Path
    parts: Mapping[str, Part]
    index: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    texts: Mapping[str, bytes]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    hub: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people: that of the repository, of the folder, or of the file without its ending."""
        if self.hub:
            return self.hub["repo_id"].rpartition("/")[2]
        path = self.path.resolve()
        return path.stem if path.is_file() else path.name

    @property
    def pipeline_class(self) -> str:
        """`_class_name` of model_index.json."""
        return str(self.index["_class_name"])

    @property
    def scheduler_class(self) -> str:
        """The class of the scheduler, by name."""
        return str(class_of(self.index, "scheduler"))

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
            **{name: part for name, part in BESIDE.items() if part in self.parts},
        }

    def hashes(self) -> dict[str, dict[str, str]]:
        """By part: SHA-256 of the files that it was made from, and of what was folded in. Every file is read once."""
        paths = {path for part in self.parts.values() for path in part.files.values()}
        known = {path: sha256_of(path) for path in sorted(paths)}
        return {name: part.hashes(known) for name, part in self.parts.items()}

    def copied_files(self) -> dict[str, bytes]:
        """Bundle name -> content of what a bundle takes over beside graphs. Both VAE halves get the VAE's config."""
        files = {"model_index.json": self.texts.get("model_index.json") or _as_json(self.index)}
        files["scheduler/scheduler_config.json"] = _as_json(self.scheduler)
        files |= with_slow_files(self.texts)
        for component, part in self.components.items():
            if component != "unet_control":
                files[f"{component}/config.json"] = _config_of(self.parts[part])
        return files


def _as_json(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()


def _config_of(part: Part) -> bytes:
    """The file as it is, unless what was folded in changed the config."""
    file = part.files.get(f"{part.name}/config.json")
    if file is not None and checkpoint_config(file) == part.config:
        return file.read_bytes()
    return _as_json(part.config)


def open_checkpoint(
    path: Path | str,
    *,
    controlnets: Sequence[Path] = (),
    taesd: Path | None = None,
    vae: Path | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    embeddings: Sequence[tuple[Path, str | None]] = (),
    prediction_type: str | None = None,
    config: Path | None = None,
) -> Checkpoint:
    """Check a checkpoint's layout and configs; of its weights, only names and shapes are read.

    Args:
        path: a diffusers folder, a single `.safetensors` file in the original layout, or the id of a repository on the
            Hugging Face hub, `owner/name` or `owner/name@revision`.
        controlnets: folders or files of ControlNets to add to those that the checkpoint holds itself.
        taesd: the folder of an `AutoencoderTiny` for previews.
        vae: the folder or file of a VAE to take instead of the checkpoint's.
        loras: files to fuse, each with its scale, in this order.
        embeddings: files of textual inversions to fold into the text encoders, each with the word for it, or None for
            the word in the file.
        prediction_type: epsilon or v_prediction, for a single file that does not tell.
        config: a diffusers folder with configs for a single file.

    Raises:
        ArtifactError: a file or folder is missing, damaged or no checkpoint.
        ConfigError: its pipeline, a component or an option of one is not supported.
        UsageError: a single file does not tell its prediction type, or what is for single files is given with another
            checkpoint; a LoRA's scale or a textual inversion's word cannot be taken.
    """
    checkpoint = _open_source(path, prediction_type, config)
    parts = dict(checkpoint.parts)
    if vae is not None:
        parts["vae"] = _open_vae(vae, parts["vae"])
    own = sum(name.startswith("controlnet") for name in parts)
    for number, controlnet in enumerate(controlnets, start=own + 1):
        parts[controlnet_name(number)] = _open_controlnet(controlnet_name(number), controlnet)
    if taesd is not None:
        parts["taesd"] = open_separate_part("taesd", taesd, "AutoencoderTiny")
    check_unet(parts)
    for name, part in parts.items():
        if name.startswith("controlnet"):
            check_controlnet(part, parts["unet"], parts["vae"])
    if "taesd" in parts:
        check_taesd(parts["taesd"], parts["vae"])
    for file, scale in loras:
        parts = fused(parts, read_lora(file), scale=scale)
    texts = dict(checkpoint.texts)
    if embeddings:
        inversions = [load_textual_inversion(file, name=word) for file, word in embeddings]
        parts, texts = folded(parts, texts, inversions)
    return replace(checkpoint, parts=parts, texts=texts)


def _open_source(path: Path | str, prediction_type: str | None, config: Path | None) -> Checkpoint:
    on_hub = is_hub_id(path)
    if on_hub or Path(path).is_dir():
        for option, value in (("--prediction-type", prediction_type), ("--config", config)):
            if value is not None:
                raise UsageError(
                    f"{option}: expected a checkpoint in a single file with it, got {path}, which has its own configs. "
                    "Leave the option out."
                )
    if on_hub:
        snapshot = download(path)
        return replace(
            _from_folder(snapshot.path),
            notes=(f"commit {snapshot.commit} of {snapshot.repo_id} on the hub",),
            hub={"repo_id": snapshot.repo_id, "commit": snapshot.commit},
        )
    path = Path(path)
    return _from_file(path, prediction_type, config) if path.is_file() else _from_folder(path)


def _from_folder(path: Path) -> Checkpoint:
    folder = open_folder(path)
    return Checkpoint(
        path=path,
        parts=folder.parts,
        index=folder.model_index,
        scheduler=folder.scheduler_config,
        texts=folder.texts,
        left_out=folder.left_out,
    )


def _from_file(path: Path, prediction_type: str | None, config: Path | None) -> Checkpoint:
    single = open_single_file(path, prediction_type=prediction_type, config=config)
    return Checkpoint(
        path=path,
        parts=single.parts,
        index=single.model_index,
        scheduler=single.scheduler_config,
        texts=single.tokenizer_files,
        notes=(f"taken for {single.family}", *single.notes),
    )


def _open_vae(path: Path, instead_of: Part) -> Part:
    if path.is_file():
        part = open_vae_file(path, instead_of=instead_of)
    else:
        part = open_separate_part("vae", path, MODELS["vae"])
    return replace(part, changes=({"kind": "vae", "file": path.resolve().name},))


def _open_controlnet(name: str, path: Path) -> Part:
    return open_controlnet_file(name, path) if path.is_file() else open_separate_part(name, path, "ControlNetModel")
