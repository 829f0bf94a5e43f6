"""Held-out pictures: the same prompts and seeds drawn in each precision, one file each, so that runs can go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from latentrt.export.recording import replaced_pipeline
from latentrt.runtime.backends import choose_graph, open_session
from latentrt.runtime.bundle import open_bundle, pipeline_files
from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.image import Pictures, save_png
from latentrt.runtime.lora_store import open_loras
from latentrt.runtime.lora_weights import lora_notes
from latentrt.runtime.manifest import key_of, write_atomic
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.precisions import usable_precisions
from latentrt.runtime.specs import Session

Progress: TypeAlias = Callable[[str, int, int], None]

REFERENCE = "fp32"
_RECORD = "drawn.json"
_OURS = ("prompt", "seed", "batch", "decode", "safety_checker")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What is drawn, and with what.

    Attributes:
        bundle: with the networks in all precisions.
        prompts: that the network was not calibrated with.
        seed: of the first prompt's picture; prompt i has seed + i.
        settings: of all pictures: attributes of `latentrt.runtime.Request` that JSON can hold.
        loras: of the bundle, by name, with scales or None for each one's own.
        backend: as `Pipeline.load` has it.
        batch: pictures that are drawn side by side.
        component: that alone is in the precision to draw in, while the others are in fp32, so that what is seen is its
            own effect; None for all that a run in that precision takes.
    """

    bundle: Path
    prompts: tuple[str, ...]
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    loras: Mapping[str, float | None] = field(default_factory=dict)
    backend: str = "onnxruntime"
    batch: int = 4
    component: str | None = None

    def __post_init__(self) -> None:
        """Check what needs no bundle.

        Raises:
            UsageError: there is no prompt, no picture in a batch, or a setting that is not the user's here.
        """
        if not self.prompts:
            raise UsageError("verify: expected held-out prompts, got none. Give more than are calibrated with.")
        if self.batch < 1:
            raise UsageError(f"batch: expected 1 or more, got {self.batch}.")
        if own := [name for name in _OURS if name in self.settings]:
            raise UsageError(f"verify: expected settings without {', '.join(own)}, which verification chooses itself.")

    @cached_property
    def lora_notes(self) -> tuple[dict[str, Any], ...]:
        """Name, scale and SHA-256 of each LoRA."""
        return tuple(lora_notes(open_loras(open_bundle(self.bundle), self.loras)))

    def key(self, precision: str) -> str:
        """Content key of the pictures in a precision, by graphs, prompts, seeds, settings and LoRAs.

        Raises:
            ArtifactError: the bundle has no manifest.
        """
        manifest = open_bundle(self.bundle).manifest
        if manifest is None:
            raise ArtifactError(f"{self.bundle}: expected a bundle with a manifest, found none. Export it again.")
        files = {
            name
            for artifact in manifest.artifacts
            if artifact.precision in self._precisions(artifact.component, precision)
            for name in artifact.files
        }
        return key_of(
            {
                "files": {name: manifest.files[name].sha256 for name in sorted(files)},
                "prompts": self.prompts,
                "seed": self.seed,
                "settings": self.settings,
                "loras": self.lora_notes,
                "backend": self.backend,
                "component": self.component,
            }
        )

    def session(self, component: str, precision: str) -> Session:
        """A network alone, in a precision or what stands in for it.

        Raises:
            UsageError: the bundle lacks it.
            ArtifactError: a file of it is missing, damaged or changed.
            BackendError: the backend cannot be used here.
        """
        bundle = open_bundle(self.bundle)
        held = bundle.precision_of(component, precision) or precision
        target = choose_graph(bundle, component, held, backend=self.backend).target
        bundle.check(pipeline_files(bundle, held, [component], target))
        return open_session(bundle, component, held, backend=self.backend)

    def pipeline(self, precision: str) -> Pipeline:
        """What draws in a precision.

        Raises: as `Pipeline.load`.
        """
        if self.component is None:
            return Pipeline.load(self.bundle, precision=precision, backend=self.backend, loras=self.loras)
        own = partial(self.session, self.component, precision)
        return replaced_pipeline(
            open_bundle(self.bundle), REFERENCE, self.component, own, backend=self.backend, loras=self.loras
        )

    def _precisions(self, component: str, precision: str) -> tuple[str, ...]:
        """Those in which a network may take part."""
        moved = self.component in (None, component)
        return usable_precisions(component, precision if moved else REFERENCE)


@dataclass(frozen=True)
class Drawn:
    """How pictures were drawn: precision of each network, and the backend for people."""

    precisions: Mapping[str, str]
    backend: str


def draw(
    drawing: Drawing, precision: str, folder: Path, *, on_progress: Progress = lambda what, done, total: None
) -> Drawn:
    """Draw what is missing of the pictures in a folder; pictures of another drawing in it are removed.

    Raises:
        UsageError: the bundle lacks the precision, or a setting does not fit it.
        ArtifactError: a file is missing, damaged or changed.
        BackendError: a network failed, or a picture is not finite or black.
        OSError: the disk is full or the folder not writable.
    """
    key, total = drawing.key(precision), len(drawing.prompts)
    record = read_keyed(folder / _RECORD, key)
    if record is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    missing = [index for index in range(total) if not picture_path(folder, index).exists()]
    if record is None or missing:
        # A checker that blackens both pictures would make them equal.
        settings = {**drawing.settings, "safety_checker": False}
        with drawing.pipeline(precision) as pipeline:
            backend = pipeline.backend
            own = {} if drawing.component is None else {drawing.component: precision}
            record = {"precisions": {**pipeline.precisions, **own}, "backend": backend}
            write_keyed(folder / _RECORD, key, record)
            for start in range(0, len(missing), drawing.batch):
                on_progress(f"draw {precision}", total - len(missing) + start, total)
                chosen = missing[start : start + drawing.batch]
                prompts = [drawing.prompts[index] for index in chosen]
                result = pipeline(prompts, seed=[drawing.seed + index for index in chosen], **settings)
                for index, picture in zip(chosen, result.images, strict=True):
                    save_png(picture_path(folder, index), picture)
    on_progress(f"draw {precision}", total, total)
    return Drawn(**record)


def picture_path(folder: Path, index: int) -> Path:
    """The file of a prompt's picture."""
    return folder / f"{index:05}.png"


def read_picture(folder: Path, index: int) -> Pictures:
    """A prompt's picture, (h, w, 3).

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    from PIL import Image

    path = picture_path(folder, index)
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError) as err:
        raise ArtifactError(f"{path}: expected a picture, got {err}. Verify again.") from err


def read_pictures(folder: Path, count: int) -> Iterator[Pictures]:
    """The pictures of the first prompts, one at a time.

    Raises:
        ArtifactError: as `read_picture`.
    """
    return (read_picture(folder, index) for index in range(count))


def write_keyed(path: Path, key: str, content: Mapping[str, Any]) -> None:
    """Write a JSON object that `read_keyed` finds with the same key alone.

    Raises:
        OSError: the disk is full or the folder not writable.
    """
    write_atomic(path, json.dumps({"key": key, "content": content}).encode())


def read_keyed(path: Path, key: str) -> Any:
    """What was written with a key; None if nothing was, with another key, or if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["content"] if found["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
