from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from latentrt.benchmarks import peaks
from latentrt.benchmarks.cases import Case, Settings, Subject, System
from latentrt.benchmarks.cpu_peaks import copy_rate, product_rate
from latentrt.benchmarks.device_peaks import GIB, GPUS, find_gpu, gpu_rate
from latentrt.benchmarks.peaks import gpu_peak, peak_finder
from latentrt.benchmarks.results_file import Row
from latentrt.runtime.machine import Gpu

H200 = Gpu("NVIDIA H200", "sm90", 141 * GIB)


@pytest.mark.parametrize(
    ("name", "gib", "precision", "tera"),
    [
        # As the data sheets and whitepapers print them.
        ("NVIDIA GeForce RTX 4090", 24, "fp16", 165.2),
        ("NVIDIA GeForce RTX 4090", 24, "fp32", 82.6),
        ("NVIDIA GeForce RTX 4090", 24, "fp8", 330.3),
        ("NVIDIA GeForce RTX 4090", 24, "int8", 660.6),
        ("NVIDIA GeForce RTX 3090", 24, "fp16", 71),
        ("NVIDIA GeForce RTX 3090", 24, "int8", 284),
        ("NVIDIA GeForce RTX 3080", 10, "fp16", 59.5),
        ("NVIDIA GeForce RTX 5090", 32, "fp16", 209.5),
        ("NVIDIA GeForce RTX 5090", 32, "int8", 838),
        ("NVIDIA GeForce RTX 5080", 16, "fp16", 112.6),
        ("NVIDIA H100 80GB HBM3", 80, "fp16", 989.4),
        ("NVIDIA A100-SXM4-80GB", 80, "mixed", 312),
        ("Tesla T4", 15, "int8", 130),
        ("Tesla V100-SXM2-16GB", 16, "fp32", 15.7),
        ("NVIDIA L40S", 45, "int8w", 362.05),
        ("NVIDIA B200", 180, "bf16", 2250),
    ],
)
def test_figures_are_those_published(name: str, gib: int, precision: str, tera: float) -> None:
    found = find_gpu(name, gib * GIB)
    assert found is not None
    assert gpu_rate(found, precision) == pytest.approx(tera * 1e12, rel=0.005)


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16),
        ("NVIDIA GeForce RTX 4090 D", 24),
        ("NVIDIA GeForce RTX 3080", 12),
        ("NVIDIA GeForce RTX 3060", 8),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 10),
        ("NVIDIA RTX 6000", 24),
        ("NVIDIA", 1),
        ("", 0),
    ],
)
def test_another_device_of_a_similar_name_is_not_taken_for_one_that_is_known(name: str, gib: int) -> None:
    assert find_gpu(name, gib * GIB) is None


@pytest.mark.parametrize("name", GPUS)
def test_fewer_bits_are_never_slower(name: str) -> None:
    gpu = GPUS[name]
    order = [gpu.tflops[rate] for rate in ("fp32", "tf32", "fp16", "fp8", "int8") if rate in gpu.tflops]
    assert order == sorted(order)
    assert gpu.tflops.get("bf16", gpu.tflops["fp16"]) == gpu.tflops["fp16"]
    assert ("fp32" in gpu.tflops) != ("tf32" in gpu.tflops)
    # Bytes and operations of one unit: the ridge of every GPU since Volta lies between these.
    assert 30 < gpu.tflops["fp16"] * 1e12 / (gpu.bandwidth * 1e9) < 450


@pytest.mark.parametrize(
    ("name", "precision"), [("Tesla T4", "bf16"), ("Tesla V100-SXM2-16GB", "int8"), ("NVIDIA A10", "fp8")]
)
def test_what_a_gpu_has_no_tensor_cores_for_is_not_known(name: str, precision: str) -> None:
    found = find_gpu(name, 16 * GIB)
    assert found is not None
    assert gpu_rate(found, precision) is None


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_product_is_measured(kind: Any) -> None:
    rate = product_rate(kind, threads=1, seconds=0.05, size=256)
    assert 1e7 < rate < 1e14


def test_larger_products_take_their_operations_into_account() -> None:
    """A rate, not a time: eight times the work at about the same rate."""
    small, large = (product_rate("float32", threads=1, seconds=0.2, size=size) for size in (128, 256))
    assert 0.1 < large / small < 10


def test_a_copy_is_measured() -> None:
    assert 1e7 < copy_rate(threads=2, seconds=0.05, nbytes=2**22) < 1e13


def row(precision: str, *, system: System = "latentrt", on_gpu: bool = False, **precisions: str) -> Row:
    case = Case(
        subject=Subject(system=system, precision=precision, backend="auto", width=64, height=64, batch=1),
        settings=Settings(sampler="Euler", schedule=None, steps=1, guidance=1.0),
    )
    return Row(case=case, on_gpu=on_gpu, precisions=precisions)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured, at rates that tell kinds apart."""
    asked: list[str] = []

    def rate(kind: str, *, threads: int) -> float:
        asked.append(f"{kind} {threads}")
        return {"float32": 1e11, "int8": 4e11}[kind]

    def copied(*, threads: int) -> float:
        asked.append(f"copy {threads}")
        return 2e10

    monkeypatch.setattr(peaks, "product_rate", rate)
    monkeypatch.setattr(peaks, "copy_rate", copied)
    return asked


def test_a_processor_is_measured_once_for_each_kind_of_number(measured: list[str]) -> None:
    find = peak_finder(None, "a processor", threads=2)
    assert measured == []
    found = [find(row(name)) for name in ("fp32", "fp16", "int8w", "int8", "fp32", "bf16")]
    assert [peak.flops for peak in found] == [1e11, 1e11, 1e11, 4e11, 1e11, None]
    assert {(peak.device, peak.bandwidth) for peak in found} == {("a processor", 2e10)}
    assert sorted(measured) == ["copy 2", "float32 2", "int8 2"]
    assert "measured" in found[0].source


def test_the_precision_is_that_of_the_network_and_not_the_one_asked_for(measured: list[str]) -> None:
    find = peak_finder(H200, "a processor")
    assert find(row("int8", unet="fp32")).flops == 1e11
    assert find(row("fp16", on_gpu=True, unet="fp32")).flops == pytest.approx(494.5e12)


def test_half_precision_of_pytorch_on_the_cpu_has_no_peak_of_onnx_runtimes(measured: list[str]) -> None:
    find = peak_finder(None, "a processor")
    assert find(row("fp16", system="diffusers")).flops is None
    assert find(row("fp32", system="torch-compile")).flops == 1e11
    assert find(row("fp16", system="optimum")).flops == 1e11


def test_a_gpu_that_is_not_listed_says_so() -> None:
    peak = gpu_peak(dataclasses.replace(H200, name="NVIDIA Unheard Of"), "fp16")
    assert (peak.device, peak.flops, peak.bandwidth) == ("NVIDIA Unheard Of", None, None)
    assert "not among" in peak.source
    assert gpu_peak(H200, "fp16").bandwidth == 4.8e12
    assert gpu_peak(None, "fp16").flops is None
