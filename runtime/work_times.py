"""How long the GPU works on an engine's calls, by CUDA events beside the work in its stream.

Events are recorded in the stream and read when the call has synchronized it anyway: nothing waits for them. Between two
of them lies the engine's own work; the copies of its inputs and outputs, and what the host does, are outside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .cuda_device import Device


@dataclass(eq=False)
class WorkTimes:
    """What is collected.

    Attributes:
        on: whether calls are timed.
        calls: component and seconds of each, in the order in which they ended.
    """

    on: bool = False
    calls: list[tuple[str, float]] = field(default_factory=list)


class WorkTimer:
    """Times the work on one stream; whoever uses it has the stream alone."""

    def __init__(self, device: Device, times: WorkTimes) -> None:
        self._device, self._times = device, times
        self._events: tuple[int, int] | None = None
        self._recorded = False

    @contextmanager
    def around(self, stream: int) -> Iterator[None]:
        """The work that the block puts on the stream."""
        self._recorded = False
        if not self._times.on:
            yield
            return
        if self._events is None:
            self._events = (self._device.create_event(), self._device.create_event())
        start, stop = self._events
        self._device.record(start, stream)
        yield
        self._device.record(stop, stream)
        self._recorded = True

    def read(self, component: str) -> None:
        """Note how long it took, if it was timed. The stream must have been synchronized."""
        if self._recorded and self._events is not None:
            self._times.calls.append((component, self._device.elapsed(*self._events)))

    def free(self) -> None:
        """Give the events back. The stream must have been synchronized."""
        events, self._events, self._recorded = self._events or (), None, False
        for event in events:
            self._device.destroy_event(event)
