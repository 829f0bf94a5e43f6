"""What the cache holds, engines and traced graphs, and which of it goes when room is wanted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from latentrt.runtime.engine_sidecar import EngineSidecar, describe_profiles
from latentrt.runtime.errors import ArtifactError

from .engine_cache import ENGINES, ENTRY, drop_engine, entry_folders, find_engine, key_lock
from .scratch_files import sweep_scratch
from .trace_cache import GRAPHS

ENGINE, TRACE = "engine", "traced graph"


@dataclass(frozen=True)
class CacheItem:
    """An engine or a traced graph.

    Attributes:
        kind: `ENGINE` or `TRACE`.
        what: what it is of, for people.
        size: in bytes, of its files.
        alone: how much of it would be freed: what no bundle shares.
        used: when an engine was last put in or taken, or a graph was traced; seconds since 1970.
        problem: why it cannot be used, or None.
    """

    kind: str
    key: str
    what: str
    size: int
    alone: int
    used: float
    problem: str | None = None


def cache_items(root: Path) -> list[CacheItem]:
    """Everything in the cache, what was used last first."""
    items = [_engine(root, folder) for folder in entry_folders(root)]
    items += [_trace(root, key) for key in sorted({path.stem for path in _trace_files(root, "*")})]
    return sorted((item for item in items if item is not None), key=lambda item: -item.used)


def _trace_files(root: Path, key: str) -> list[Path]:
    return [path for suffix in ("onnx", "json") for path in (root / GRAPHS).glob(f"{key}.{suffix}")]


def _statuses(paths: Iterable[Path]) -> list[os.stat_result]:
    """Of the files that are still there: other processes may remove them at any time."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            found.append(path.stat())
    return found


def _engine(root: Path, folder: Path) -> CacheItem | None:
    files = _statuses(path for path in folder.glob("*") if path.name != ENTRY)
    what, problem = "unknown", None
    used = max((file.st_mtime for file in files), default=0.0)
    try:
        entry = find_engine(root, folder.name)
        if entry is None:
            return None
        what, used = f"{_describe(entry.sidecar)}; built for {entry.source}", entry.used
    except ArtifactError as err:
        problem = str(err)
    return CacheItem(
        kind=ENGINE,
        key=folder.name,
        what=what,
        size=sum(file.st_size for file in files),
        alone=sum(file.st_size for file in files if file.st_nlink == 1),
        used=used,
        problem=problem,
    )


def _describe(sidecar: EngineSidecar) -> str:
    made_with = f"{sidecar.flavour} {sidecar.flavour_version}"
    return (
        f"{sidecar.component} {sidecar.precision} for {'+'.join(sidecar.targets)}, "
        f"{describe_profiles(sidecar)}, {made_with}"
    )


def _trace(root: Path, key: str) -> CacheItem | None:
    files = _statuses(_trace_files(root, key))
    if not files:
        return None
    what, problem = "unknown", None
    try:
        if len(files) < 2:
            raise ValueError("one file of two")
        inputs: Mapping[str, Any] = json.loads((root / GRAPHS / f"{key}.json").read_bytes())["inputs"]
        parameters = sum(math.prod(shape) for shape in inputs["parameters"].values())
        network = str(inputs["module"]).rpartition(".")[2]
        what = f"{inputs['component']} ({network}, {parameters / 1e6:.1f} M weights), opset {inputs['opset']}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as err:
        problem = f"{key}: expected a graph and what it was made from, got {err!r}."
    size = sum(file.st_size for file in files)
    return CacheItem(TRACE, key, what, size, size, max(file.st_mtime for file in files), problem)


def chosen_for_removal(
    items: Iterable[CacheItem],
    *,
    now: float,
    keep_bytes: int | None = None,
    older_than: float | None = None,
    everything: bool = False,
) -> list[CacheItem]:
    """What goes: all that is damaged, all that is too old, and the engines used longest ago until the rest is small.

    Graphs are too small and too costly to trace to go for their size. An engine that a bundle shares frees nothing.

    Args:
        now: seconds since 1970.
        keep_bytes: what the engines that are in no bundle may take.
        older_than: seconds since the last use.
    """
    items = list(items)
    chosen = [
        item
        for item in items
        if everything or item.problem is not None or (older_than is not None and now - item.used > older_than)
    ]
    if keep_bytes is not None:
        rest = [item for item in items if item.kind == ENGINE and item.alone and item not in chosen]
        taken = sum(item.alone for item in rest)
        for item in sorted(rest, key=lambda item: item.used):
            if taken <= keep_bytes:
                break
            chosen.append(item)
            taken -= item.alone
    return chosen


def remove_items(root: Path, items: Iterable[CacheItem], *, locked: str | None = None) -> list[CacheItem]:
    """Remove items from the cache and return those that are gone; engines in use at the moment stay.

    Args:
        locked: key of an engine whose lock the caller holds.
    """
    gone = []
    for item in items:
        if item.kind == TRACE:
            for path in _trace_files(root, item.key):
                path.unlink(missing_ok=True)
        elif item.key == locked:
            drop_engine(root, item.key)
        else:
            try:
                with key_lock(root, item.key, wait=False):
                    drop_engine(root, item.key)
            except Timeout:
                continue
        gone.append(item)
    return gone


def sweep_cache(root: Path) -> int:
    """Remove what killed processes left half written; returns the bytes that were freed."""
    return sum(sweep_scratch(root / name) for name in (ENGINES, GRAPHS))
