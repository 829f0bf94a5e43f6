"""Engines kept for all bundles: another one with the same graph takes an engine over without a build.

An entry is a folder named by the engine's key, with the files as they lie in a bundle and `entry.json`, which states
their hashes. Where cache and bundle are on one disk the files are hard links, so an engine that is in both takes its
room once. An entry is used, renamed into place and removed under the lock of its key, which is also held through a
build: two processes that want one engine build it once.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from latentrt.runtime.cache_folder import cache_folder
from latentrt.runtime.engine_sidecar import EngineSidecar, read_sidecar
from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.machine import disk_bytes
from latentrt.runtime.manifest import FileRecord, key_of, scratch_path

from .engine_store import companions, engine_name
from .scratch_files import link_or_copy

ENGINES, ENTRY = "engines", "entry.json"
LIMIT_VARIABLE = "LATENTRT_CACHE_GB"
# What the cache alone may take: so much, or a tenth of a smaller disk.
LIMIT_BYTES, LIMIT_SHARE = 20 * 10**9, 0.1
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CachedEngine:
    """An engine of the cache.

    Attributes:
        folder: of its files.
        files: by name in the folder.
        source: name of the bundle that it was first built for.
        used: when it was last put in or taken, in seconds since 1970.
    """

    folder: Path
    sidecar: EngineSidecar
    files: Mapping[str, FileRecord]
    source: str
    used: float


def cache_root(choice: str) -> Path | None:
    """The folder of `--cache`: of the user for `auto`, none for `off`, or the one that is named.

    Raises:
        UsageError: a named folder cannot be written.
    """
    if choice == "off":
        return None
    root = cache_folder() if choice == "auto" else Path(choice).expanduser()
    try:
        (root / ENGINES).mkdir(parents=True, exist_ok=True)
        if os.access(root / ENGINES, os.W_OK):
            return root
        reason = "no permission to write"
    except OSError as err:
        reason = err.strerror or str(err)
    if choice == "auto":
        return None  # a home that cannot be written costs time, and is no error
    raise UsageError(f"cache: expected auto, off or a folder that can be written, got {root}: {reason}.")


def limit_bytes(root: Path) -> int:
    """What the engines of the cache that are in no bundle may take.

    Raises:
        UsageError: `LATENTRT_CACHE_GB` is no number.
    """
    text = os.environ.get(LIMIT_VARIABLE)
    if not text:
        return min(LIMIT_BYTES, int(LIMIT_SHARE * shutil.disk_usage(root).total))
    try:
        size = float(text)
        if not 0 <= size < float("inf"):
            raise ValueError
    except ValueError as err:
        raise UsageError(f"{LIMIT_VARIABLE}: expected a number of GB such as 20, got {text!r}.") from err
    return int(size * 1e9)


@contextmanager
def key_lock(root: Path, key: str, *, wait: bool = True, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an engine's key; other processes and threads wait. A process that dies lets go of it.

    The file stays: removing one that another process waits for would let two of them in.

    Args:
        root: of the cache; the bundle where there is none.
        wait: for another that holds it, after a call of `on_wait`.

    Raises:
        filelock.Timeout: another holds it, and `wait` is false.
    """
    locks = root / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def entry_folders(root: Path) -> list[Path]:
    """The folders of the cache's engines, whole or not."""
    engines = root / ENGINES
    return sorted(path for path in engines.glob("*") if _KEY.fullmatch(path.name)) if engines.is_dir() else []


def cached_engines(root: Path) -> list[CachedEngine]:
    """The engines of the cache whose sidecars can be read."""
    found = []
    for folder in entry_folders(root):
        try:
            entry = find_engine(root, folder.name)
        except ArtifactError:
            continue  # dropped when it is wanted, and by a prune
        if entry is not None:
            found.append(entry)
    return found


def find_engine(root: Path, key: str) -> CachedEngine | None:
    """The entry of a key, with presence and sizes of its files checked; `adopt_engine` checks their hashes.

    Raises:
        ArtifactError: it is damaged.
    """
    folder = root / ENGINES / key
    try:
        content = json.loads((folder / ENTRY).read_bytes())
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        sizes = {name: (folder / name).stat().st_size for name in files if Path(name).name == name}
        source, used = str(content["source"]), (folder / ENTRY).stat().st_mtime
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as err:
        if not folder.exists():
            return None
        raise ArtifactError(f"{folder}: expected a whole entry of the cache, got {err!r}.") from err
    for name, record in files.items():
        if sizes.get(name) != record.size:
            raise ArtifactError(f"{folder / name}: expected {record.size} bytes, got {sizes.get(name)}.")
    sidecar = read_sidecar(folder / companions(engine_name(key))[0])
    if not sidecar.key == key == key_of(sidecar.made_from):
        raise ArtifactError(f"{folder}: expected the engine of this key, got one of {sidecar.key[:16]}….")
    return CachedEngine(folder, sidecar, files, source, used)


def keep_engine(root: Path, key: str, bundle: Path, files: Mapping[str, FileRecord], source: str) -> None:
    """Put a bundle's engine into the cache, in the place of one that is there; call it with the key's lock held.

    Args:
        files: by name relative to the bundle.
        source: name of the bundle.

    Raises:
        OSError: the cache cannot be written, or a copy would take more than half of what its disk has left.
    """
    entry = root / ENGINES / key
    scratch = scratch_path(entry)
    scratch.mkdir(parents=True)
    try:
        size = sum(record.size for record in files.values())
        free = disk_bytes(scratch)
        if scratch.stat().st_dev != bundle.stat().st_dev and not 2 * size <= free:
            raise OSError(errno.ENOSPC, f"{free / 1e9:.1f} GB free for a copy of {size / 1e9:.1f} GB", str(entry))
        for name in files:
            link_or_copy(bundle / name, scratch / Path(name).name)
        records = {Path(name).name: asdict(record) for name, record in files.items()}
        (scratch / ENTRY).write_text(json.dumps({"source": source, "files": records}, indent=1))
        drop_engine(root, key)
        os.rename(scratch, entry)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def note_use(entry: CachedEngine) -> None:
    """Remember that an entry was used now, where its owner lets us."""
    with suppress(OSError):
        os.utime(entry.folder / ENTRY)


def drop_engine(root: Path, key: str) -> None:
    """Remove an entry, whole at once; call it with the key's lock held. Bundles that share its files keep them."""
    entry = root / ENGINES / key
    scratch = scratch_path(entry)
    try:
        os.rename(entry, scratch)
    except FileNotFoundError:
        return
    shutil.rmtree(scratch, ignore_errors=True)
