"""Precisions by name: which a network takes in a run of another, and where those that are missing come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

# Made by calibration; the others by the export. Of int8w the weights alone are in int8, and it computes in half.
QUANTIZED = ("int8", "fp8", "int8w")
# The networks that calibration is for. Without the first there is no quantized run.
CALIBRATED = ("unet", "vae_decoder")
# Of the networks that are not quantized in such a run, best first: what engines are fastest in.
_BESIDE_QUANTIZED = ("fp16", "mixed", "fp32")
# Where no precision is asked for, the first of these that is whole.
_ORDER = {name: rank for rank, name in enumerate(("fp32", "fp16", "mixed", "bf16", *QUANTIZED))}
# What `latentrt optimize` rewrites for a provider of ONNX Runtime, the one to take first. The CPU computes float16 in
# float32 and converts the weights at every run: such a graph would be slower than the fp32 one, its weights no smaller.
OPTIMIZED: Mapping[str, tuple[str, ...]] = {"cpu": ("fp32", *QUANTIZED), "cuda": ("fp16", "mixed", "fp32")}
# Of quantized graphs, calibration itself makes one for the CPU, with the integers of TensorRT's. The one that is laid
# out for the kernels that the CPU has is made from it, and has a name beside it.
CPU_KERNELS = "cpu-kernels"
# By provider of ONNX Runtime the targets whose graphs it takes, best first.
TARGETS_OF: Mapping[str, tuple[str, ...]] = {"cpu": (CPU_KERNELS, "cpu"), "cuda": ("cuda",)}


def rank(precision: str) -> tuple[int, str]:
    """To sort precisions by, best first: what nobody has to ask for comes before what calibration has made."""
    return _ORDER.get(precision, len(_ORDER)), precision


def usable_precisions(component: str, precision: str) -> tuple[str, ...]:
    """The precisions in which a network may take part in a run of that precision, first choice first.

    In a run in fp16 the mixed graph of one whose fp16 graph would overflow. In a quantized run the U-Net is quantized;
    of the others, those that are so as well, and else the best half precision that there is. A decoder that was
    calibrated adds its noise to the U-Net's: each was held to its budget with the other as it was at the time.
    """
    if precision == "fp16":
        return ("fp16", "mixed")
    if precision in QUANTIZED and component != CALIBRATED[0]:
        return (precision, *_BESIDE_QUANTIZED)
    return (precision,)


def how_to_make(bundle: Path, component: str, precision: str) -> str:
    """The command that adds a network in a precision to a bundle."""
    if precision not in QUANTIZED:
        return f"latentrt export CHECKPOINT -o {bundle} --precision {precision}"
    if component not in CALIBRATED:
        return f"latentrt export CHECKPOINT -o {bundle} --precision {_BESIDE_QUANTIZED[0]}"
    other = "" if component == CALIBRATED[0] else f" --component {component}"
    return f"latentrt calibrate {bundle} --precision {precision}{other}"
