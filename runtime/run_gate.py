"""Runs and swaps of weights out of each other's way: runs go side by side, a swap waits until it is alone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UsageError


class RunGate:
    """Counts the runs under way, by the thread that started each."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._runs: Counter[int] = Counter()
        self._waiting = 0
        self._swapping = False

    @contextmanager
    def run(self) -> Iterator[None]:
        """A run. It waits for a swap; one that a run of the same thread starts does not, since the swap waits for that.

        The block may end in another thread than it began in, as a generator's does.
        """
        thread = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self._runs[thread])
            self._runs[thread] += 1
        try:
            yield
        finally:
            with self._changed:
                self._runs[thread] -= 1
                self._runs += Counter()  # forgets threads that run nothing
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A swap: waits for the runs under way and lets no other begin.

        Raises:
            UsageError: this thread has a run of its own under way, which would never end.
        """
        with self._changed:
            if self._runs[threading.get_ident()]:
                raise UsageError(
                    "loras: expected no run under way in this thread, got one that is drawing. Finish it, or close its "
                    "generator, first."
                )
            # Those that wait keep runs from beginning: otherwise runs that overlap would keep a swap waiting for ever.
            self._waiting += 1
            self._changed.wait_for(lambda: not self._runs and not self._swapping)
            self._swapping = True
        try:
            yield
        finally:
            with self._changed:
                self._waiting -= 1
                self._swapping = False
                self._changed.notify_all()
