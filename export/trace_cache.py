"""Graphs without weights, kept by architecture: the second checkpoint of one needs no tracing.

An entry is two files: `<key>.onnx`, and `<key>.json` with what the graph was made from and its SHA-256. An entry that
is damaged or half written is made anew. Entries are small (1 MB for Stable Diffusion 1.5's U-Net) and never wrong: the
key covers configs, shapes, options and the versions of all tools.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentrt.runtime.cache_folder import cache_folder
from latentrt.runtime.manifest import key_of, write_atomic

GRAPHS = "graphs"


def default_cache() -> Path:
    """The folder of traced graphs, in latentrt's folder of the user's cache."""
    return cache_folder() / GRAPHS


def cached(folder: Path | None, inputs: Mapping[str, Any], make: Callable[[], bytes]) -> bytes:
    """What `make` returns, from the cache if it holds it, and put there otherwise.

    A folder that cannot be written costs the time of the next export, and is no error.

    Args:
        folder: of the cache; None makes anew and keeps nothing.
        inputs: all that decides about the result.
    """
    if folder is None:
        return make()
    graph, record = (folder / f"{key_of(inputs)}.{suffix}" for suffix in ("onnx", "json"))
    found = _read(graph, record)
    if found is not None:
        return found
    data = make()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(graph, data)
        content = {"sha256": hashlib.sha256(data).hexdigest(), "inputs": inputs}
        write_atomic(record, json.dumps(content, indent=1).encode())
    return data


def _read(graph: Path, record: Path) -> bytes | None:
    try:
        data, known = graph.read_bytes(), json.loads(record.read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(known, dict) and known.get("sha256") == hashlib.sha256(data).hexdigest()
    return data if whole else None
