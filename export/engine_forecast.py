"""What a build will take of time, memory and disk: said before it starts, and how much is left while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from latentrt.runtime.errors import UsageError
from latentrt.runtime.machine import disk_bytes, memory_bytes

from .build_rates import BuildWork, expected_engine_bytes, expected_peak_bytes, expected_seconds
from .engine_log import Progress


@dataclass(frozen=True)
class Forecast:
    """What one build is expected to take; None where nothing is known yet."""

    seconds: float | None
    peak_bytes: int | None
    disk_bytes: int


def forecast(work: BuildWork, root: Path | None, *, stripped: bool = False) -> Forecast:
    """From the rates of earlier builds and the size of the weights.

    Args:
        root: of the cache, where the times of this machine's builds are kept.
        stripped: the engine is built without its weights.
    """
    return Forecast(
        seconds=expected_seconds(work, root),
        peak_bytes=expected_peak_bytes(work, root),
        disk_bytes=expected_engine_bytes(work, stripped=stripped),
    )


def describe_forecasts(forecasts: Sequence[Forecast]) -> str:
    """One line about builds that run one after the other."""
    times = [one.seconds for one in forecasts if one.seconds is not None]
    peaks = [one.peak_bytes for one in forecasts if one.peak_bytes is not None]
    known = len(times) == len(forecasts)
    takes = f"about {duration(sum(times))}" if known else "a time that no earlier build on this machine tells"
    memory = f", up to {max(peaks) / 1e9:.1f} GB of memory" if peaks else ""
    disk = sum(one.disk_bytes for one in forecasts)
    engines = "1 engine" if len(forecasts) == 1 else f"{len(forecasts)} engines"
    return f"{engines} to build: {takes}{memory}, {disk / 1e9:.2f} GB of disk"


def memory_warning(forecasts: Sequence[Forecast]) -> str | None:
    """What to say if the memory may not do, or None; a build that needs more may still end, by way of the swap."""
    peak = max((one.peak_bytes for one in forecasts if one.peak_bytes is not None), default=0)
    with suppress(OSError):
        available, _ = memory_bytes()
        if not peak <= available:
            return (
                f"memory: the build is expected to need {peak / 1e9:.1f} GB, and {available / 1e9:.1f} GB are "
                "available. The system may stop it: close other programs, or build on a larger machine."
            )
    return None


def check_disk(forecasts: Sequence[Forecast], bundle: Path) -> None:
    """Refuse to start what cannot end.

    Raises:
        UsageError: the engines will not fit on the bundle's disk.
    """
    needed, free = sum(one.disk_bytes for one in forecasts), disk_bytes(bundle)
    if not needed <= free:
        raise UsageError(
            f"{bundle}: expected {needed / 1e9:.2f} GB of free disk for the engines, got {free / 1e9:.2f} GB. "
            "Free some (see: latentrt cache prune), or build fewer components or targets."
        )


def with_remaining(progress: Progress, expected: float | None, clock: Callable[[], float] = time.monotonic) -> Progress:
    """The same progress, with what is left behind the name of the phase.

    By what was expected, not by the part that is done: TensorRT-RTX counts itself at four fifths after a thirtieth of
    the time.

    Args:
        expected: seconds of the whole; None leaves the phase as it is.
    """
    if expected is None:
        return progress
    started, furthest = clock(), 0.0

    def report(phase: str, part: float) -> None:
        nonlocal started, furthest
        now = clock()
        if part < furthest:  # the build failed and is tried again
            started = now
        furthest = part
        left = expected - (now - started)
        when = f"about {duration(left)} left" if left >= 1 else f"expected to take {duration(expected)}"
        progress(phase if part >= 1 else f"{phase}, {when}", part)

    return report


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `1 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class PeakMemory:
    """The largest resident memory of this process while something runs; `bytes` is None where it is not told.

    Linux counts it anew after a write to `clear_refs`.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        """Count from here."""
        self._counting = False
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._counting = True
        return self

    def __exit__(self, *_: object) -> None:
        """Read the count."""
        if self._counting:
            with suppress(OSError, StopIteration):
                lines = Path("/proc/self/status").read_text().splitlines()
                self.bytes = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
