"""What an engine computes in and what memory it takes, read from the builder rather than believed."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from latentrt.runtime.engine_sidecar import PrecisionReadout
from latentrt.runtime.errors import BuildError

# The type that an engine of a precision must mostly compute in, and the least part of its weights. An int8 plan
# keeps sensitive layers in half on purpose, so there the majority is asked for; a mixed graph keeps in float32
# whatever overflows, which may be most of it.
EXPECTED: Mapping[str, tuple[str, float]] = {
    "fp32": ("Float", 0.9),
    "fp16": ("Half", 0.9),
    "mixed": ("Half", 0.1),
    "bf16": ("Bf16", 0.9),
    "int8": ("Int8", 0.5),
    "fp8": ("Fp8", 0.5),
}
_WEIGHTED = {"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM"}
_TRANSPARENT = {"SHUFFLE", "CAST", "IDENTITY", "SQUEEZE", "UNSQUEEZE"}
_MEMORY = {
    "activation_bytes": r"Total Activation Memory: (\d+) bytes",
    "scratch_bytes": r"Max Scratch Memory: (\d+) bytes",
    "weight_bytes": r"Total Weights Memory: (\d+) bytes",
}


def read_precisions(trt: Any, network: Any) -> PrecisionReadout:
    """The types that the layers with weights compute in, from the parsed network.

    A strongly typed network states every layer's type and the builder may not change it, so these are the engine's
    types. A layer counts as Int8 or Fp8 only if both its operands come out of DequantizeLinear; one with
    dequantized weights alone computes in the wider type.
    """
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {
        layer.get_output(index).name: layer
        for layer in layers
        for index in range(layer.num_outputs)
        if layer.get_output(index) is not None
    }
    counts: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for layer in layers:
        if layer.type.name in _WEIGHTED:
            size = _weight_count(trt, layer, producers)
            if size:
                dtype = _compute_type(layer, producers)
                counts[dtype] += 1
                weights[dtype] += size
    return PrecisionReadout(layers=dict(counts), weights=dict(weights), method="types of the parsed network")


def _source(tensor: Any, producers: Mapping[str, Any]) -> Any | None:
    """The layer that a tensor's values come from, through layers that only reshape or convert."""
    layer = None if tensor is None else producers.get(tensor.name)
    while layer is not None and layer.type.name in _TRANSPARENT:
        tensor = layer.get_input(0)
        layer = None if tensor is None else producers.get(tensor.name)
    return layer


def _weight_count(trt: Any, layer: Any, producers: Mapping[str, Any]) -> int:
    if layer.type.name in ("CONVOLUTION", "DECONVOLUTION"):
        # The bindings hand out the base class; a layer's own attributes appear once it is given its real class.
        layer.__class__ = trt.IConvolutionLayer if layer.type.name == "CONVOLUTION" else trt.IDeconvolutionLayer
        kernel = int(layer.kernel.size)
        if kernel:
            return kernel
    operands = [1] if "CONVOLUTION" in layer.type.name else range(layer.num_inputs)
    total = 0
    for index in operands:
        source = _source(layer.get_input(index), producers)
        if source is not None and source.type.name == "DEQUANTIZE":
            source = _source(source.get_input(0), producers)
            if source is not None and source.type.name == "QUANTIZE":
                source = _source(source.get_input(0), producers)
        if source is not None and source.type.name == "CONSTANT":
            source.__class__ = trt.IConstantLayer
            total += math.prod(source.shape)
    return total


def _compute_type(layer: Any, producers: Mapping[str, Any]) -> str:
    stored = []
    for index in range(min(layer.num_inputs, 2)):
        source = _source(layer.get_input(index), producers)
        if source is None or source.type.name != "DEQUANTIZE":
            return type_name(layer.get_output(0).dtype.name)
        stored.append(type_name(source.get_input(0).dtype.name))
    return stored[0] if len(stored) == 2 and stored[0] == stored[1] else type_name(layer.get_output(0).dtype.name)


def type_name(name: str) -> str:
    """`Half` of TensorRT's HALF: the spelling of its engine inspector."""
    return name.capitalize()


def check_precision(component: str, precision: str, readout: PrecisionReadout) -> None:
    """Refuse an engine that does not compute in what its name says.

    Raises:
        BuildError: gives the share of each type.
    """
    if precision not in EXPECTED:
        return
    dtype, least = EXPECTED[precision]
    if not readout.share(dtype) >= least:
        shares = ", ".join(f"{name} {readout.share(name):.1%}" for name in sorted(readout.weights)) or "no weights"
        raise BuildError(
            f"{component}: expected an {precision} engine to hold at least {least:.0%} of its weights in {dtype} "
            f"layers, got {shares}. The graph's own types decide: export {precision} again."
        )


def read_memory(messages: Iterable[str]) -> dict[str, int]:
    """The memory figures that the builder states in its log, in bytes; those it does not state are absent."""
    found: dict[str, int] = {}
    for message in messages:
        for name, pattern in _MEMORY.items():
            if match := re.search(pattern, message):
                found[name] = max(found.get(name, 0), int(match[1]))
    return found


def inspector_types(text: str) -> dict[str, int]:
    """Layers of a built engine by the type of their first output, from the engine inspector's JSON."""
    counts: Counter[str] = Counter()
    for layer in json.loads(text).get("Layers", []):
        outputs = layer.get("Outputs", []) if isinstance(layer, dict) else []
        described = str(outputs[0].get("Format/Datatype", "")) if outputs else ""
        match = re.search(r"(half|fp16|float|fp32|int8|fp8|bf16|int32|int64|bool)", described, re.I)
        alias = {"fp16": "Half", "fp32": "Float"}
        counts[alias.get(match[1].lower(), match[1].capitalize()) if match else "unstated"] += 1
    return dict(counts)
