"""How much of a GPU's memory a run takes at most, as the driver's management library (NVML) counts it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .machine import load_libcuda, probe_machine


@dataclass(frozen=True)
class VramPeak:
    """The most memory that was seen in use.

    Attributes:
        nbytes: None where it is not known.
        of: `process`, or `gpu` where the driver does not tell processes apart: all that was taken on the GPU since the
            measurement began, by whomever.
        reason: why it is not known.
    """

    nbytes: int | None
    of: str | None = None
    reason: str | None = None


class Usage(Protocol):
    """Reads what is in use now, in bytes: by this process, None if the driver does not list it, and on the GPU."""

    def __call__(self) -> tuple[int | None, int]:
        """Look."""
        ...


def open_nvml(device: int = 0) -> Usage:
    """A look at one of the GPUs that this process sees, in CUDA's order.

    Raises:
        OSError: there is none, or NVML cannot be used; says why.
    """
    machine = probe_machine()
    if device >= len(machine.gpus):
        raise OSError(machine.why_no_gpu or f"GPU {device} of {len(machine.gpus)}")
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as err:
        raise OSError("nvidia-ml-py is not installed; run: pip install 'latentrt[gpu]'") from err
    return nvml_usage(nvml, pci_bus_id(load_libcuda(), device))


def nvml_usage(nvml: Any, bus_id: str) -> Usage:
    """A look through the module pynvml at the GPU with a PCI address: NVML counts GPUs in another order than CUDA.

    Raises:
        OSError: NVML does not answer.
    """
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
    except nvml.NVMLError as err:
        raise OSError(f"NVML does not answer: {err}") from err

    def usage() -> tuple[int | None, int]:
        own = [
            process.usedGpuMemory
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            if process.pid == os.getpid() and process.usedGpuMemory is not None
        ]
        return (sum(own) if own else None), int(nvml.nvmlDeviceGetMemoryInfo(handle).used)

    return usage


def pci_bus_id(cuda: Any, device: int) -> str:
    """The PCI address of one of CUDA's devices, such as `0000:01:00.0`.

    Raises:
        OSError: the driver refuses.
    """
    handle, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    if code := cuda.cuDeviceGet(ctypes.byref(handle), device) or cuda.cuDeviceGetPCIBusId(text, len(text), handle):
        raise OSError(f"the NVIDIA driver does not answer: CUDA error {code}")
    return text.value.decode()


class VramMeter:
    """Looks at the memory in use again and again while a block runs: `with VramMeter() as meter: …; meter.peak`.

    Args:
        open_usage: opens what is looked at; its OSError is the reason why nothing is known.
        interval: seconds between two looks. What is taken and given back in between is not seen.
    """

    def __init__(self, open_usage: Callable[[], Usage] = open_nvml, *, interval: float = 0.02) -> None:
        self._open, self._interval = open_usage, interval
        self._usage: Usage | None = None
        self._reason: str | None = None
        self._before = self._most = 0
        self._own: int | None = None
        self._latest_own: int | None = None
        self._latest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="latentrt-vram", daemon=True)

    def __enter__(self) -> VramMeter:
        try:
            self._usage = self._open()
            _, self._before = self._usage()
        except Exception as err:
            self._usage, self._reason = None, str(err)
            return self
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._usage is not None:
            self._stop.set()
            self._thread.join()

    @property
    def peak(self) -> VramPeak:
        """The most that was seen so far."""
        if self._usage is None:
            return VramPeak(None, reason=self._reason)
        self._look()
        if self._own is not None:
            return VramPeak(self._own, "process")
        return VramPeak(max(self._most - self._before, 0), "gpu")

    @property
    def now(self) -> VramPeak:
        """What is in use at the moment, counted as `peak` counts it."""
        if self._usage is None:
            return VramPeak(None, reason=self._reason)
        self._look()
        if self._latest_own is not None:
            return VramPeak(self._latest_own, "process")
        return VramPeak(max(self._latest - self._before, 0), "gpu")

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._look()

    def _look(self) -> None:
        # NVML may fail between two looks; the next one counts.
        with contextlib.suppress(Exception):
            assert self._usage is not None
            own, used = self._usage()
            self._latest_own, self._latest = own, used
            self._most = max(self._most, used)
            if own is not None:
                self._own = max(self._own or 0, own)
