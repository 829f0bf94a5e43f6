"""What a benchmark ran on and with: hardware, clocks, driver, load, package versions, and the model.

No names of hosts, users or folders: results are published.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentrt.export.tool_versions import tool_versions
from latentrt.runtime.bundle import Bundle, open_bundle
from latentrt.runtime.machine import core_count, cpu_features, load_libcuda, memory_bytes, probe_machine
from latentrt.runtime.manifest import sha256_of
from latentrt.runtime.model_facts import read_facts
from latentrt.runtime.vram import pci_bus_id

# In a checkpoint's model_index.json, and so in that of a bundle made from it: its weights were never trained.
RANDOM_WEIGHTS = "_latentrt_random_weights"
# What decides how fast a run is, of latentrt and of its peers.
PACKAGES = (
    *("latentrt", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "cuda-python"),
    *("tokenizers", "pillow", "nvidia-ml-py"),
    *("torch", "diffusers", "transformers", "accelerate", "safetensors", "optimum", "optimum-onnx"),
    *("onnx", "onnx-ir", "onnxscript", "scipy"),
)
_CPU = Path("/sys/devices/system/cpu/cpu0/cpufreq")
# Bits of nvml.h's nvmlClocksEventReasons.
_THROTTLES = (
    *("idle", "application clocks", "software power cap", "hardware slowdown", "sync boost"),
    *("software thermal slowdown", "hardware thermal slowdown", "hardware power brake", "display clocks"),
)


def machine_facts() -> dict[str, Any]:
    """The machine as it is now. What it does not tell is None, or missing from a GPU's facts; never raises.

    `mhz` are clocks, `bytes` sizes, `watts` limits; `throttled` lists why a GPU's clock is not at its highest.
    """
    machine = probe_machine()
    release = re.match(r"\d+(\.\d+)*", platform.release())
    return {
        "platform": f"{platform.system()} {release[0] if release else ''}".strip(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": core_count(),
        "cpu_features": _told(lambda: list(cpu_features())),
        "cpu_governor": _told(lambda: (_CPU / "scaling_governor").read_text().strip()),
        "cpu_max_mhz": _told(lambda: int((_CPU / "cpuinfo_max_freq").read_text()) // 1000),
        "memory_bytes": _told(lambda: memory_bytes()[1]),
        "load_average": _told(lambda: list(os.getloadavg())),
        "gpus": [
            {"name": gpu.name, "sm": gpu.sm, "memory_bytes": gpu.memory_bytes, **_told_of_gpu(index)}
            for index, gpu in enumerate(machine.gpus)
        ],
        "driver": machine.driver,
        "cuda": None if machine.cuda is None else ".".join(map(str, machine.cuda)),
        "why_no_gpu": machine.why_no_gpu,
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name for people; its architecture where the system does not tell more."""
    with contextlib.suppress(OSError):
        if match := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M):
            return match[1].strip()
    return platform.processor() or platform.machine()


def gpu_clocks(nvml: Any, handle: Any) -> dict[str, Any]:
    """Clocks, power limit and what holds a GPU back, as far as NVML tells them.

    Args:
        nvml: the module pynvml, initialized.
        handle: of the GPU.
    """
    queries: Mapping[str, Callable[[], Any]] = {
        "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "sm_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "memory_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_limit_watts": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "temperature_celsius": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "persistence": lambda: bool(nvml.nvmlDeviceGetPersistenceMode(handle)),
        "throttled": lambda: _throttles(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
    }
    told = {name: _told(query) for name, query in queries.items()}
    return {name: value for name, value in told.items() if value is not None}


def _throttles(bits: int) -> list[str]:
    return [name for place, name in enumerate(_THROTTLES) if bits >> place & 1]


def _told_of_gpu(device: int) -> dict[str, Any]:
    """Of one of CUDA's devices; empty where NVML cannot be asked."""

    def ask() -> dict[str, Any]:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        try:
            # NVML counts GPUs in another order than CUDA.
            return gpu_clocks(nvml, nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id(load_libcuda(), device)))
        finally:
            nvml.nvmlShutdown()

    return _told(ask) or {}


def _told(ask: Callable[[], Any]) -> Any:
    """The answer; None where the system, whose ways to fail are many, has none."""
    try:
        return ask()
    except Exception:
        return None


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of what decides how fast a run is, by distribution."""
    return tool_versions(names)


def model_facts(bundle_path: Path) -> dict[str, Any]:
    """What the model is: name, family, networks, and the SHA-256 of the bundle's files by their names in it.

    `source` has the hashes of the checkpoint's files; a folder that optimum wrote has none, and its files are hashed
    now.

    Raises:
        ArtifactError: the folder is no bundle, or a config of it is damaged.
        ConfigError: the family is not supported.
    """
    bundle = open_bundle(bundle_path)
    manifest = bundle.manifest
    has_index = (bundle.path / "model_index.json").exists()
    index = bundle.config("model_index.json") if has_index else {}
    return {
        "name": bundle.path.resolve().name if manifest is None else manifest.name,
        "family": index.get("_class_name") if manifest is None else manifest.pipeline_class,
        "default_size": read_facts(bundle).default_size,
        "random_weights": index.get(RANDOM_WEIGHTS) is True,
        "precisions": {component: bundle.held(component) for component in bundle.components()},
        "parameters": {} if manifest is None else {a.component: a.parameters for a in manifest.artifacts},
        "source": {} if manifest is None else dict(manifest.source),
        "files": _hashes(bundle),
    }


def _hashes(bundle: Bundle) -> dict[str, str]:
    if bundle.manifest is not None:
        return {name: record.sha256 for name, record in bundle.manifest.files.items()}
    files = sorted(path for path in bundle.path.rglob("*") if path.is_file())
    return {path.relative_to(bundle.path).as_posix(): sha256_of(path) for path in files}
