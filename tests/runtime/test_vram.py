"""The memory of a GPU in use, against a stand-in for the driver and its management library."""

from __future__ import annotations

import os
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.runtime import vram
from latentrt.runtime.machine import Gpu, Machine
from latentrt.runtime.vram import VramMeter, VramPeak, nvml_usage, open_nvml, pci_bus_id

BUS = "0000:81:00.0"


class Nvml:
    """pynvml with one GPU, its own process listed or not."""

    class NVMLError(Exception):
        """As the module has it."""

    def __init__(self, *, lists_processes: bool = True) -> None:
        self.lists_processes = lists_processes
        self.own, self.used = 0, 3 << 30

    def nvmlInit(self) -> None:
        """Nothing to do."""

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:
        if bus_id != BUS:
            raise self.NVMLError("Not Found")
        return bus_id

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        others = [SimpleNamespace(pid=1, usedGpuMemory=1 << 30), SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)]
        own = SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.own)
        return [*others, own] if self.lists_processes else others

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=self.used)


class Cuda:
    """libcuda, as far as it is asked for an address."""

    def cuDeviceGet(self, handle: Any, device: int) -> int:
        handle._obj.value = 10 + device
        return 0

    def cuDeviceGetPCIBusId(self, text: Any, size: int, handle: Any) -> int:
        text.value = BUS.encode() if handle.value == 11 else b"0000:01:00.0"
        return 0


@pytest.mark.parametrize(("lists_processes", "wanted"), [(True, ("process", 2 << 30)), (False, ("gpu", 4 << 30))])
def test_the_most_that_was_seen_counts(lists_processes: bool, wanted: tuple[str, int]) -> None:
    nvml = Nvml(lists_processes=lists_processes)
    looked = threading.Event()

    def usage() -> tuple[int | None, int]:
        looked.set()
        return nvml_usage(nvml, BUS)()

    with VramMeter(lambda: usage, interval=0.001) as meter:
        for own, used in ((1 << 30, 5 << 30), (2 << 30, 7 << 30), (1 << 30, 4 << 30)):
            nvml.own, nvml.used = own, used
            looked.clear()
            assert looked.wait(10)
            looked.clear()
            assert looked.wait(10)
    assert (meter.peak.of, meter.peak.nbytes) == wanted
    assert meter.now == VramPeak(1 << 30, wanted[0])
    assert meter.peak.reason is None


def test_without_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vram, "probe_machine", lambda: Machine(why_no_gpu="no NVIDIA driver: libcuda.so.1"))
    with VramMeter() as meter:
        pass
    assert meter.peak == meter.now == VramPeak(None, None, "no NVIDIA driver: libcuda.so.1")


def test_the_gpu_is_found_by_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's second device may be NVML's first."""
    nvml = Nvml()
    nvml.own = 5
    cards = (Gpu("one", "sm89", 1), Gpu("two", "sm90", 1))
    monkeypatch.setattr(vram, "probe_machine", lambda: Machine(gpus=cards))
    monkeypatch.setattr(vram, "load_libcuda", Cuda)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert pci_bus_id(Cuda(), 1) == BUS
    assert open_nvml(1)() == (5, 3 << 30)
    with pytest.raises(OSError, match="NVML does not answer: Not Found"):
        open_nvml(0)
    with pytest.raises(OSError, match="GPU 2 of 2"):
        open_nvml(2)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(OSError, match=r"nvidia-ml-py is not installed; run: pip install 'latentrt\[gpu\]'"):
        open_nvml(1)
