"""Where in a graph the channels of a layer's input can be divided by a vector, and at what cost.

The layers that read the tensor multiply their weights by the same vector, so the network computes what it did before:
SmoothQuant, Xiao et al. 2022 (arXiv 2211.10438). Where the channels of the tensor come from weights by nothing but
products and sums, the division goes into those weights and the graph stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from latentrt.export.attention_pattern import Attention, find_attention
from latentrt.export.graph_matching import permutation, producer
from latentrt.export.graph_values import is_weight

from .layers import Layer, groups
from .quantize_pass import CHANNEL_AXIS

# norm: scale and bias of the normalization before; value: an attention's value projection, for what it puts out;
# geglu: the half of a projection that a gate multiplies; mul: one multiplication; split: the same, of a concatenation
# whose branches are each divided by one number.
How = Literal["norm", "value", "geglu", "mul", "split"]


@dataclass(frozen=True)
class Stretch:
    """The part of an initializer that makes the channels of a tensor: along `axis`, from `start`."""

    name: str
    axis: int
    start: int = 0


@dataclass(frozen=True)
class Site:
    """How the channels of a tensor that layers read are divided.

    Attributes:
        how: see `How`.
        channels: of the tensor.
        divided: what is divided in place of the tensor; empty where there has to be a multiplication.
        branches: channels of every tensor that a split's concatenation joins.
    """

    how: How
    channels: int
    divided: tuple[Stretch, ...] = ()
    branches: tuple[int, ...] = ()

    @property
    def free(self) -> bool:
        """Whether it costs no node."""
        return bool(self.divided)


def smoothing_sites(model: ir.Model, layers: Sequence[Layer]) -> dict[str, Site]:
    """The sites of the groups of layers of which at least one can be quantized, by group.

    Groups that read an input of the graph have none. What a network is told is divided by nothing before it, and the
    one such tensor with layers wide enough, the text, is read by layers whose outliers are tokens, not channels.

    Args:
        model: the fp32 graph of a U-Net.
        layers: of it.
    """
    sites = sites_of(model)
    return {
        group: sites[group]
        for group, members in groups(layers).items()
        if group in sites and any(layer.quantizable for layer in members)
    }


def sites_of(model: ir.Model) -> dict[str, Site]:
    """All sites of a graph, by group."""
    attentions = {found.output.source: found for found in find_attention(model) if found.output is not None}
    sites = {}
    for group, nodes in readers_of(model.graph).items():
        data = nodes[0].inputs[0]
        assert data is not None
        if data.producer() is not None and all(_smoothable(node) for node in nodes):
            sites[group] = _site(data, nodes, attentions)
    return sites


def readers_of(graph: ir.Graph) -> dict[str, tuple[ir.Node, ...]]:
    """The weighted operators that read one tensor, by the weight of the first: the groups of `layers.groups`."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        if node.domain == "" and node.op_type in (*CHANNEL_AXIS, "Gemm") and is_weight(node.inputs[1]):
            data = node.inputs[0]
            assert data is not None
            found.setdefault(data, []).append(node)
    return {str(nodes[0].inputs[1].name): tuple(nodes) for nodes in found.values() if nodes[0].inputs[1] is not None}


def input_axis(node: ir.Node) -> int:
    """The axis of the input channels in the weight of a Conv or MatMul."""
    return 1 - CHANNEL_AXIS[node.op_type]


def _smoothable(node: ir.Node) -> bool:
    return node.op_type in CHANNEL_AXIS and node.attributes.get_int("group", 1) == 1


def _site(data: ir.Value, nodes: Sequence[ir.Node], attentions: Mapping[ir.Value, Attention]) -> Site:
    weight = nodes[0].inputs[1]
    assert weight is not None
    assert weight.shape is not None
    channels = int(weight.shape.numpy()[input_axis(nodes[0])])
    rank = 4 if nodes[0].op_type == "Conv" else len(data.shape or ())
    axis = 1 if nodes[0].op_type == "Conv" else rank - 1
    if _read_only_by(data, nodes):
        folds: tuple[tuple[How, tuple[Stretch, ...]], ...] = (
            ("norm", _norm(data, axis, rank, channels)),
            ("value", _values(attentions.get(data), channels)),
            ("geglu", _gated(data, channels)),
        )
        for how, divided in folds:
            if divided:
                return Site(how, channels, divided)
    branches = _branches(data, axis, rank)
    if sum(branches) == channels:
        return Site("split", channels, branches=branches)
    return Site("mul", channels)


def _norm(data: ir.Value, axis: int, rank: int, channels: int) -> tuple[Stretch, ...]:
    """Scale and bias of the normalization that `data` comes from, if only moves lie between."""
    node = data.producer()
    while node is not None and node.op_type in ("Transpose", "Reshape"):
        source, before = node.inputs[0], _axis_before(node, axis)
        if source is None or before is None or not _read_only_by(source, [node]):
            return ()
        axis, rank, node = before, len(source.shape or ()), source.producer()
    if node is None:
        return ()
    if (node.op_type, axis) in (("LayerNormalization", rank - 1), ("GroupNormalization", 1)):
        return _all(_along(value, node, -1, channels) for value in node.inputs[1:3] if value is not None)
    # A group norm's own scale and bias, behind the InstanceNormalization that it is exported as.
    scaled, bias = _with_weight(node) if node.op_type == "Add" else (None, None)
    product = producer(scaled, "Mul")
    if scaled is None or product is None or not _read_only_by(scaled, [node]):
        return ()
    _, scale = _with_weight(product)
    return _all((_along(scale, product, axis - rank, channels), _along(bias, node, axis - rank, channels)))


def _values(attention: Attention | None, channels: int) -> tuple[Stretch, ...]:
    """The projection to values: each row of probabilities sums them up, channel by channel."""
    if attention is None or attention.heads * attention.width != channels:
        return ()
    projection, steps = attention.value.projection, attention.value.steps
    made = [node.outputs[0] for node in (*projection.nodes, *steps)]
    if any(value.is_graph_output() or len(value.uses()) != 1 for value in made):
        return ()
    return _rows(projection.nodes, channels, channels, 0)


def _gated(data: ir.Value, channels: int) -> tuple[Stretch, ...]:
    """The part of a projection that the rest of it gates: a * gate(b), a and b being the Split of one projection."""
    product = producer(data, "Mul")
    for value in product.inputs if product is not None else ():
        split = producer(value, "Split")
        if value is None or split is None or value.is_graph_output() or len(value.uses()) != 1:
            continue
        widths = [_last_size(part) for part in split.outputs]
        projected = split.inputs[0]
        if projected is None or not _read_only_by(projected, [split]) or widths[value.index() or 0] != channels:
            continue
        add = producer(projected, "Add")
        product_of = _with_weight(add)[0] if add is not None else projected
        matmul = producer(product_of, "MatMul")
        if matmul is None or (add is not None and not _read_only_by(matmul.outputs[0], [add])):
            continue
        nodes = (matmul,) if add is None else (matmul, add)
        return _rows(nodes, sum(widths), channels, sum(widths[: value.index()]))
    return ()


def _rows(linear: Sequence[ir.Node], outputs: int, channels: int, start: int) -> tuple[Stretch, ...]:
    """A stretch of the outputs of a MatMul and, if there are two nodes, of the Add of its bias."""
    weight = linear[0].inputs[1]
    if weight is None or not is_weight(weight) or len(weight.uses()) != 1 or _last_size(weight) != outputs:
        return ()
    biases = [_along(_with_weight(node)[1], node, -1, outputs) for node in linear[1:]]
    found = _all((Stretch(str(weight.name), 1), *biases))
    return tuple(replace(stretch, start=start) for stretch in found) if outputs >= start + channels else ()


def _branches(data: ir.Value, axis: int, rank: int) -> tuple[int, ...]:
    """Channels of the tensors that a Concat joins; empty if it does not join channels, or if one is not known."""
    concat = producer(data, "Concat")
    if concat is None or concat.attributes.get_int("axis", 0) % max(rank, 1) != axis:
        return ()
    sizes = [value.shape[axis] if value is not None and value.shape is not None else None for value in concat.inputs]
    return tuple(size for size in sizes if isinstance(size, int)) if all(isinstance(s, int) for s in sizes) else ()


def _axis_before(node: ir.Node, axis: int) -> int | None:
    """Which axis of what a Transpose or Reshape moves becomes `axis`, whole and alone."""
    if (order := permutation(node)) is not None:
        return order[axis]
    before, after = node.inputs[0], node.outputs[0]
    if node.op_type != "Reshape" or before is None or before.shape is None or after.shape is None:
        return None
    # The last axis stays what it is if its size does; the second one too, if the batch before it is the same.
    if axis == len(after.shape) - 1 and isinstance(after.shape[-1], int) and before.shape[-1] == after.shape[-1]:
        return len(before.shape) - 1
    return 1 if axis == 1 and isinstance(after.shape[1], int) and before.shape[:2] == after.shape[:2] else None


def _along(value: ir.Value | None, reader: ir.Node, axis: int, size: int) -> Stretch | None:
    """An initializer that only `reader` reads and that varies along one axis, counted from the end, of this size."""
    if value is None or not is_weight(value) or value.shape is None or len(value.uses()) != 1:
        return None
    shape = value.shape.numpy()
    if math.prod(shape) != size or len(shape) < -axis or shape[axis] != size:
        return None
    return Stretch(str(value.name), len(shape) + axis)


def _with_weight(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """What a node combines with an initializer, and that initializer; twice None if there is none."""
    left, right = node.inputs
    if is_weight(right):
        return left, right
    return (right, left) if is_weight(left) else (None, None)


def _all(stretches: Iterable[Stretch | None]) -> tuple[Stretch, ...]:
    """All of them, or none if one is missing."""
    found = tuple(stretches)
    return tuple(stretch for stretch in found if stretch is not None) if None not in found else ()


def _read_only_by(value: ir.Value, nodes: Sequence[ir.Node]) -> bool:
    return not value.is_graph_output() and set(value.consumers()) == set(nodes)


def _last_size(value: ir.Value) -> int:
    """Of the last axis; 0 if it is not known."""
    size = value.shape[-1] if value.shape is not None else 0
    return size if isinstance(size, int) else 0
