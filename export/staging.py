"""Putting finished files into a bundle, all or nothing, whatever ends the process and whoever else writes.

Files are made in a hidden folder of the bundle, which its maker keeps locked: a folder whose lock is free belongs
to a process that died, and the next run removes it. Commit renames the files into place under the bundle's lock.
Before that it takes what they replace out of the manifest, and after it puts the new entries in, so that a
manifest never names a file that is not whole.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from latentrt.runtime.errors import UsageError
from latentrt.runtime.manifest import MANIFEST, FileRecord, Manifest, load_manifest, lock_of, problem_of, save_manifest

PREFIX, OWNER = ".export-", ".owner"
# From the folder of a process that died to the new one.
Adopt = Callable[[Path, Path], None]


@contextmanager
def staging_folder(bundle: Path, *, adopt: Adopt = lambda stale, folder: None) -> Iterator[Path]:
    """A new hidden folder in the bundle, gone afterwards; so is the bundle, if it was made for this and stayed empty.

    Args:
        adopt: called with each folder of a process that died, and the new one, before the first is removed.

    Raises:
        UsageError: the path is a file, or a folder that holds something other than a bundle.
        OSError: it cannot be made or written.
    """
    created = not bundle.exists()
    folder, owner = _make_folder(bundle, adopt)
    try:
        yield folder
    finally:
        owner.release()
        shutil.rmtree(folder, ignore_errors=True)
        if created:
            _remove_if_empty(bundle)


def _make_folder(bundle: Path, adopt: Adopt, *, tries: int = 3) -> tuple[Path, FileLock]:
    check_bundle_path(bundle)
    folder = bundle / f"{PREFIX}{uuid.uuid4().hex}"
    try:
        bundle.mkdir(parents=True, exist_ok=True)
        with lock_of(bundle):
            folder.mkdir()
            owner = FileLock(folder / OWNER)
            owner.acquire()
            _remove_stale(bundle, folder, adopt)
    except FileNotFoundError:
        # Another process may have taken its empty bundle away between these lines.
        if tries == 1:
            raise
        return _make_folder(bundle, adopt, tries=tries - 1)
    return folder, owner


def check_bundle_path(bundle: Path) -> None:
    """Refuse to write a bundle over something else.

    Raises:
        UsageError: the path is a file, or a folder that holds something other than a bundle.
    """
    if bundle.exists() and not bundle.is_dir():
        raise UsageError(f"{bundle}: expected a bundle folder, got a file. Choose another path with -o.")
    if bundle.is_dir() and not (bundle / MANIFEST).exists():
        # A lock and staging folders are what a killed first export leaves.
        foreign = sorted(p.name for p in bundle.iterdir() if not p.name.startswith((PREFIX, ".lock")))
        if foreign:
            raise UsageError(
                f"{bundle}: expected a bundle or an empty folder, found {foreign[0]} and no {MANIFEST}. "
                "Choose another path with -o."
            )


def _remove_stale(bundle: Path, new: Path, adopt: Adopt) -> None:
    for folder in bundle.glob(f"{PREFIX}*"):
        if folder == new:
            continue
        owner = FileLock(folder / OWNER)
        try:
            owner.acquire(timeout=0)
        except Timeout:
            continue
        adopt(folder, new)
        shutil.rmtree(folder, ignore_errors=True)
        owner.release()


def _remove_if_empty(bundle: Path) -> None:
    with suppress(OSError), lock_of(bundle):
        if [p.name for p in bundle.iterdir()] == [".lock"]:
            (bundle / ".lock").unlink()
            bundle.rmdir()


def commit(
    bundle: Path,
    staged: Mapping[str, tuple[Path, FileRecord]],
    change: Callable[[Manifest | None], Manifest],
) -> Manifest:
    """Move files into the bundle and rewrite its manifest.

    Args:
        staged: name in the bundle -> finished file on the same filesystem, and its record.
        change: the manifest as it is now, None for a new bundle -> the manifest as it should be, without the staged
            files' records, which are added here. Called under the bundle's lock.

    Returns:
        The new manifest.
    """
    with lock_of(bundle):
        before = load_manifest(bundle) if (bundle / MANIFEST).exists() else None
        wanted = change(before)
        held = dict(before.files) if before else {}
        moving = {
            name: pair
            for name, pair in staged.items()
            if before is None or held.get(name) != pair[1] or problem_of(bundle, before, name)
        }
        records = {name: record for name, (_, record) in staged.items()}
        final = dataclasses.replace(wanted, files={**wanted.files, **records})
        save_manifest(bundle, _without(before or wanted, set(moving)))
        for name, (path, _) in moving.items():
            (bundle / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, bundle / name)
        save_manifest(bundle, final)
        for name in held.keys() - final.files.keys():
            (bundle / name).unlink(missing_ok=True)
    return final


def _without(manifest: Manifest, names: set[str]) -> Manifest:
    """The manifest without these files and without what consists of them."""
    files = {name: record for name, record in manifest.files.items() if name not in names}
    artifacts = tuple(a for a in manifest.artifacts if {a.path, *a.files} <= files.keys())
    engines = tuple(e for e in manifest.engines if {e.path, e.sidecar} <= files.keys())
    return dataclasses.replace(manifest, files=files, artifacts=artifacts, engines=engines)
