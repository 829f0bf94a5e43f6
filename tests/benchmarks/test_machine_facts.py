from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.benchmarks import machine_facts as facts
from latentrt.benchmarks.machine_facts import (
    RANDOM_WEIGHTS,
    cpu_name,
    gpu_clocks,
    machine_facts,
    model_facts,
    package_versions,
)
from latentrt.runtime.machine import Gpu, Machine
from latentrt.runtime.manifest import load_manifest


def test_the_machine_is_told_without_its_name() -> None:
    found = machine_facts()
    assert found["architecture"] == platform.machine()
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**28
    assert found["platform"].startswith(platform.system())
    assert found["cpu"]
    text = json.dumps(found)
    assert platform.node() not in text.split('"')
    assert str(Path.home()) not in text


def test_the_processor_is_named_from_what_the_system_lists(tmp_path: Path) -> None:
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor\t: 0\nmodel name\t: Some Processor 9000 @ 3 GHz\nflags\t: fpu\n")
    assert cpu_name(listed) == "Some Processor 9000 @ 3 GHz"
    assert cpu_name(tmp_path / "nothing") == (platform.processor() or platform.machine())


class Nvml:
    """pynvml of a GPU that is hot and does not tell of persistence."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return {1: 1200, 2: 9000}[clock]

    def nvmlDeviceGetMaxClockInfo(self, handle: str, clock: int) -> int:
        return {1: 1980, 2: 10501}[clock]

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 450_000

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 83

    def nvmlDeviceGetPersistenceMode(self, handle: str) -> int:
        raise RuntimeError("not supported")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return 0x4 | 0x20


CLOCKS = {
    "sm_mhz": 1200,
    "sm_max_mhz": 1980,
    "memory_mhz": 9000,
    "memory_max_mhz": 10501,
    "power_limit_watts": 450.0,
    "temperature_celsius": 83,
    "throttled": ["software power cap", "software thermal slowdown"],
}


def test_a_gpus_clocks_and_what_holds_them_back() -> None:
    assert gpu_clocks(Nvml(), "handle") == CLOCKS


def test_gpus_are_told_with_their_clocks_or_without(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = (Gpu("A", "sm89", 24 << 30), Gpu("B", "sm90", 80 << 30))
    monkeypatch.setattr(facts, "probe_machine", lambda: Machine(gpus=gpus, driver="580.65.06", cuda=(13, 0)))
    monkeypatch.setattr(facts, "_told_of_gpu", lambda device: CLOCKS if device == 0 else {})
    found = machine_facts()
    assert found["gpus"] == [
        {"name": "A", "sm": "sm89", "memory_bytes": 24 << 30, **CLOCKS},
        {"name": "B", "sm": "sm90", "memory_bytes": 80 << 30},
    ]
    assert (found["driver"], found["cuda"]) == ("580.65.06", "13.0")


def test_nvml_is_asked_for_the_gpu_that_cuda_means_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    def handle(bus: str) -> str:
        events.append(bus)
        raise RuntimeError("lost")

    nvml = SimpleNamespace(
        nvmlInit=lambda: events.append("open"),
        nvmlShutdown=lambda: events.append("closed"),
        nvmlDeviceGetHandleByPciBusId=handle,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(facts, "load_libcuda", lambda: "cuda")
    monkeypatch.setattr(facts, "pci_bus_id", lambda cuda, device: f"0000:0{device}:00.0")
    monkeypatch.setattr(facts, "probe_machine", lambda: Machine(gpus=(Gpu("A", "sm89", 1),)))
    assert machine_facts()["gpus"] == [{"name": "A", "sm": "sm89", "memory_bytes": 1}]
    assert events == ["open", "0000:00:00.0", "closed"]


def test_versions_are_those_installed() -> None:
    found = package_versions(("numpy", "onnxruntime", "no-such-distribution"))
    assert found == {"numpy": version("numpy"), "onnxruntime": version("onnxruntime")}
    assert package_versions()["latentrt"] == version("latentrt")


def parameters(file: Path) -> int:
    """Numbers in a safetensors file, by its header."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def test_a_bundle_is_named_with_the_hashes_of_its_files(shapes_bundle: Path, shapes_checkpoint: Path) -> None:
    found = model_facts(shapes_bundle)
    assert (found["name"], found["family"], found["default_size"]) == ("shapes", "StableDiffusionPipeline", 128)
    assert found["random_weights"] is False
    assert found["precisions"]["unet"][0] == "fp32"
    assert found["parameters"]["unet"] == parameters(shapes_checkpoint / "unet/diffusion_pytorch_model.safetensors")
    graph = "unet/model.onnx"
    assert found["files"][graph] == hashlib.sha256((shapes_bundle / graph).read_bytes()).hexdigest()
    assert set(found["files"]) == set(load_manifest(shapes_bundle).files)
    assert str(shapes_bundle) not in json.dumps(found)


@pytest.mark.parametrize(("mark", "expected"), [({}, False), ({RANDOM_WEIGHTS: True}, True)])
def test_a_folder_without_a_manifest_is_hashed(mark: dict[str, bool], expected: bool, tmp_path: Path) -> None:
    folder = tmp_path / "someones model"
    configs = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline", **mark},
        "unet/config.json": {"in_channels": 4, "sample_size": 64},
        "vae_decoder/config.json": {"latent_channels": 4, "block_out_channels": [1, 2, 3, 4]},
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config))
    (folder / "unet" / "model.onnx").write_bytes(b"graph")
    found = model_facts(folder)
    assert (found["name"], found["family"]) == ("someones model", "StableDiffusionPipeline")
    assert found["default_size"] == 512
    assert found["random_weights"] is expected
    assert set(found["files"]) == {*configs, "unet/model.onnx"}
    assert found["files"]["unet/model.onnx"] == hashlib.sha256(b"graph").hexdigest()
    assert str(tmp_path) not in json.dumps(found)
