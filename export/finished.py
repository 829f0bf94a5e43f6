"""What an export that did not get to its end had finished, for the next one to go on from.

A finished graph is noted in the staging folder with the key of what it was made from. When an export fails, its
finished graphs move beside the bundle; when it is killed, they stay where they are. Either way the next export into
the bundle takes over those whose key it wants, and the rest goes.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from latentrt.runtime.manifest import Artifact, lock_of

from .export_plan import Built, Planned
from .staging import staging_folder

NOTES = "finished"


@contextmanager
def resumed_folder(bundle: Path, planned: Iterable[Planned]) -> Iterator[Path]:
    """A staging folder with what failed exports had finished of the same graphs.

    If this one fails too, what it has finished is kept for the next.

    Raises:
        UsageError: the path is a file, or a folder that holds something other than a bundle.
        OSError: it cannot be made or written.
    """
    wanted = {plan.key for plan in planned if plan.reason}
    with staging_folder(bundle, adopt=lambda stale, folder: _take_over(stale, folder, wanted)) as folder:
        with lock_of(bundle):
            for kept in unfinished_folders(bundle):
                _take_over(kept, folder, wanted)
                shutil.rmtree(kept, ignore_errors=True)
        try:
            yield folder
        except BaseException:
            # The failure is what has to be told, not that its remains could not be kept.
            with suppress(OSError), lock_of(bundle):
                _keep(folder, bundle, wanted)
            raise


def unfinished_folders(bundle: Path) -> Iterator[Path]:
    """Folders beside the bundle with what failed exports had finished."""
    bundle = bundle.resolve()
    return bundle.parent.glob(f".{glob.escape(bundle.name)}.unfinished-*")


def note_finished(folder: Path, plan: Planned, artifact: Artifact) -> None:
    """Write down that a graph is made and proven; its files are whole."""
    sizes = {name: (folder / name).stat().st_size for name in artifact.files}
    note = {"key": plan.key, "artifact": dataclasses.asdict(artifact), "sizes": sizes}
    notes = folder / NOTES
    notes.mkdir(exist_ok=True)
    scratch = notes / ".new"
    scratch.write_text(json.dumps(note))
    os.replace(scratch, notes / f"{plan.component}.{plan.precision}.json")


def finished(folder: Path, planned: Iterable[Planned]) -> Built:
    """Of what is planned, the graphs that the staging folder holds; they took no time."""
    found: Built = {}
    for plan in planned:
        note = _read(folder / NOTES / f"{plan.component}.{plan.precision}.json")
        if note is not None and note["key"] == plan.key and _whole(folder, note["sizes"]):
            artifact = Artifact(**{**note["artifact"], "files": tuple(note["artifact"]["files"])})
            found[plan.component, plan.precision] = artifact, 0.0
    return found


def _keep(folder: Path, bundle: Path, wanted: Collection[str]) -> None:
    """Move finished graphs out of the bundle, if there are any."""
    if (folder / NOTES).is_dir():
        bundle = bundle.resolve()
        kept = bundle.with_name(f".{bundle.name}.unfinished-{folder.name.rpartition('-')[2]}")
        kept.mkdir(exist_ok=True)
        _take_over(folder, kept, wanted)


def _take_over(stale: Path, folder: Path, wanted: Collection[str]) -> None:
    """Move the finished graphs with these keys into another folder on the same disk.

    What cannot be moved is made again.
    """
    for path in sorted((stale / NOTES).glob("*.json")):
        note = _read(path)
        if note is None or note["key"] not in wanted:
            continue
        with suppress(OSError):
            for name in note["sizes"]:
                # Graphs share files, and two exports may have finished one graph: of one key, it is the same.
                if (stale / name).exists() and not (folder / name).exists():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(stale / name, folder / name)
            (folder / NOTES).mkdir(exist_ok=True)
            os.replace(path, folder / NOTES / path.name)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) and {"key", "artifact", "sizes"} <= note.keys() else None


def _whole(folder: Path, sizes: dict[str, int]) -> bool:
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())
