"""What the stages of a run took, put together from the calls that were timed in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import TypeVar

T = TypeVar("T")


class StageClock:
    """Times calls, each of a stage. One run at a time, in one thread; timed calls do not contain each other.

    Nothing is computed while the run goes on: two readings of the clock and an entry in a list for each call.

    Args:
        now: seconds of a clock that only goes forward.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.restart()

    def restart(self) -> None:
        """Forget all: another run begins."""
        self._spans: list[tuple[str, float, float]] = []
        self._step: float | None = None
        self._steps = 0

    def time(self, stage: str, call: Callable[[], T]) -> T:
        """What a call returns. It is counted if it fails, too."""
        began = self._now()
        try:
            return call()
        finally:
            self._spans.append((stage, began, self._now()))

    def step_done(self) -> None:
        """A step of the sampler is through."""
        self._step = self._now()
        self._steps += 1

    @property
    def entries(self) -> int:
        """How often it was told of a call or a step."""
        return len(self._spans) + self._steps

    def calls(self, stage: str) -> tuple[float, ...]:
        """Seconds of each call of a stage, in order."""
        return tuple(stop - start for name, start, stop in self._spans if name == stage)

    def stages(self) -> dict[str, float]:
        """Seconds of each stage.

        `sampler` is what the host does between the start of the U-Net's first call and the end of the last step, all
        that is timed as something else left out.
        """
        found: dict[str, float] = {}
        for name, start, stop in self._spans:
            found[name] = found.get(name, 0.0) + stop - start
        first = next((start for name, start, _ in self._spans if name == "unet"), None)
        if first is not None and self._step is not None:
            inside = sum(stop - start for _, start, stop in self._spans if first <= start and stop <= self._step)
            found["sampler"] = self._step - first - inside
        return found


@cache
def seconds_per_entry(count: int = 5000, rounds: int = 5) -> float:
    """What telling a clock of one call takes here: the least of some rounds, beyond what the call itself takes."""

    def nothing(_: object) -> None:
        """What is timed."""

    def timed() -> float:
        clock, began = StageClock(), time.perf_counter()
        for _ in range(count):
            clock.time("unet", partial(nothing, None))
        return time.perf_counter() - began

    def bare() -> float:
        began = time.perf_counter()
        for _ in range(count):
            nothing(None)
        return time.perf_counter() - began

    return max(min(timed() for _ in range(rounds)) - min(bare() for _ in range(rounds)), 0.0) / count
