"""Statistics on disk: their arrays in a safetensors file, all else in a JSON file beside it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.manifest import record_of, scratch_path, write_atomic

from .histogram import Histogram
from .reservoir import Reservoir
from .statistics import InputStatistics, Statistics

_OPTIONS = ("bins", "steps", "rows", "capacity", "seed")


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write `path`, which ends with .safetensors, and then the .json beside it, which names its content.

    Raises:
        OSError: the disk is full, or the like; what was there before is still whole.
    """
    from safetensors.numpy import save_file

    arrays: dict[str, Any] = {}
    numbers: dict[str, dict[str, dict[str, float]]] = {}
    for name, bins in statistics.inputs.items():
        for index, own in bins.items():
            stem = f"{name}/{index}"
            arrays |= {
                f"{stem}/amax": own.amax,
                f"{stem}/sums": own.sums,
                f"{stem}/histogram": own.histogram.counts,
                f"{stem}/priorities": own.reservoir.priorities,
                f"{stem}/importance": own.reservoir.importance,
                f"{stem}/rows": own.reservoir.rows,
            }
            numbers.setdefault(name, {})[str(index)] = {
                "count": own.count,
                "least": own.histogram.least,
                "largest": own.histogram.largest,
                "capacity": own.reservoir.capacity,
            }
    scratch = scratch_path(path)
    try:
        save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, scratch)
        content = {
            "file": asdict(record_of(scratch)),
            "options": {option: getattr(statistics, option) for option in _OPTIONS},
            "inputs": numbers,
        }
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    write_atomic(path.with_suffix(".json"), (json.dumps(content, indent=1) + "\n").encode())


def load_statistics(path: Path) -> Statistics:
    """Read what `save_statistics` wrote.

    Raises:
        ArtifactError: a file is missing, damaged, or not of the other.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        content = json.loads(path.with_suffix(".json").read_bytes())
        if asdict(record_of(path)) != content["file"]:
            raise ValueError("another file than the one beside its .json")
        arrays = load_file(path)
        inputs = {
            name: {int(index): _input(arrays, f"{name}/{index}", numbers) for index, numbers in bins.items()}
            for name, bins in content["inputs"].items()
        }
        return Statistics(inputs, **{option: int(content["options"][option]) for option in _OPTIONS})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as err:
        raise ArtifactError(f"{path}: expected statistics of a calibration, got {err!r}. Collect them again.") from err


def _input(arrays: dict[str, Any], stem: str, numbers: dict[str, float]) -> InputStatistics:
    return InputStatistics(
        amax=arrays[f"{stem}/amax"],
        sums=arrays[f"{stem}/sums"],
        count=int(numbers["count"]),
        histogram=Histogram(
            counts=arrays[f"{stem}/histogram"],
            least=numbers["least"],
            largest=numbers["largest"],
        ),
        reservoir=Reservoir(
            capacity=int(numbers["capacity"]),
            priorities=arrays[f"{stem}/priorities"],
            importance=arrays[f"{stem}/importance"],
            rows=arrays[f"{stem}/rows"],
        ),
    )
