"""Workers that draw known pictures, and a bundle without networks for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.benchmarks.cases import Settings, Subject
from latentrt.benchmarks.workers import Opened
from latentrt.runtime.errors import BackendError
from latentrt.runtime.image import Pictures
from latentrt.runtime.manifest import Artifact, FileRecord, Manifest, save_manifest

SIDE, CHANNELS = 24, 4
# What each precision adds to every pixel of the fp32 picture, and to its latents, relative, at each step.
LEVELS = {"fp32": 0, "fp16": 1, "int8": 4}


def write_bundle(folder: Path, precisions: Sequence[str] = ("fp32", "fp16", "int8")) -> Path:
    """A manifest that names the networks of a run in each precision, and a scheduler's config; nothing else."""
    networks = ("text_encoder", "unet", "vae_decoder")
    artifacts = tuple(
        Artifact(name, precision, f"{name}/{precision}.onnx", (f"{name}/{precision}.onnx",), 20, "a", {}, {}, 1)
        for name in networks
        for precision in precisions
    )
    files = {artifact.path: FileRecord("a" * 64, 1) for artifact in artifacts}
    (folder / "scheduler").mkdir(parents=True)
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    save_manifest(folder, Manifest("drawn", "StableDiffusionPipeline", "0", files=files, artifacts=artifacts))
    return folder


def level(subject: Subject, settings: Settings, seed: int) -> int:
    """What a picture is off the one of infinitely many steps: more for fewer steps, and for later seeds in int8."""
    later = seed % 4 if subject.precision == "int8" else 0
    return LEVELS[subject.precision] + later + 100 // settings.steps - 1


def picture(prompt: str, seed: int, off: int) -> Pictures:
    """Noise of the prompt and the seed, with room for `off`."""
    pixels = np.random.default_rng([seed, *prompt.encode()]).integers(40, 160, (SIDE, SIDE, 3))
    return (pixels + off).astype(np.uint8)


def trajectory(seed: int, steps: int, share: float) -> NDArray[np.float32]:
    """Noise of the seed (steps, c, h/8, w/8), larger by a share."""
    latents = np.random.default_rng(seed).standard_normal((steps, CHANNELS, SIDE // 8, SIDE // 8))
    return (latents * (1 + share)).astype(np.float32)


@dataclass
class Drawer:
    """In the place of processes: notes what is opened and drawn, and can be made to fail.

    Attributes:
        opened: subjects, in order.
        drawn: subject, settings, prompts and seed of each run.
        broken: system and precision of those that cannot be opened.
        failing: steps that a run fails with.
        more_steps: of peers' trajectories.
        side: pixels of a picture's height.
        most: runs after which the user stops it all.
    """

    opened: list[Subject] = field(default_factory=list)
    drawn: list[tuple[Subject, Settings, tuple[str, ...], int]] = field(default_factory=list)
    broken: tuple[tuple[str, str], ...] = ()
    failing: tuple[int, ...] = ()
    more_steps: int = 0
    side: int = SIDE
    most: int = 10_000

    @contextmanager
    def open(self, subject: Subject) -> Iterator[_Worker]:
        """As `workers.open_worker`."""
        self.opened.append(subject)
        if (subject.system, subject.precision) in self.broken:
            raise BackendError(f"{subject.label}: expected networks, got none. Export them.\nThe end of its stderr: x")
        yield _Worker(self, subject)


@dataclass
class _Worker:
    drawer: Drawer
    subject: Subject

    @property
    def opened(self) -> Opened:
        return Opened(
            imports=0.1,
            load=0.1,
            backend=f"{self.subject.backend} CPU",
            on_gpu=False,
            precisions={},
            notes=(),
            packages={},
            rss=1,
        )

    def run(
        self,
        settings: Settings | Mapping[str, Any],
        prompts: Sequence[str],
        seed: int,
        *,
        keep: Path | None = None,
        timed: bool = True,
    ) -> None:
        if isinstance(settings, Mapping):
            settings = Settings(**{name: value for name, value in settings.items() if name != "scheduler"})
        drawer, subject = self.drawer, self.subject
        assert not timed
        assert keep is not None
        assert len(prompts) == subject.batch
        if len(drawer.drawn) >= drawer.most:
            keep.write_bytes(b"half a file")
            raise KeyboardInterrupt
        drawer.drawn.append((subject, settings, tuple(prompts), seed))
        if settings.steps in drawer.failing:
            raise BackendError(f"{subject.label}: black pictures.")
        steps = settings.steps + (drawer.more_steps if subject.system != "latentrt" else 0)
        share = LEVELS[subject.precision] / 100
        seeds = range(seed, seed + len(prompts))
        images = [picture(text, own, level(subject, settings, own)) for text, own in zip(prompts, seeds, strict=True)]
        latents = [trajectory(own, steps, share) for own in seeds]
        np.savez(keep, images=np.stack(images)[:, : drawer.side], trajectory=np.stack(latents, axis=1))
