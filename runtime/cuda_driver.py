"""The device seam over cuda-bindings, 12.x and 13.x: the runtime API, every call's status checked."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from .cuda_device import OutOfDeviceMemory
from .errors import BackendError
from .trt_flavour import installed_version

BINDINGS = "pip install 'cuda-bindings>=12.6'"
_REMEDIES = {
    "cudaErrorInsufficientDriver": " Install the NVIDIA driver, or cuda-bindings of the CUDA version that it supports.",
    "cudaErrorNoDevice": " See CUDA_VISIBLE_DEVICES, and latentrt doctor.",
    "cudaErrorInvalidDevice": " See CUDA_VISIBLE_DEVICES, and latentrt doctor.",
}


@cache
def cuda_runtime() -> Any:
    """The runtime API of cuda-bindings.

    Raises:
        BackendError: it is not installed, or does not load.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError, RuntimeError) as err:
        raise BackendError(f"cuda-bindings: expected an importable package, got {err}. Run: {BINDINGS}") from err


def why_no_bindings() -> str | None:
    """Why CUDA cannot be called from here, as far as that shows without a try; None if it can."""
    if installed_version("cuda-bindings") is None:
        return "it needs cuda-bindings, which is not installed"
    return None


class CudaDevice:
    """One GPU through cuda-bindings, as `cuda_device.Device`; its methods are documented there.

    TensorRT and this use the same primary context: both reach it through the runtime API.

    Args:
        index: of the GPUs that CUDA shows this process.

    Raises:
        BackendError: cuda-bindings is not installed, or CUDA has no such GPU.
    """

    def __init__(self, index: int = 0) -> None:
        self._cuda, self._index = cuda_runtime(), index
        self.activate()
        properties = self._call("cudaGetDeviceProperties", index)
        name = properties.name
        text = name.decode(errors="replace").rstrip("\0") if isinstance(name, bytes) else str(name)
        self._name = f"{text} sm{properties.major}{properties.minor}"

    @property
    def name(self) -> str:
        """The GPU's name and compute capability."""
        return self._name

    def activate(self) -> None:
        """Make this the calling thread's current device."""
        self._call("cudaSetDevice", self._index)

    def memory(self) -> tuple[int, int]:
        """Free and total device memory in bytes."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def malloc(self, nbytes: int) -> int:
        """Device memory."""
        return int(self._call("cudaMalloc", nbytes))

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call("cudaFree", address)

    def malloc_host(self, nbytes: int) -> int:
        """Page-locked memory."""
        return int(self._call("cudaHostAlloc", nbytes, self._cuda.cudaHostAllocDefault))

    def free_host(self, address: int) -> None:
        """Give page-locked memory back."""
        self._call("cudaFreeHost", address)

    def copy_to_device(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy from page-locked memory."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source, nbytes, kind, stream)

    def copy_to_host(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy to page-locked memory."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target, source, nbytes, kind, stream)

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""
        return int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._call("cudaStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait until all work of a stream is done."""
        self._call("cudaStreamSynchronize", stream)

    def create_event(self) -> int:
        """A mark that a stream can be given."""
        return int(self._call("cudaEventCreate"))

    def destroy_event(self, event: int) -> None:
        """Give an event back."""
        self._call("cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """Have the stream pass the event."""
        self._call("cudaEventRecord", event, stream)

    def elapsed(self, start: int, stop: int) -> float:
        """Seconds between two events."""
        return float(self._call("cudaEventElapsedTime", start, stop)) / 1000

    def begin_capture(self, stream: int) -> None:
        """Record this thread's work on a stream."""
        # Other threads may allocate meanwhile; the global mode would end the capture then.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        """The graph that was recorded."""
        return int(self._call("cudaStreamEndCapture", stream))

    def instantiate(self, graph: int) -> int:
        """An executable of a graph."""
        return int(self._call("cudaGraphInstantiate", graph, 0))

    def launch(self, executable: int, stream: int) -> None:
        """Run an executable graph."""
        self._call("cudaGraphLaunch", executable, stream)

    def destroy_graph(self, graph: int) -> None:
        """Give a graph back."""
        self._call("cudaGraphDestroy", graph)

    def destroy_executable(self, executable: int) -> None:
        """Give an executable graph back."""
        self._call("cudaGraphExecDestroy", executable)

    def _call(self, function: str, *args: Any) -> Any:
        """What a function returns after its status: nothing, one value or a tuple.

        Raises:
            OutOfDeviceMemory: the status is cudaErrorMemoryAllocation.
            BackendError: it is another error.
        """
        status, *values = getattr(self._cuda, function)(*args)
        if status != self._cuda.cudaError_t.cudaSuccess:
            # A failure that does not break the context is reported again by the next call that asks for it.
            self._cuda.cudaGetLastError()
            _, text = self._cuda.cudaGetErrorString(status)
            said = text.decode() if isinstance(text, bytes) else str(text)
            kind = OutOfDeviceMemory if status == self._cuda.cudaError_t.cudaErrorMemoryAllocation else BackendError
            remedy = _REMEDIES.get(status.name, "")
            raise kind(f"{function}: expected success on GPU {self._index}, got {status.name} ({said}).{remedy}")
        return values[0] if len(values) == 1 else tuple(values)
