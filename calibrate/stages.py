"""Stages of a calibration: each a folder under a bundle, named by the content it was made from, and made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from latentrt.runtime.errors import ArtifactError, CalibrationError
from latentrt.runtime.manifest import changed_inputs, key_of, write_atomic

# Raised when a stage computes otherwise than before: what earlier versions left is then made again.
REVISION = 1
FOLDER = "calibration"
# Written last: a folder without it was interrupted.
_DONE = "stage.json"

Result = TypeVar("Result")


@dataclass(frozen=True)
class Stage:
    """Where a stage keeps its files.

    Attributes:
        name: capture, statistics, plan…
        folder: of its own; what an interrupted run left there may be gone on with.
        key: SHA-256 of `inputs`.
        inputs: what it is made from: keys of the stages before, options.
    """

    name: str
    folder: Path
    key: str
    inputs: Mapping[str, Any]

    @property
    def done(self) -> bool:
        """Whether it was finished."""
        return (self.folder / _DONE).exists()


def stage_of(bundle: Path, component: str, name: str, inputs: Mapping[str, Any]) -> Stage:
    """A stage of a network's calibration, by what it is made from."""
    full = {"revision": REVISION, **inputs}
    key = key_of(full)
    return Stage(name, bundle / FOLDER / component / f"{name}-{key[:16]}", key, full)


def run_stage(
    stage: Stage,
    make: Callable[[Path], Result],
    load: Callable[[Path], Result],
    *,
    say: Callable[[str], None] = lambda _text: None,
) -> Result:
    """What a stage holds: loaded if it was finished, else made.

    A second process that wants the same stage waits, and loads what the first has made.

    Args:
        make: fills the stage's folder; it may hold files of a run that was interrupted.
        load: reads them again.
        say: told whether it is made, and why.

    Raises:
        OSError: the disk is full, or the like.
    """
    stage.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(stage.folder / ".stage.lock"):
        if stage.done:
            try:
                result = load(stage.folder)
            except (ArtifactError, CalibrationError) as err:
                say(f"{stage.name}: made again: {err}")
                (stage.folder / _DONE).unlink()
            else:
                say(f"{stage.name}: kept from an earlier run")
                return result
        else:
            say(f"{stage.name}: {_reason(stage)}")
        result = make(stage.folder)
        write_atomic(stage.folder / _DONE, (json.dumps(stage.inputs, indent=1, sort_keys=True) + "\n").encode())
    return result


@contextmanager
def alone(bundle: Path, component: str, *, say: Callable[[str], None] = lambda _text: None) -> Iterator[None]:
    """Let one process at a time search, apply and verify plans of a network; others wait.

    Args:
        say: told of the wait.

    Raises:
        OSError: the bundle cannot be written to.
    """
    folder = bundle / FOLDER / component
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that calibrates {component}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _reason(stage: Stage) -> str:
    """Why a stage is not there, by comparison with the latest of its name."""
    if any(path.suffix != ".lock" for path in stage.folder.iterdir()):
        return "going on where an earlier run stopped"
    others = sorted(stage.folder.parent.glob(f"{stage.name}-*/{_DONE}"), key=lambda path: path.stat().st_mtime)
    if not others:
        return "new"
    try:
        before = json.loads(others[-1].read_bytes())
    except (OSError, ValueError):
        return "new"
    return f"made again, for these changed: {', '.join(changed_inputs(before, stage.inputs))}"
