"""What the engines of a pipeline share on a device: lanes, each one stream and one block of activation memory.

The sharing rule: an engine's scratch memory holds nothing between two calls, so all engines of a pipeline use one
block, as large as the largest of them asks for. Two calls at the same time must not: each takes a lane, with a block of
its own, and all that touches a block goes through its lane's stream, which runs one thing after another. N lanes are N
calls at once; with one lane, calls from several threads take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .cuda_device import Device, allocate
from .work_times import WorkTimer, WorkTimes


class Lane:
    """A stream with its timer, and a block of activation memory. Whoever holds the lane uses it alone."""

    def __init__(self, device: Device, index: int, times: WorkTimes) -> None:
        self.index = index
        self.timer = WorkTimer(device, times)
        self._device = device
        self._stream: int | None = None
        self._block: tuple[int, int] = (0, 0)

    @property
    def stream(self) -> int:
        """The stream, made when it is first needed."""
        if self._stream is None:
            self._stream = self._device.create_stream()
        return self._stream

    @property
    def block_bytes(self) -> int:
        """Size of the block that it has now."""
        return self._block[1]

    def reserve(self, nbytes: int, purpose: str) -> tuple[int, int]:
        """Address and size of the block, of at least so many bytes.

        A larger block is another one: what was captured with the old address must be captured again.

        Raises:
            OutOfDeviceMemory: there is no room; the lane then has no block.
        """
        address, size = self._block
        if size < nbytes:
            if size:
                # Never two blocks at a time: that is what may not fit.
                self._device.synchronize(self.stream)
                self._block = (0, 0)
                self._device.free(address)
            self._block = (allocate(self._device, nbytes, purpose), nbytes)
        return self._block

    def free(self) -> None:
        """Give stream and block back."""
        if self._stream is not None:
            self._device.synchronize(self._stream)
        self.timer.free()
        address, size = self._block
        self._block = (0, 0)
        if size:
            self._device.free(address)
        if self._stream is not None:
            self._device.destroy_stream(self._stream)
            self._stream = None


class Lanes:
    """The lanes of a pipeline; safe to use from many threads.

    Args:
        count: calls that may run at the same time.
        times: where the GPU times of calls go; default nowhere.
    """

    def __init__(self, device: Device, count: int = 1, *, times: WorkTimes | None = None) -> None:
        self._device = device
        self._lanes = [Lane(device, index, times or WorkTimes()) for index in range(count)]
        self._free = list(self._lanes)
        self._condition = threading.Condition()
        self._waiting_for_all = 0
        self._needs: dict[object, int] = {}
        self._last = threading.local()

    def join(self, user: object, nbytes: int) -> None:
        """A user's calls will need a block of so many bytes."""
        with self._condition:
            self._needs[user] = nbytes

    def leave(self, user: object) -> None:
        """A user makes no more calls; the last one to leave takes streams and blocks along."""
        with self.take_all():
            self._needs.pop(user, None)
            if not self._needs:
                self._device.activate()
                for lane in self._lanes:
                    lane.free()

    @property
    def block_bytes(self) -> int:
        """The size that serves all users."""
        with self._condition:
            return max(self._needs.values(), default=0)

    @property
    def nbytes(self) -> int:
        """What all blocks take at the moment."""
        return sum(lane.block_bytes for lane in self._lanes)

    @contextmanager
    def take(self) -> Iterator[Lane]:
        """A lane for one call, if it is free the one that this thread had last: it may hold the call's inputs."""
        with self._condition:
            self._condition.wait_for(lambda: self._free and not self._waiting_for_all)
            last = getattr(self._last, "lane", None)
            lane = last if last in self._free else self._free[0]
            self._free.remove(lane)
        self._last.lane = lane
        try:
            yield lane
        finally:
            with self._condition:
                self._free.append(lane)
                self._condition.notify_all()

    @contextmanager
    def take_all(self) -> Iterator[tuple[Lane, ...]]:
        """All lanes, once the calls under way are done: for what no call may run beside."""
        with self._condition:
            self._waiting_for_all += 1
            self._condition.wait_for(lambda: len(self._free) == len(self._lanes))
            self._waiting_for_all -= 1
            self._free.clear()
        try:
            yield tuple(self._lanes)
        finally:
            with self._condition:
                self._free = list(self._lanes)
                self._condition.notify_all()
