"""Pictures of a benchmark's cases with their trajectories, drawn once and kept, so that a benchmark can go on."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from latentrt.calibrate.pictures import read_keyed, write_keyed
from latentrt.runtime.errors import ArtifactError, BackendError, LatentrtError
from latentrt.runtime.image import Pictures
from latentrt.runtime.manifest import key_of

from .bench_plan import Progress, SettingsOf, own_settings, quiet
from .cases import Case, Model, Settings, Subject
from .workers import Opened

Floats: TypeAlias = NDArray[np.float32]

_RECORD = "drawn.json"
_SCRATCH = "part.npz"


class DrawingWorker(Protocol):
    """The parts of `workers.Worker` that draw, and are documented there. All may raise LatentrtError."""

    @property
    def opened(self) -> Opened: ...  # noqa: D102

    def run(  # noqa: D102
        self,
        settings: Settings | Mapping[str, Any],
        prompts: Sequence[str],
        seed: int,
        *,
        keep: Path | None = None,
        timed: bool = True,
    ) -> object: ...


# A process with a subject open, for as long as the block runs; raises LatentrtError if it cannot be opened.
OpenWorker: TypeAlias = Callable[[Subject], AbstractContextManager[DrawingWorker]]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is drawn of every case.

    Attributes:
        texts: of the prompts.
        seed: of the first one's picture; prompt i has seed + i.
        made_with: whatever else decides about the pictures, as JSON can hold it: SHA-256 of the model's files, versions
            of packages. What was drawn with other values is not used.
    """

    texts: tuple[str, ...]
    seed: int
    made_with: Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """The pictures of a case, in files.

    Attributes:
        backend: that drew them, for people.
        count: of pictures; what the last run drew beyond them is not read.
        files: of each run, in order.
    """

    backend: str
    count: int
    files: tuple[Path, ...]

    def pictures(self) -> Pictures:
        """All of them, (n, h, w, 3).

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        images: Pictures = np.concatenate([_read(path, "images") for path in self.files])
        return images[: self.count]

    def trajectory(self) -> Floats:
        """The latents after each step, (steps, n, c, h/8, w/8).

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        latents: Floats = np.concatenate([_read(path, "trajectory") for path in self.files], axis=1)
        return latents[:, : self.count]


def draw_cases(
    cases: Iterable[Case],
    prompts: Prompts,
    model: Model,
    folder: Path,
    *,
    open_worker: OpenWorker,
    settings_of: SettingsOf = own_settings,
    on_progress: Progress = quiet,
) -> dict[Case, Kept | LatentrtError]:
    """Draw what is missing of each case's pictures; a case that cannot be drawn has the reason in their place.

    A subject's worker is opened when its first picture is missing, draws all its cases, and is opened anew after one
    that failed.

    Args:
        model: that `open_worker` opens.
        folder: for the pictures, which stay there: a folder for each case, named by all that decides about them.
        open_worker: opens a subject.
        settings_of: a case's settings as its system takes them.

    Raises:
        OSError: the disk is full or the folder not writable.
    """
    by_subject: dict[Subject, list[Case]] = {}
    for case in cases:
        by_subject.setdefault(case.subject, []).append(case)
    found: dict[Case, Kept | LatentrtError] = {}
    for subject, own in by_subject.items():
        with ExitStack() as stack:
            worker: DrawingWorker | None = None
            for case in dict.fromkeys(own):
                place = _place(case, prompts, model, folder)
                try:
                    if missing := place.missing():
                        if worker is None:
                            worker = stack.enter_context(open_worker(subject))
                        _draw(case, settings_of(case), missing, prompts, place, worker, on_progress)
                    found[case] = place.kept()
                except LatentrtError as err:
                    found[case] = err
                    stack.close()
                    worker = None
    return found


@dataclass(frozen=True)
class _Place:
    """Where a case's pictures are kept: a file for each run, and a record of what drew them."""

    folder: Path
    key: str
    count: int
    batch: int

    def path(self, start: int) -> Path:
        """The file of the run whose first picture that is."""
        return self.folder / f"{start:05}.npz"

    def starts(self) -> range:
        """The first picture of each run."""
        return range(0, self.count, self.batch)

    def missing(self) -> list[int]:
        """Runs that were not drawn yet, by their first pictures."""
        known = read_keyed(self.folder / _RECORD, self.key) is not None
        return [start for start in self.starts() if not (known and self.path(start).exists())]

    def kept(self) -> Kept:
        """All of it, when nothing is missing any more."""
        backend = read_keyed(self.folder / _RECORD, self.key)["backend"]
        return Kept(backend, self.count, tuple(self.path(start) for start in self.starts()))


def _place(case: Case, prompts: Prompts, model: Model, folder: Path) -> _Place:
    key = key_of({"case": asdict(case), "prompts": asdict(prompts), "model": asdict(model)})
    return _Place(folder / key, key, len(prompts.texts), case.subject.batch)


def _draw(
    case: Case,
    settings: Settings | Mapping[str, Any],
    missing: list[int],
    prompts: Prompts,
    place: _Place,
    worker: DrawingWorker,
    on_progress: Progress,
) -> None:
    count, batch = len(prompts.texts), case.subject.batch
    place.folder.mkdir(parents=True, exist_ok=True)
    write_keyed(place.folder / _RECORD, place.key, {"backend": worker.opened.backend})
    scratch = place.folder / _SCRATCH
    for start in missing:
        on_progress(f"draw {case.label}", start, count)
        texts = [prompts.texts[index % count] for index in range(start, start + batch)]
        worker.run(settings, texts, prompts.seed + start, keep=scratch, timed=False)
        _check(scratch, case)
        os.replace(scratch, place.path(start))
    on_progress(f"draw {case.label}", count, count)


def _check(path: Path, case: Case) -> None:
    """Refuse what a worker wrote if it is not a run of the case."""
    subject = case.subject
    images, latents = _read(path, "images"), _read(path, "trajectory")
    wanted = (subject.batch, subject.height, subject.width, 3)
    if images.shape != wanted or images.dtype != np.uint8:
        raise BackendError(f"{subject.label}: expected pictures {wanted} uint8, got {images.shape} {images.dtype}.")
    if latents.ndim != 5 or latents.shape[1] != subject.batch:
        raise BackendError(f"{subject.label}: expected latents (steps, {subject.batch}, c, h, w), got {latents.shape}.")


def _read(path: Path, name: str) -> NDArray[Any]:
    try:
        # NumPy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file) as arrays:
            found: NDArray[Any] = arrays[name]
            return found
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as err:
        raise ArtifactError(
            f"{path}: expected pictures with their latents, got {err}. Remove it and measure again."
        ) from err
