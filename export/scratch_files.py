"""Files on their way to their names: as second names of others, and what killed processes left of them."""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

# A scratch file that nobody has written to for so long belongs to a process that is gone.
STALE_SECONDS = 3600.0
_CHUNK = 1 << 24
_SCRATCH = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")  # of `manifest.scratch_path`


def link_or_copy(source: Path, target: Path) -> None:
    """Make a file appear under a second name: as a hard link where the disk is the same and knows them.

    Raises:
        OSError: naming the target; nothing is left behind.
    """
    with suppress(OSError):
        os.link(source, target)
        return
    with source.open("rb") as reader, target.open("xb") as writer:
        try:
            shutil.copyfileobj(reader, writer, _CHUNK)
            writer.flush()
            os.fsync(writer.fileno())
        except BaseException as err:
            with suppress(OSError):
                target.unlink()
            if isinstance(err, OSError):
                raise OSError(err.errno, err.strerror, str(target)) from err
            raise


def sweep_scratch(folder: Path, *, older_than: float = STALE_SECONDS) -> int:
    """Remove what processes that were killed left half written in a folder; returns the bytes that were freed.

    Args:
        older_than: seconds since something was last written to it.
    """
    freed = 0
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            status = path.stat()
            # A link keeps the time of its file's content; what changes with the link is the second one.
            touched = max(status.st_mtime, status.st_ctime)
            if _SCRATCH.fullmatch(path.name) and time.time() - touched > older_than:
                freed += sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
    return freed
