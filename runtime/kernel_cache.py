"""Kernels that TensorRT-RTX compiled on this machine, kept between processes.

Its engines are compiled for the GPU when they first run, which takes seconds to minutes. The library's runtime cache
holds the outcome; this keeps it in a file for each engine, GPU and version of the library. One file for all engines
would be smaller by what they share, but two processes that save at the same time would lose each other's kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path
from typing import Any

from .manifest import write_atomic


class KernelCache:
    """The runtime cache of one engine.

    Args:
        folder: of all such caches.
        version: of TensorRT-RTX.
        gpu: its name and compute capability.
        key: of the engine.
    """

    def __init__(self, folder: Path, *, version: str, gpu: str, key: str) -> None:
        gpu = re.sub(r"[^A-Za-z0-9]+", "-", gpu).strip("-")
        self._path = folder / f"{version}-{gpu}" / f"{key[:32]}.bin"
        self._cache: Any = None
        self._saved: bytes | None = None

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return self._path

    def attach(self, config: Any) -> None:
        """Have a runtime config's contexts take kernels from the cache and add theirs.

        Contents of another version, driver or GPU are refused by the library, and overwritten by `save`.
        """
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with contextlib.suppress(OSError):
                content = self._path.read_bytes()
                if self._cache.deserialize(content):
                    self._saved = hashlib.sha256(content).digest()
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what was compiled since it was read. A cache that cannot be written is not kept, no more."""
        if self._cache is None:
            return
        content = bytes(self._cache.serialize())
        digest = hashlib.sha256(content).digest()
        if digest == self._saved:
            return
        from filelock import FileLock

        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._path.with_suffix(".lock")):
                write_atomic(self._path, content)
            self._saved = digest
