"""How long a build takes and what memory it needs: rates measured on one machine, corrected by this machine's builds.

A build's time goes with the weights that are copied and packed and with the nodes that are compiled, once for each
profile; several targets of one engine share it. Its memory goes with the bytes of the weights: half as much of int8
ones. The shipped rates are a fit over builds of Stable Diffusion 1.5's
networks on a quiet machine (`benchmarks/results/plan-activation.json` has their figures on a busy one). A machine that
has built something knows its own factor to them: the median over its latest builds of the same flavour.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from latentrt.runtime.manifest import write_atomic

FILE = "build-rates.json"
MEASURED_ON = "2 cores of an x86-64 server, tensorrt_rtx 1.7.1 ahead of time, 24 GiB of memory"
# Builds kept; a machine's factor is taken over the latest of one flavour.
_KEPT, _LATEST = 200, 20
_LOCK_SECONDS = 5.0


@dataclass(frozen=True)
class BuildWork:
    """What is to be built, as far as it decides about time and memory.

    Attributes:
        flavour: `tensorrt` or `tensorrt_rtx`.
        parameters: weights of the graph.
        weight_bytes: what they take in their own types.
        nodes: of the graph.
        targets: compute capabilities in the engine.
        profiles: optimization profiles in the engine.
    """

    flavour: str
    component: str
    parameters: int
    weight_bytes: int
    nodes: int
    targets: int = 1
    profiles: int = 1


@dataclass(frozen=True)
class BuildFacts:
    """A build that was done: `peak_bytes` is the process's largest resident memory, None where it was not measured."""

    work: BuildWork
    seconds: float
    engine_bytes: int
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Rates:
    """Seconds and bytes of a build: of every weight, node and byte of the weights, and the constant part."""

    seconds: float
    seconds_per_parameter: float
    seconds_per_node: float
    peak_bytes: float
    peak_bytes_per_weight_byte: float


# What an engine holds beside its weights, of each node and profile: kernels, names, constants.
_ENGINE_BYTES_PER_NODE = 12_500


# Full TensorRT times kernels on the device it builds for: no rate of another machine says anything about it.
_SHIPPED: Mapping[str, Rates] = {
    "tensorrt_rtx": Rates(
        seconds=0.1,
        seconds_per_parameter=2.4e-8,
        seconds_per_node=1.5e-3,
        peak_bytes=0.4e9,
        peak_bytes_per_weight_byte=3.6,
    )
}
# The same shape for a flavour without rates of its own: only the machine's factor turns it into seconds.
_SHAPE = _SHIPPED["tensorrt_rtx"]


def record_build(cache_folder: Path, facts: BuildFacts) -> None:
    """Keep what a build took, for later expectations. A folder that cannot be written is no error.

    Args:
        cache_folder: where `FILE` lies.
    """
    path = cache_folder / FILE
    with suppress(OSError, Timeout):
        cache_folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            kept = [*recorded_builds(cache_folder), facts][-_KEPT:]
            text = json.dumps([dataclasses.asdict(build) for build in kept], indent=1)
            write_atomic(path, text.encode() + b"\n")


def recorded_builds(cache_folder: Path | None) -> list[BuildFacts]:
    """The builds that were kept, oldest first; none where there is no file or it is damaged."""
    if cache_folder is None:
        return []
    try:
        content = json.loads((cache_folder / FILE).read_bytes())
        builds = [BuildFacts(**{**entry, "work": BuildWork(**entry["work"])}) for entry in content]
        return [build for build in builds if build.seconds > 0 and min(build.work.parameters, build.work.nodes) > 0]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def expected_seconds(work: BuildWork, cache_folder: Path | None = None) -> float | None:
    """Seconds that a build will take; None for a flavour that has neither shipped rates nor builds of this machine.

    Args:
        cache_folder: where this machine's builds were kept.
    """
    factor = _factor(
        (build.seconds / _seconds(build.work) for build in recorded_builds(cache_folder) if _like(build, work)),
        known=work.flavour in _SHIPPED,
    )
    return None if factor is None else factor * _seconds(work)


def expected_peak_bytes(work: BuildWork, cache_folder: Path | None = None) -> int | None:
    """Largest memory of the building process, in bytes; None as for `expected_seconds`."""
    factor = _factor(
        (
            build.peak_bytes / _peak_bytes(build.work)
            for build in recorded_builds(cache_folder)
            if build.peak_bytes is not None and _like(build, work)
        ),
        known=work.flavour in _SHIPPED,
    )
    return None if factor is None else int(factor * _peak_bytes(work))


def expected_engine_bytes(work: BuildWork, *, stripped: bool = False) -> int:
    """Size of the engine's file.

    Args:
        stripped: it is built without its weights.
    """
    return (0 if stripped else work.weight_bytes) + work.profiles * work.nodes * _ENGINE_BYTES_PER_NODE


def _like(build: BuildFacts, work: BuildWork) -> bool:
    return build.work.flavour == work.flavour


def _factor(ratios: Iterable[float], *, known: bool) -> float | None:
    latest = list(ratios)[-_LATEST:]
    if latest:
        return statistics.median(latest)
    return 1.0 if known else None


def _seconds(work: BuildWork) -> float:
    rates = _SHIPPED.get(work.flavour, _SHAPE)
    return rates.seconds + work.profiles * (
        work.parameters * rates.seconds_per_parameter + work.nodes * rates.seconds_per_node
    )


def _peak_bytes(work: BuildWork) -> float:
    rates = _SHIPPED.get(work.flavour, _SHAPE)
    return rates.peak_bytes + work.weight_bytes * rates.peak_bytes_per_weight_byte
