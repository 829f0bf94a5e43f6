"""Weights that may be replaced in an engine: which they are, and that the graph can supply every one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import BuildError

from .engine_config import EngineConfig
from .engine_graph import import_onnx, load_graph

# Types of weights, as ONNX and TensorRT name them; shapes and indices are of others.
_TYPES = {"FLOAT": "FLOAT", "FLOAT16": "HALF", "BFLOAT16": "BF16", "INT8": "INT8", "FLOAT8E4M3FN": "FP8"}


def refittable_weights(trt: Any, network: Any, config: EngineConfig, graph: Path) -> tuple[str, ...]:
    """The names of the weights that may be replaced; marks them where the config names some.

    Args:
        network: as it was parsed.
        graph: the ONNX file that it was parsed from.

    Raises:
        BuildError: a weight that the config names is not in the network, or the engine would lack a weight that the
            graph cannot supply under its name, with its type and number of values.
    """
    if config.refit == "individual":
        for name in config.refittable:
            if not network.mark_weights_refittable(name):
                raise BuildError(
                    f"{config.component}: expected weights named {name}, which are to be refitted, and the graph has "
                    "none. Export the component again."
                )
        return config.refittable
    if config.refit == "none" and not config.strip:
        return ()
    initializers = {tensor.name: tensor for tensor in load_graph(graph).graph.initializer}
    _check_supply(trt, network, config.component, initializers)
    if config.refit == "none":  # stripped: only the very weights that it was built from may go in
        return ()
    # Whether the network knows a name is only said by a call that would change it: here one that changes nothing.
    weights = [name for name, tensor in initializers.items() if _type_of(tensor) in _TYPES]
    return tuple(name for name in weights if network.unmark_weights_refittable(name))


def _check_supply(trt: Any, network: Any, component: str, initializers: Mapping[str, Any]) -> None:
    """Every constant of the network that holds numbers, not shapes, is an initializer of the graph."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        dtype = layer.get_output(0).dtype.name if layer.type.name == "CONSTANT" else ""
        if dtype not in _TYPES.values():
            continue
        layer.__class__ = trt.IConstantLayer
        held = initializers.get(layer.name)
        count = math.prod(layer.shape)
        if held is None or (_TYPES.get(_type_of(held)), math.prod(held.dims)) != (dtype, count):
            found = "none of that name" if held is None else f"{_type_of(held).lower()} {list(held.dims)}"
            raise BuildError(
                f"{component}: expected the graph to hold all weights of an engine that is built without them, got "
                f"{found} for {layer.name} ({dtype.capitalize()}, {count} values). Build without --strip and --refit."
            )


def _type_of(tensor: Any) -> str:
    return str(import_onnx().TensorProto.DataType.Name(tensor.data_type))
