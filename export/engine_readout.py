"""What an engine computes in and what memory it takes, read from the builder rather than believed."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentrt.runtime.engine_sidecar import PrecisionReadout
from latentrt.runtime.errors import BuildError
from latentrt.runtime.precisions import QUANTIZED

from .engine_flops import COUNTED, layer_flops


@dataclass(frozen=True)
class Expectation:
    """The type that an engine of a precision must compute in: the least part of its weights and of its operations."""

    dtype: str
    weights: float
    flops: float


# An int8 plan keeps sensitive layers in half on purpose, and attention's products, which have no weights; a mixed
# graph keeps in float32 whatever overflows, which may be most of it. The operations tell what the weights do not: a
# U-Net whose attention runs in float32 has all its weights in half.
EXPECTED: Mapping[str, Expectation] = {
    "fp32": Expectation("Float", 0.9, 0.9),
    "fp16": Expectation("Half", 0.9, 0.9),
    "mixed": Expectation("Half", 0.1, 0.0),
    "bf16": Expectation("Bf16", 0.9, 0.9),
    "int8": Expectation("Int8", 0.5, 0.25),
    "fp8": Expectation("Fp8", 0.5, 0.25),
    "int8w": Expectation("Int8w", 0.5, 0.25),
}
_TRANSPARENT = {"SHUFFLE", "CAST", "IDENTITY", "SQUEEZE", "UNSQUEEZE"}
_MEMORY = {
    "activation_bytes": r"Total Activation Memory: (\d+) bytes",
    "scratch_bytes": r"Max Scratch Memory: (\d+) bytes",
    "weight_bytes": r"Total Weights Memory: (\d+) bytes",
}


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies: its name and kind, the type it computes in, its weights and its operations."""

    name: str
    kind: str
    precision: str
    weights: int
    flops: int


def read_layers(trt: Any, network: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Layer, ...]:
    """The convolutions and matrix products of a parsed network, with the types that they compute in.

    A strongly typed network states every layer's type and the builder may not change it, so these are the engine's
    types. A layer counts as Int8 or Fp8 only if both its operands come out of DequantizeLinear; one with
    dequantized weights alone computes in the wider type, and counts as Int8w.

    Args:
        network: its inputs are given the shapes for good, so it is not one to build from.
        shapes: by input.
    """
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        tensor.shape = shapes.get(tensor.name, tuple(tensor.shape))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {
        layer.get_output(index).name: layer
        for layer in layers
        for index in range(layer.num_outputs)
        if layer.get_output(index) is not None
    }
    return tuple(
        Layer(
            name=layer.name,
            kind=layer.type.name.lower(),
            precision=_compute_type(layer, producers),
            weights=_weight_count(trt, layer, producers),
            flops=layer_flops(trt, layer),
        )
        for layer in layers
        if layer.type.name in COUNTED
    )


def precisions_of(layers: Iterable[Layer]) -> PrecisionReadout:
    """Layers with weights, and their weights, by the type that they compute in."""
    counts: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for layer in layers:
        if layer.weights:
            counts[layer.precision] += 1
            weights[layer.precision] += layer.weights
    return PrecisionReadout(layers=dict(counts), weights=dict(weights), method="types of the parsed network")


def flops_shares(layers: Iterable[Layer]) -> dict[str, float]:
    """The part of all operations that is done in each type; empty if there are none."""
    flops: Counter[str] = Counter()
    for layer in layers:
        flops[layer.precision] += layer.flops
    total = flops.total()
    return {name: count / total for name, count in sorted(flops.items())} if total else {}


def layer_report(
    layers: Sequence[Layer], shapes: Mapping[str, tuple[int, ...]], *, inspector: str | None = None
) -> str:
    """The layers as JSON text, to be kept beside the engine.

    Args:
        shapes: by input, for which the operations were counted.
        inspector: JSON of the engine inspector, where a GPU could load the engine.
    """
    report = {
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "flops": sum(layer.flops for layer in layers),
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "engine": None if inspector is None else json.loads(inspector),
    }
    return json.dumps(report, indent=1)


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
    stored = [_stored_type(layer.get_input(index), producers) for index in range(min(layer.num_inputs, 2))]
    wide = type_name(layer.get_output(0).dtype.name)
    if len(stored) < 2 or stored[1] is None:
        return wide
    if stored[0] is None:
        return f"{stored[1]}w"
    return stored[0] if stored[0] == stored[1] else wide


def _stored_type(tensor: Any, producers: Mapping[str, Any]) -> str | None:
    """The type that a tensor is dequantized from; None if it is not."""
    source = _source(tensor, producers)
    if source is None or source.type.name != "DEQUANTIZE":
        return None
    return type_name(source.get_input(0).dtype.name)


def type_name(name: str) -> str:
    """`Half` of TensorRT's HALF: the spelling of its engine inspector."""
    return name.capitalize()


def check_precision(component: str, precision: str, readout: PrecisionReadout, flops: Mapping[str, float]) -> None:
    """Refuse an engine that does not compute in what its name says.

    Args:
        flops: share of the operations by type.

    Raises:
        BuildError: gives the share of each type.
    """
    expected = EXPECTED.get(precision)
    if expected is None:
        return
    weights = {name: readout.share(name) for name in readout.weights}
    for what, least, shares in (("weights", expected.weights, weights), ("operations", expected.flops, flops)):
        if not shares.get(expected.dtype, 0.0) >= least:
            found = ", ".join(f"{name} {shares[name]:.1%}" for name in sorted(shares)) or f"no {what}"
            again = "Calibrate" if precision in QUANTIZED else f"Export {precision}"
            raise BuildError(
                f"{component}: expected an {precision} engine to have at least {least:.0%} of its {what} in "
                f"{expected.dtype} layers, got {found}. The graph's own types decide. {again} again."
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
