"""The device over cuda-bindings: what it calls and what it makes of the answers. None of it needs a GPU."""

from __future__ import annotations

import enum
import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.runtime import cuda_driver
from latentrt.runtime.cuda_device import OutOfDeviceMemory, allocate
from latentrt.runtime.cuda_driver import CudaDevice, why_no_bindings
from latentrt.runtime.errors import BackendError
from latentrt.runtime.machine import probe_machine

STATUS = {
    "cudaSuccess": 0,
    "cudaErrorMemoryAllocation": 2,
    "cudaErrorInsufficientDriver": 35,
    "cudaErrorIllegalAddress": 700,
}
status_type: Any = enum.IntEnum
Status = status_type("Status", STATUS)


ANSWERS: dict[str, tuple[Any, ...]] = {
    "cudaGetDeviceProperties": (SimpleNamespace(name=b"RTX 4090", major=8, minor=9),),
    "cudaMemGetInfo": (3 << 30, 8 << 30),
    "cudaGetErrorString": (b"what went wrong",),
    "cudaEventCreate": (99,),
    "cudaEventElapsedTime": (2.5,),
    **dict.fromkeys(("cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags"), (4096,)),
    **dict.fromkeys(("cudaStreamEndCapture", "cudaGraphInstantiate"), (77,)),
}


class Runtime:
    """As `cuda.bindings.runtime`: every function answers with a status and its values."""

    cudaError_t = Status  # noqa: N815
    cudaHostAllocDefault, cudaStreamNonBlocking = 0, 1  # noqa: N815

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failing: dict[str, Any] = {}
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down")
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append((name, *args))
            values = ANSWERS.get(name, ())
            status = self.failing.get(name, Status.cudaSuccess)
            return (status, *(values if status == Status.cudaSuccess else [None] * len(values)))

        return call


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    monkeypatch.setattr(cuda_driver, "cuda_runtime", lambda: runtime)
    return runtime


def use_all(device: CudaDevice) -> None:
    device.activate()
    assert device.memory() == (3 << 30, 8 << 30)
    assert (device.malloc(10), device.malloc_host(10), device.create_stream()) == (4096, 4096, 4096)
    device.copy_to_device(1, 2, 3, 4)
    device.copy_to_host(1, 2, 3, 4)
    device.begin_capture(4)
    assert (device.end_capture(4), device.instantiate(77)) == (77, 77)
    device.launch(77, 4)
    for give_back in (device.destroy_graph, device.destroy_executable, device.destroy_stream):
        give_back(77)
    event = device.create_event()
    device.record(event, 4)
    assert device.elapsed(event, 8) == 0.0025
    device.destroy_event(event)
    device.synchronize(4)
    device.free(4096)
    device.free_host(4096)


def test_every_call_reaches_cuda_with_its_arguments(runtime: Runtime) -> None:
    device = CudaDevice(1)
    assert device.name == "RTX 4090 sm89"
    use_all(device)
    assert ("cudaSetDevice", 1) in runtime.calls
    assert ("cudaMemcpyAsync", 1, 2, 3, "up", 4) in runtime.calls
    assert ("cudaMemcpyAsync", 1, 2, 3, "down", 4) in runtime.calls
    assert ("cudaStreamBeginCapture", 4, "thread") in runtime.calls
    assert ("cudaGraphLaunch", 77, 4) in runtime.calls
    assert ("cudaEventRecord", 99, 4) in runtime.calls
    assert ("cudaEventElapsedTime", 99, 8) in runtime.calls
    assert ("cudaEventDestroy", 99) in runtime.calls


def test_what_it_calls_is_in_cuda_bindings(runtime: Runtime) -> None:
    bindings = pytest.importorskip("cuda.bindings.runtime", reason=cuda_driver.BINDINGS)
    use_all(CudaDevice())
    runtime.failing["cudaFree"] = Status.cudaErrorIllegalAddress
    with pytest.raises(BackendError):
        CudaDevice().free(1)
    assert [call[0] for call in runtime.calls if not hasattr(bindings, call[0])] == []
    for name in ("cudaHostAllocDefault", "cudaStreamNonBlocking"):
        assert getattr(bindings, name) == getattr(runtime, name)
    for status in Status:
        assert int(getattr(bindings.cudaError_t, status.name)) == status


def test_a_failure_is_named_and_cleared(runtime: Runtime) -> None:
    device = CudaDevice()
    runtime.failing["cudaStreamSynchronize"] = Status.cudaErrorIllegalAddress
    said = r"cudaStreamSynchronize: .* on GPU 0, got cudaErrorIllegalAddress \(what went wrong\)"
    with pytest.raises(BackendError, match=said):
        device.synchronize(4)
    assert ("cudaGetLastError",) in runtime.calls


def test_no_room_says_what_was_asked_and_what_is_free(runtime: Runtime) -> None:
    device = CudaDevice()
    runtime.failing["cudaMalloc"] = Status.cudaErrorMemoryAllocation
    said = r"unet: weights: expected 5\.00 GiB of free memory on RTX 4090 sm89, got 3\.00 GiB of 8\.00 GiB"
    with pytest.raises(OutOfDeviceMemory, match=said):
        allocate(device, 5 << 30, "unet: weights")


def test_without_cuda_bindings_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(cuda_driver, "installed_version", lambda name: None)
    cuda_driver.cuda_runtime.cache_clear()
    with pytest.raises(BackendError, match=r"cuda-bindings: .* Run: pip install 'cuda-bindings"):
        CudaDevice()
    assert why_no_bindings() == "it needs cuda-bindings, which is not installed"


@pytest.mark.skipif(bool(probe_machine().gpus), reason="this machine has a GPU")
def test_without_a_driver_the_real_bindings_say_so() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason=cuda_driver.BINDINGS)
    with pytest.raises(BackendError, match=r"cudaSetDevice: .* (Install the NVIDIA driver|CUDA_VISIBLE_DEVICES)"):
        CudaDevice()
