"""What this machine has: GPUs and driver, memory, disk, processor. Standard library and ctypes only.

Each probe raises OSError (or whatever went wrong) rather than guessing; `latentrt doctor` turns that into a line.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .trt_flavour import FLAVOURS, installed_flavour

# Processor features that decide how fast int8 and half-precision matrix products are on a CPU.
CPU_FEATURES = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve"),
)
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}


@dataclass(frozen=True)
class Gpu:
    """One CUDA device: its name, compute capability as `sm89`, and memory in bytes."""

    name: str
    sm: str
    memory_bytes: int


@dataclass(frozen=True)
class Package:
    """An installed package: version, and the CUDA major version it was made for where its name says so."""

    version: str
    cuda_major: int | None = None


@dataclass(frozen=True)
class Machine:
    """What decides whether an engine can be used here.

    Attributes:
        gpus: CUDA devices that a process here may use, in CUDA's order.
        driver: driver version such as `580.65.06`, or None if there is none or it is not stated.
        cuda: the CUDA version that the driver supports, such as (13, 0).
        why_no_gpu: why `gpus` is empty.
        packages: installed TensorRT flavours.
        platform: such as `linux_x86_64`.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: tuple[int, int] | None = None
    why_no_gpu: str | None = None
    packages: Mapping[str, Package] = field(default_factory=dict)
    platform: str = ""


def platform_tag() -> str:
    """Operating system and processor, such as `linux_x86_64`."""
    return f"{platform.system()}_{platform.machine()}".lower()


def probe_machine() -> Machine:
    """Look at this machine. Never raises: what cannot be found out is stated in `why_no_gpu`."""
    gpus: tuple[Gpu, ...] = ()
    cuda: tuple[int, int] | None = None
    why: str | None = None
    try:
        gpus, cuda = read_libcuda(load_libcuda())
        if not gpus:
            why = "the driver shows no CUDA device (see CUDA_VISIBLE_DEVICES)"
    except OSError as err:
        why = str(err)
    except Exception as err:
        why = f"the driver could not be read ({type(err).__name__}: {err})"
    packages = {name: Package(*found) for name in FLAVOURS if (found := installed_flavour(name)) is not None}
    return Machine(
        gpus=gpus, driver=driver_version(), cuda=cuda, why_no_gpu=why, packages=packages, platform=platform_tag()
    )


def load_libcuda() -> Any:
    """The driver's library.

    Raises:
        OSError: there is no NVIDIA driver here.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name)
    except OSError as err:
        raise OSError(f"no NVIDIA driver: {name} is not installed") from err


def read_libcuda(cuda: Any) -> tuple[tuple[Gpu, ...], tuple[int, int]]:
    """Devices and supported CUDA version through the driver API; creates no context.

    libcuda rather than NVML: it respects CUDA_VISIBLE_DEVICES, so it names what an engine would run on.

    Raises:
        OSError: the driver refuses, with its error code.
    """

    def call(function: str, *args: Any) -> None:
        code = getattr(cuda, function)(*args)
        if code == 100:  # CUDA_ERROR_NO_DEVICE
            raise OSError("the NVIDIA driver finds no GPU")
        if code != 0:
            raise OSError(f"the NVIDIA driver does not answer: {function} returned CUDA error {code}")

    number = ctypes.c_int()
    call("cuInit", 0)
    call("cuDriverGetVersion", ctypes.byref(number))
    version = (number.value // 1000, number.value % 1000 // 10)
    call("cuDeviceGetCount", ctypes.byref(number))
    gpus = []
    for index in range(number.value):
        device, major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(256)
        call("cuDeviceGet", ctypes.byref(device), index)
        call("cuDeviceGetName", name, len(name), device)
        call("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
        call("cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
        call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        gpus.append(Gpu(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}", memory.value))
    return tuple(gpus), version


def driver_version() -> str | None:
    """The driver's own version, through nvidia-ml-py if it is installed, else from /proc; None if neither says."""
    with contextlib.suppress(Exception):
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        try:
            version = nvml.nvmlSystemGetDriverVersion()
        finally:
            nvml.nvmlShutdown()
        return version.decode() if isinstance(version, bytes) else str(version)
    with contextlib.suppress(OSError):
        match = re.search(r"\b(\d{3}\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        return match[1] if match else None
    return None


def memory_bytes() -> tuple[int, int]:
    """Free (available without swapping) and total memory in bytes, within the container's limit if there is one.

    Raises:
        OSError: this system does not say.
    """
    if sys.platform == "win32":
        return _windows_memory()
    info = Path("/proc/meminfo")
    if not info.exists():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        raise OSError(f"this system states its total of {total} bytes but not what is free")
    sizes = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", info.read_text(), re.M)}
    try:
        free, total = sizes["MemAvailable"], sizes["MemTotal"]
    except KeyError as err:
        raise OSError(f"{info} has no {err}") from err
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        free, total = min(free, max(limit - used, 0)), min(total, limit)
    return free, total


def _windows_memory() -> tuple[int, int]:
    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            *((name, ctypes.c_ulonglong) for name in ("total", "free", *"abcde")),
        )

    status = Status(length=ctypes.sizeof(Status))
    if not getattr(ctypes, "windll").kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # noqa: B009 # Windows only
        raise OSError("GlobalMemoryStatusEx failed")
    return int(status.free), int(status.total)


def disk_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds a folder.

    Raises:
        OSError: the folder cannot be looked at.
    """
    return shutil.disk_usage(folder).free


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Which of `CPU_FEATURES` this processor has.

    Raises:
        OSError: this system does not list them.
    """
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.M)
    if match is None:
        raise OSError(f"{cpuinfo} lists no features")
    held = set(match[1].split())
    return tuple(name for name in CPU_FEATURES if name in held)


def core_count() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
