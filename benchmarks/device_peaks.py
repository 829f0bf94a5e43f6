"""What devices can do at most: NVIDIA's GPUs by name, as published; other devices' peaks are measured (`cpu_peaks`).

Figures are dense, at boost clocks, and accumulate in float32, as the runtimes do unless they are told otherwise.
Vendors advertise twice of that, with 2:4 sparsity, and for GeForce twice again, with float16 accumulation, at which
GeForce and L40 run twice as fast. In fp32 it is the rate of TF32 where the GPU has it: TensorRT, cuDNN and ONNX Runtime
round the factors of fp32 products to TF32 by default.

Sources: NVIDIA's data sheets of the A10, A30, A40, A100, B200 (HGX), H100, H200, L4, L40, L40S, T4, V100 and RTX A6000;
for GeForce and the other RTX cards the tables in the whitepapers of their architectures (GA102, version 2; Ada, version
2; RTX Blackwell; RTX Blackwell PRO), where the tensor rates follow from CUDA cores and boost clock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class GpuPeak:
    """A GPU at its best.

    Attributes:
        tflops: 10^12 operations a second, by `tf32` or `fp32`, `fp16`, `bf16`, `fp8`, `int8`; what a GPU has no tensor
            cores for is missing.
        bandwidth: of the memory, 10^9 bytes a second.
    """

    tflops: Mapping[str, float]
    bandwidth: float


def _ampere(tf32: float, fp16: float, int8: float, bandwidth: float) -> GpuPeak:
    return GpuPeak({"tf32": tf32, "fp16": fp16, "bf16": fp16, "int8": int8}, bandwidth)


def _later(tf32: float, fp16: float, eight: float, bandwidth: float) -> GpuPeak:
    """Ada, Hopper and Blackwell, whose 8-bit rates are the same for integers and floats."""
    return GpuPeak({"tf32": tf32, "fp16": fp16, "bf16": fp16, "fp8": eight, "int8": eight}, bandwidth)


def _geforce(cores: int, boost_mhz: int, bandwidth: float, *, fp8: bool = True) -> GpuPeak:
    """GeForce since Ampere: a core does a multiplication and an addition a clock; tensor cores 1, 2, 4 or 8 of these.

    TF32 as fast as the cores, float16 twice, fp8 four times (all with float32 sums), int8 eight times.
    """
    rate = 2 * cores * boost_mhz * 1e6 / 1e12
    eight_bits = {"fp8": 4 * rate, "int8": 8 * rate} if fp8 else {"int8": 8 * rate}
    return GpuPeak({"tf32": rate, "fp16": 2 * rate, "bf16": 2 * rate, **eight_bits}, bandwidth)


# By the name that CUDA and NVML give, without "NVIDIA", "Tesla" and "GeForce". The whole name has to match: a
# laptop's, a MIG slice's or an export model's (4090 D) is another device.
GPUS: Mapping[str, GpuPeak] = {
    "V100-SXM2-16GB": GpuPeak({"fp32": 15.7, "fp16": 125}, 900),
    "V100-SXM2-32GB": GpuPeak({"fp32": 15.7, "fp16": 125}, 900),
    "V100-PCIE-16GB": GpuPeak({"fp32": 14, "fp16": 112}, 900),
    "V100-PCIE-32GB": GpuPeak({"fp32": 14, "fp16": 112}, 900),
    "T4": GpuPeak({"fp32": 8.1, "fp16": 65, "int8": 130}, 320),
    "A10": _ampere(62.5, 125, 250, 600),
    "A30": _ampere(82, 165, 330, 933),
    "A40": _ampere(74.8, 149.7, 299.3, 696),
    "A100-SXM4-40GB": _ampere(156, 312, 624, 1555),
    "A100-PCIE-40GB": _ampere(156, 312, 624, 1555),
    "A100-SXM4-80GB": _ampere(156, 312, 624, 2039),
    "A100 80GB PCIe": _ampere(156, 312, 624, 1935),
    "RTX A6000": _ampere(77.4, 154.8, 309.7, 768),
    "L4": _later(60, 121, 242.5, 300),
    "L40": _later(90.5, 181.05, 362, 864),
    "L40S": _later(183, 362.05, 733, 864),
    "RTX 6000 Ada Generation": _later(182.1, 364.2, 728.5, 960),
    "H100 80GB HBM3": _later(494.5, 989.5, 1979, 3350),
    "H100 PCIe": _later(378, 756.5, 1513, 2000),
    "H100 NVL": _later(417.5, 835.5, 1670.5, 3900),
    "H200": _later(494.5, 989.5, 1979, 4800),
    "H200 NVL": _later(417.5, 835.5, 1670.5, 4800),
    "B200": _later(1100, 2250, 4500, 7700),
    "RTX PRO 6000 Blackwell Workstation Edition": _later(251.9, 503.8, 1007.6, 1792),
    "RTX PRO 6000 Blackwell Max-Q Workstation Edition": _later(219.5, 438.9, 877.8, 1792),
    "RTX 3060": _geforce(3584, 1777, 360, fp8=False),
    "RTX 3060 Ti": _geforce(4864, 1665, 448, fp8=False),
    "RTX 3070": _geforce(5888, 1725, 448, fp8=False),
    "RTX 3070 Ti": _geforce(6144, 1770, 608, fp8=False),
    "RTX 3080": _geforce(8704, 1710, 760, fp8=False),
    "RTX 3080 Ti": _geforce(10240, 1665, 912, fp8=False),
    "RTX 3090": _geforce(10496, 1695, 936, fp8=False),
    "RTX 3090 Ti": _geforce(10752, 1860, 1008, fp8=False),
    "RTX 4060": _geforce(3072, 2460, 272),
    "RTX 4060 Ti": _geforce(4352, 2535, 288),
    "RTX 4070": _geforce(5888, 2475, 504),
    "RTX 4070 SUPER": _geforce(7168, 2475, 504),
    "RTX 4070 Ti": _geforce(7680, 2610, 504),
    "RTX 4070 Ti SUPER": _geforce(8448, 2610, 672),
    "RTX 4080": _geforce(9728, 2505, 717),
    "RTX 4080 SUPER": _geforce(10240, 2550, 736),
    "RTX 4090": _geforce(16384, 2520, 1008),
    "RTX 5060": _geforce(3840, 2497, 448),
    "RTX 5060 Ti": _geforce(4608, 2572, 448),
    "RTX 5070": _geforce(6144, 2512, 672),
    "RTX 5070 Ti": _geforce(8960, 2452, 896),
    "RTX 5080": _geforce(10752, 2617, 960),
    "RTX 5090": _geforce(21760, 2407, 1792),
}
# Sold under one name with memories of different sizes, chips and bandwidths: the size in GiB of the one listed above.
_LISTED_GIB: Mapping[str, int] = {"RTX 3060": 12, "RTX 3080": 10}
# Rates in which a network of a precision computes, the best that a GPU has of them. int8w computes in half precision.
_RATES: Mapping[str, tuple[str, ...]] = {
    "fp32": ("tf32", "fp32"),
    "fp16": ("fp16",),
    "mixed": ("fp16",),
    "bf16": ("bf16",),
    "int8w": ("fp16",),
    "int8": ("int8",),
    "fp8": ("fp8",),
}


def find_gpu(name: str, memory_bytes: int) -> GpuPeak | None:
    """The published figures of a GPU; None if it is not listed.

    Args:
        name: as CUDA or NVML give it, such as `NVIDIA GeForce RTX 4090`.
        memory_bytes: of the device, which tells cards of the same name apart.
    """
    short = re.sub(r"^(NVIDIA |Tesla |GeForce )*", "", name.strip())
    listed = _LISTED_GIB.get(short)
    if listed is not None and round(memory_bytes / GIB) != listed:
        return None
    return GPUS.get(short)


def gpu_rate(gpu: GpuPeak, precision: str) -> float | None:
    """Operations a second of a network in a precision; None where the GPU has no tensor cores for it."""
    rates = (gpu.tflops[name] for name in _RATES.get(precision, ()) if name in gpu.tflops)
    best = next(rates, None)
    return None if best is None else best * 1e12
