"""A GPU in NumPy, behind the device seam: it moves real bytes, runs streams as late as CUDA may, and catches misuse.

Work is done when its stream is synchronized, not before: what the host reads too early is garbage, and what it
overwrites too early is uploaded wrong. Freed memory is never used again, so that an address of it is recognised.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from latentrt.runtime.cuda_device import OutOfDeviceMemory
from latentrt.runtime.errors import BackendError

GARBAGE, FREED = 0xAB, 0xDD
Work = Callable[[], None]


class Misuse(AssertionError):  # noqa: N818 # no failure, but what must not be tried
    """What is undefined on a GPU: never caught by the code under test."""


class FakeDevice:
    """As `cuda_device.Device`; `log` has every call, `leaks` what was not given back."""

    name = "Fake GPU sm89"

    def __init__(self, total: int = 1 << 30) -> None:
        self.total = total
        self.log: list[tuple[Any, ...]] = []
        self.weights = 0
        self.blocks_in_use: dict[int, int] = {}
        self.failing: set[str] = set()
        self._handles = itertools.count(1)
        self._memory: dict[str, dict[int, Any]] = {"device": {}, "host": {}}
        self._freed: list[tuple[int, Any]] = []
        self._streams: dict[int, deque[Work]] = {}
        self._captures: dict[int, list[Work]] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._executables: dict[int, list[Work]] = {}
        self._events: dict[int, float | None] = {}
        self.clock = 0.0
        self._lock = threading.RLock()

    def count(self, call: str, *details: Any) -> int:
        """How often a call was made."""
        return sum(1 for entry in self.log if entry[: 1 + len(details)] == (call, *details))

    def leaks(self) -> Counter[str]:
        """What is held: allocations, streams, graphs and bytes of weights."""
        return +Counter(
            device=len(self._memory["device"]),
            host=len(self._memory["host"]),
            streams=len(self._streams),
            graphs=len(self._graphs),
            executables=len(self._executables),
            events=len(self._events),
            weights=self.weights,
        )

    def view(self, address: int, nbytes: int, where: str = "device") -> Any:
        """The bytes at an address that is allocated."""
        for start, array in self._memory[where].items():
            if start <= address and address + nbytes <= start + array.size:
                return array[address - start : address - start + nbytes]
        for start, array in self._freed:
            if start <= address < start + array.size:
                raise Misuse(f"use after free: {nbytes} bytes at {address:#x}")
        raise Misuse(f"no {where} memory of {nbytes} bytes at {address:#x}")

    def submit(self, stream: int, work: Work) -> None:
        """Put work on a stream, or into the graph that is being captured from it."""
        with self._lock:
            if stream not in self._streams:
                raise Misuse(f"no stream {stream}")
            self._captures.get(stream, self._streams[stream]).append(work)

    def is_capturing(self, stream: int) -> bool:
        return stream in self._captures

    def activate(self) -> None:
        pass

    def memory(self) -> tuple[int, int]:
        used = sum(array.size for array in self._memory["device"].values()) + self.weights
        return self.total - used, self.total

    def malloc(self, nbytes: int) -> int:
        if nbytes > self.memory()[0]:
            raise OutOfDeviceMemory("cudaMalloc: expected success on GPU 0, got cudaErrorMemoryAllocation.")
        return self._allocate("device", nbytes)

    def malloc_host(self, nbytes: int) -> int:
        self._fail("malloc_host")
        return self._allocate("host", nbytes)

    def free(self, address: int) -> None:
        self._release("device", address)

    def free_host(self, address: int) -> None:
        self._release("host", address)

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._note("copy_to_device", nbytes)
        self.submit(stream, lambda: self._copy(("device", target), ("host", source), nbytes))

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self._note("copy_to_host", nbytes)
        self.submit(stream, lambda: self._copy(("host", target), ("device", source), nbytes))

    def create_stream(self) -> int:
        handle = next(self._handles)
        self._streams[handle] = deque()
        return handle

    def destroy_stream(self, stream: int) -> None:
        if self._streams.pop(stream):
            raise Misuse("a stream was destroyed with work on it")

    def synchronize(self, stream: int) -> None:
        self._note("synchronize", stream)
        if stream in self._captures:
            raise Misuse("a stream was synchronized while it was captured")
        with self._lock:
            if "synchronize" in self.failing:
                self._streams[stream].clear()  # what had not run when the device failed never does
            self._fail("synchronize")
            while self._streams[stream]:
                self._streams[stream].popleft()()
            self.blocks_in_use = {block: user for block, user in self.blocks_in_use.items() if user != stream}

    def create_event(self) -> int:
        handle = next(self._handles)
        self._events[handle] = None
        return handle

    def destroy_event(self, event: int) -> None:
        del self._events[event]

    def record(self, event: int, stream: int) -> None:
        self._note("record", event)
        if stream in self._captures:
            raise Misuse("an event became part of a graph")
        self._events[event] = None
        self.submit(stream, lambda: self._pass(event))

    def elapsed(self, start: int, stop: int) -> float:
        began, ended = self._events[start], self._events[stop]
        if began is None or ended is None:
            raise Misuse("an event was read that its stream had not passed")
        return ended - began

    def begin_capture(self, stream: int) -> None:
        self._note("begin_capture", stream)
        if self._streams[stream]:
            raise Misuse("a capture began before the warm-up was through")
        self._captures[stream] = []

    def end_capture(self, stream: int) -> int:
        self._note("end_capture", stream)
        work = self._captures.pop(stream)
        self._fail("end_capture")
        handle = next(self._handles)
        self._graphs[handle] = work
        return handle

    def instantiate(self, graph: int) -> int:
        self._note("instantiate", graph)
        self._fail("instantiate")
        handle = next(self._handles)
        self._executables[handle] = self._graphs[graph]
        return handle

    def launch(self, executable: int, stream: int) -> None:
        self._note("launch", executable)
        self._fail("launch")
        if executable not in self._executables:
            raise Misuse(f"executable {executable} is destroyed")
        for work in self._executables[executable]:
            self.submit(stream, work)

    def destroy_graph(self, graph: int) -> None:
        del self._graphs[graph]

    def destroy_executable(self, executable: int) -> None:
        del self._executables[executable]

    def _pass(self, event: int) -> None:
        self._events[event] = self.clock

    def _note(self, *entry: Any) -> None:
        with self._lock:
            self.log.append(entry)

    def _fail(self, call: str) -> None:
        if call in self.failing:
            raise BackendError(f"{call}: expected success on GPU 0, got cudaErrorUnknown.")

    def _allocate(self, where: str, nbytes: int) -> int:
        self._note("malloc", where, nbytes)
        raw = np.full(nbytes + 256, GARBAGE, np.uint8)
        offset = -raw.ctypes.data % 256
        array = raw[offset : offset + nbytes]
        address = int(array.ctypes.data)
        with self._lock:
            self._memory[where][address] = array
        return address

    def _release(self, where: str, address: int) -> None:
        self._note("free", where)
        with self._lock:
            if address not in self._memory[where]:
                raise Misuse(f"{where} memory at {address:#x} is not allocated: double free?")
            for stream in self._streams:
                if stream not in self._captures:
                    self.synchronize(stream)
            array = self._memory[where].pop(address)
            array[:] = FREED
            self._freed.append((address, array))

    def _copy(self, target: tuple[str, int], source: tuple[str, int], nbytes: int) -> None:
        self.view(target[1], nbytes, target[0])[:] = self.view(source[1], nbytes, source[0])
