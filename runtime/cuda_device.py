"""The device seam: the few calls of CUDA that running an engine takes, and what their failures are called.

All above it (buffers and their lifecycle, order of capture, shape buckets, the shared activation block) is written
against this Protocol and tested on the CPU. `cuda_driver.CudaDevice` implements it over cuda-bindings.
"""

from __future__ import annotations

from typing import Protocol

from .errors import BackendError


class OutOfDeviceMemory(BackendError):  # noqa: N818 # as CUDA and PyTorch call it
    """The device, or page-locked memory of the host, has no room for what was asked for."""


class Device(Protocol):
    """One GPU. Addresses, streams, events and graphs are handles, as integers.

    Every call raises BackendError with the name of the CUDA function and its error, and OutOfDeviceMemory where that
    is the error. Copies, launches and TensorRT's own work are asynchronous and ordered by their stream.
    """

    @property
    def name(self) -> str:
        """The GPU's name and compute capability, for people: `NVIDIA H200 sm90`."""
        ...

    def activate(self) -> None:
        """Make this the calling thread's current device."""
        ...

    def memory(self) -> tuple[int, int]:
        """Free and total device memory in bytes."""
        ...

    def malloc(self, nbytes: int) -> int:
        """Device memory, aligned to 256 bytes."""
        ...

    def free(self, address: int) -> None:
        """Give device memory back; waits for work that uses it."""
        ...

    def malloc_host(self, nbytes: int) -> int:
        """Page-locked memory of the host, which copies to and from without a detour."""
        ...

    def free_host(self, address: int) -> None:
        """Give page-locked memory back."""
        ...

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy from page-locked memory, which must stay as it is until the stream has got there."""
        ...

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy to page-locked memory, which holds the values once the stream was synchronized."""
        ...

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until all work of a stream is done."""
        ...

    def create_event(self) -> int:
        """A mark that a stream can be given."""
        ...

    def destroy_event(self, event: int) -> None:
        """Give an event back."""
        ...

    def record(self, event: int, stream: int) -> None:
        """Have the stream pass the event when it has done the work so far."""
        ...

    def elapsed(self, start: int, stop: int) -> float:
        """Seconds between two events that their stream has passed, to about half a microsecond."""
        ...

    def begin_capture(self, stream: int) -> None:
        """Record this thread's work on a stream instead of running it."""
        ...

    def end_capture(self, stream: int) -> int:
        """The graph that was recorded.

        Raises:
            BackendError: what was recorded cannot be a graph. The stream is usable again.
        """
        ...

    def instantiate(self, graph: int) -> int:
        """An executable of a graph, which no longer needs the graph."""
        ...

    def launch(self, executable: int, stream: int) -> None:
        """Run an executable graph on a stream."""
        ...

    def destroy_graph(self, graph: int) -> None:
        """Give a graph back."""
        ...

    def destroy_executable(self, executable: int) -> None:
        """Give an executable graph back."""
        ...


def allocate(device: Device, nbytes: int, purpose: str) -> int:
    """Device memory for a purpose.

    Raises:
        OutOfDeviceMemory: says what was asked for, what is free, and what to do.
    """
    try:
        return device.malloc(nbytes)
    except OutOfDeviceMemory as err:
        raise out_of_memory(device, nbytes, purpose) from err


def out_of_memory(device: Device, nbytes: int, purpose: str) -> OutOfDeviceMemory:
    """The error of a device that has no room for so many bytes."""
    free, total = device.memory()
    return OutOfDeviceMemory(
        f"{purpose}: expected {_size(nbytes)} of free memory on {device.name}, got {_size(free)} of {_size(total)}. "
        "Run: latentrt plan BUNDLE to see which sizes and policies fit this GPU, or end what else runs on it."
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"
