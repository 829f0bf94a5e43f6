"""What of a GPU's memory a pipeline takes, and for what."""

from __future__ import annotations

from typing import Any

from latentrt.runtime.components import Components
from latentrt.runtime.residency import weight_bytes
from latentrt.runtime.vram import VramMeter

_ARENAS = "ONNX Runtime does not say what of its arenas is scratch memory, inputs and outputs"


def split_vram(components: Components, meter: VramMeter) -> dict[str, Any]:
    """What is known of the memory that open networks take: fields of `results.Vram`, which takes pydantic to import.

    Weights, scratch memory and buffers are what TensorRT's engines and their lanes were given. What else the process
    holds, as NVML counts it, is CUDA's context with the libraries. Of networks that run in ONNX Runtime's CUDA
    provider only the files of the weights are known.

    Args:
        meter: on since before the first of them was opened.
    """
    peak, now, host = meter.peak, meter.now, components.host
    backends = {components[name].backend for name in components.precisions()}
    if backends <= {"onnxruntime CPU"}:
        return {"reason": "runs on the CPU"}
    peaks = {"peak": peak.nbytes, "peak_of": peak.of}
    if "onnxruntime CUDA" in backends or host is None:
        weights = weight_bytes(components.bundle, components.precision)
        return {**peaks, "weights": weights, "reason": peak.reason or _ARENAS}
    held = host.memory
    taken = {**peaks, "weights": held.weights, "activation": held.activation, "io": held.io}
    if held.weights is None:
        return {**taken, "reason": "an engine's sidecar does not say what its weights take; build it again"}
    if now.nbytes is None:
        return {**taken, "reason": now.reason}
    return {**taken, "context": max(now.nbytes - held.weights - held.activation - held.io, 0)}
