"""Group norm, with the SiLU after it, as ONNX Runtime's operator for CUDA."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .graph_matching import MICROSOFT, consumer, finished, initializer, producer, replace_with
from .lazy_weight import derived


class GroupNormFusionPass(InPlacePass):
    """Replace group norm, by its InstanceNormalization form or as one operator, by one that also does the SiLU.

        before   Reshape to (b, groups, -1) -> InstanceNormalization by one and zero -> Reshape back
                 -> Mul by gamma -> Add of beta, or GroupNormalization; [-> QuickGelu with alpha 1]
        after    com.microsoft.GroupNorm(x, gamma, beta; groups, activation, channels_last = 0)

    Only the CUDA provider has a kernel, for (b, h, w, c) and an even number of channels a group: ChannelsLastPass has
    to follow. It sums in float32 and reads gamma and beta in float32, also where x is float16.

    Requires four axes, and SiluFusionPass before. Equal up to rounding.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        modified = False
        for node in list(model.graph):
            match = _MATCHERS[node.op_type](node) if node.op_type in _MATCHERS else None
            if match is not None:
                _fuse(model.graph, match)
                modified = True
        return finished(model, modified=modified)


@dataclass(frozen=True)
class _GroupNorm:
    source: ir.Value
    gamma: ir.Value
    beta: ir.Value
    groups: int
    epsilon: float
    end: ir.Node


def _decomposed(norm: ir.Node) -> _GroupNorm | None:
    grouping = producer(norm.inputs[0], "Reshape")
    back = consumer(norm.outputs[0], "Reshape")
    scaled = consumer(back.outputs[0], "Mul") if back is not None else None
    end = consumer(scaled.outputs[0], "Add") if scaled is not None else None
    source = grouping.inputs[0] if grouping is not None else None
    grouped = norm.inputs[0].shape if norm.inputs[0] is not None else None
    if scaled is None or end is None or source is None or source.shape is None or grouped is None:
        return None
    channels, groups = _channels(source), grouped[1]
    if not channels or not isinstance(groups, int) or channels % (2 * groups):
        return None
    gamma, beta = _of_channels(scaled, channels), _of_channels(end, channels)
    if gamma is None or beta is None or not _holds(norm.inputs[1], 1) or not _holds(norm.inputs[2], 0):
        return None
    return _GroupNorm(source, gamma, beta, groups, norm.attributes["epsilon"].as_float(), end)


def _native(norm: ir.Node) -> _GroupNorm | None:
    source, gamma, beta = norm.inputs
    groups = norm.attributes["num_groups"].as_int()
    if source is None or gamma is None or beta is None or gamma.const_value is None or beta.const_value is None:
        return None
    channels = _channels(source)
    if not channels or channels % (2 * groups) or gamma.const_value.size != channels:
        return None
    return _GroupNorm(source, gamma, beta, groups, norm.attributes["epsilon"].as_float(), norm)


_MATCHERS = {"InstanceNormalization": _decomposed, "GroupNormalization": _native}


def _channels(value: ir.Value) -> int:
    """Of (b, c, h, w); 0 where they are not known, or the shape is another."""
    channels = value.shape[1] if value.shape is not None and len(value.shape) == 4 else None
    return channels if isinstance(channels, int) else 0


def _of_channels(node: ir.Node, channels: int) -> ir.Value | None:
    """The initializer of one number a channel that a node multiplies by or adds."""
    for value in node.inputs:
        if value is not None and value.const_value is not None and value.const_value.size == channels:
            return value
    return None


def _holds(value: ir.Value | None, number: float) -> bool:
    """Whether a small constant is `number` everywhere."""
    tensor = value.const_value if value is not None else None
    return tensor is not None and bool(np.all(tensor.numpy() == number))


def _fuse(graph: ir.Graph, match: _GroupNorm) -> None:
    end, activation = match.end, consumer(match.end.outputs[0], "QuickGelu")
    silu = activation is not None and activation.attributes["alpha"].as_float() == 1.0
    fused = ir.node(
        "GroupNorm",
        [match.source, _float_vector(graph, match.gamma), _float_vector(graph, match.beta)],
        attributes={"groups": match.groups, "epsilon": match.epsilon, "activation": int(silu), "channels_last": 0},
        domain=MICROSOFT,
    )
    replace_with(graph, activation if activation is not None and silu else end, fused)


def _float_vector(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """An initializer as float32 of one axis, under its own name with `_vector`."""
    tensor = value.const_value
    assert tensor is not None
    flat = derived(
        [tensor],
        lambda array: array.reshape(-1).astype(np.float32),
        shape=[tensor.size],
        dtype=ir.DataType.FLOAT,
        name=f"{value.name}_vector",
    )
    return initializer(graph, flat)
