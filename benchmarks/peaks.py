"""The peak that a row is held against: its GPU's as published, or its processor's as measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

from latentrt.runtime.machine import Gpu

from .cpu_peaks import COPY_BYTES, PRODUCT, Kind, copy_rate, product_rate
from .device_peaks import find_gpu, gpu_rate
from .results_file import Peak, Row

# What ONNX Runtime's kernels on the CPU compute a precision in: half precision is widened, int8w keeps floats.
_CPU_KINDS: Mapping[str, Kind] = {
    "fp32": "float32",
    "fp16": "float32",
    "mixed": "float32",
    "int8w": "float32",
    "int8": "int8",
}
# They run PyTorch, whose half precision on the CPU has kernels of its own.
_PYTORCH = ("diffusers", "torch-compile")


def peak_finder(gpu: Gpu | None, cpu: str, *, threads: int = 0) -> Callable[[Row], Peak]:
    """A function that gives the peak of a row. The processor is measured when the first row asks for it, once.

    Call it when nothing else runs: what it measures is what later shares are of.

    Args:
        gpu: the one that rows on a GPU ran on.
        cpu: name of the processor.
        threads: that each system may use; 0 for all.
    """

    @cache
    def rate(kind: Kind) -> float:
        return product_rate(kind, threads=threads)

    @cache
    def bandwidth() -> float:
        return copy_rate(threads=threads)

    def cpu_peak(precision: str, *, pytorch: bool) -> Peak:
        kind = None if pytorch and precision != "fp32" else _CPU_KINDS.get(precision)
        moved = f"a copy of {COPY_BYTES >> 20} MiB by NumPy"
        if kind is None:
            return Peak(device=cpu, flops=None, bandwidth=bandwidth(), source=f"measured: {moved}")
        product = f"a {kind} product of {PRODUCT} x {PRODUCT} matrices in ONNX Runtime"
        return Peak(device=cpu, flops=rate(kind), bandwidth=bandwidth(), source=f"measured: {product}; {moved}")

    def find(row: Row) -> Peak:
        precision = row.precisions.get("unet", row.case.subject.precision)
        if row.on_gpu:
            return gpu_peak(gpu, precision)
        return cpu_peak(precision, pytorch=row.case.subject.system in _PYTORCH)

    return find


def gpu_peak(gpu: Gpu | None, precision: str) -> Peak:
    """The published peak of a GPU for networks in a precision; without figures where it is not listed."""
    if gpu is None:
        return Peak(device="an unknown GPU", flops=None, bandwidth=None, source="the driver does not name the GPU")
    found = find_gpu(gpu.name, gpu.memory_bytes)
    if found is None:
        return Peak(device=gpu.name, flops=None, bandwidth=None, source="not among the GPUs whose figures are known")
    return Peak(
        device=gpu.name,
        flops=gpu_rate(found, precision),
        bandwidth=found.bandwidth * 1e9,
        source="NVIDIA's data sheet: dense, with float32 accumulation",
    )
