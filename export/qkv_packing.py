"""Project queries, keys and values with one MatMul."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .attention_pattern import Attention, Operand, Projection, data_input, find_attention
from .lazy_weight import derived
from .weights import Values

PACKED = "latentrt.packed"


@dataclass(frozen=True)
class PackedPart:
    """A parameter inside a packed one: columns `start` to `stop` of the last axis are its own, times `factor`."""

    name: str
    start: int
    stop: int
    factor: float = 1.0


class PackProjectionsPass(InPlacePass):
    """Replace the projections of one input by one MatMul and a Split.

        before   q = MatMul(x, Wq), k = MatMul(x, Wk), v = MatMul(x, Wv)      [each with an Add of a bias]
        after    q, k, v = Split(MatMul(x, [Wq Wk Wv]))                       [with one Add]

    Cross-attention's keys and values are packed in the same way. The packed weight is called
    `<module>.to_qkv.weight` or `.to_kv.weight` and computed when it is written; `packed_parameters` says what it holds.

    Every column is the same sum of products as before: equal bit for bit where the wider product is summed in the same
    order, as in ONNX Runtime.

    For ONNX Runtime on the CPU it changes nothing that can be measured (transformer blocks of SD 1.5), and
    TensorRT-RTX merges the products by itself, attention fused with and without; there, the Split of cross-attention's
    keys and values even costs two copies a block. It is for runtimes that run the graph as it is written.

    Args:
        fold_scale: also multiply the queries' columns (in cross-attention the keys') by the attention's scale, and
            remove the multiplications of Q and K. Rounds every weight once more, except where the scale is a power of
            two (heads of 16, 64, 256): relative L2 of 7e-7 over a U-Net in fp32. A parameter that is refitted then
            has to be multiplied by its `PackedPart.factor`.
    """

    def __init__(self, *, fold_scale: bool = False) -> None:
        super().__init__()
        self.fold_scale = fold_scale

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        packed = dict(packed_parameters(model))
        before = len(packed)
        for attention in find_attention(model):
            operands = [attention.query, attention.key, attention.value][0 if attention.is_self else 1 :]
            if not attention.name or not _can_pack([operand.projection for operand in operands]):
                continue
            factors = [1.0] * len(operands)
            if self.fold_scale and all(_alone(operand) for operand in (attention.query, attention.key)):
                factors[0] = attention.scale
                _remove_scales(model.graph, attention)
            packed |= _pack(model.graph, [operand.projection for operand in operands], factors)
        if packed:
            parts = {name: [asdict(part) for part in of] for name, of in packed.items()}
            model.graph.metadata_props[PACKED] = json.dumps(parts, sort_keys=True)
        return PassResult(model, modified=len(packed) > before)


def _remove_scales(graph: ir.Graph, attention: Attention) -> None:
    for node in (*attention.query.scales, *attention.key.scales):
        source = data_input(node)
        if source is None:
            continue
        constants = [value for value in node.inputs if value is not None and value is not source]
        node.outputs[0].replace_all_uses_with(source)
        graph.remove(node, safe=True)
        _drop_unread(graph, constants)


def _drop_unread(graph: ir.Graph, values: Sequence[ir.Value]) -> None:
    for value in values:
        if not value.uses():
            graph.initializers.pop(str(value.name), None)


def packed_parameters(model: ir.Model) -> Mapping[str, tuple[PackedPart, ...]]:
    """What the packed initializers of a graph hold, by their names; also of a graph that was saved and loaded."""
    held = json.loads(model.graph.metadata_props.get(PACKED, "{}"))
    return {name: tuple(PackedPart(**part) for part in parts) for name, parts in held.items()}


def _can_pack(projections: Sequence[Projection]) -> bool:
    first = projections[0]
    return (
        all(projection.source is first.source for projection in projections)
        and len({projection.bias is None for projection in projections}) == 1
        and len({(projection.weight.dtype, projection.sizes) for projection in projections}) == 1
        and len({projection.nodes for projection in projections}) == len(projections)
        and not any(node.outputs[0].is_graph_output() for projection in projections for node in projection.nodes)
    )


def _alone(operand: Operand) -> bool:
    """Whether nothing else reads the projection or what is made of it."""
    values = [operand.projection.output, *(node.outputs[0] for node in operand.steps)]
    return all(len(value.uses()) == 1 for value in values)


def _pack(
    graph: ir.Graph, projections: Sequence[Projection], factors: Sequence[float]
) -> dict[str, tuple[PackedPart, ...]]:
    """Put one MatMul, [Add] and Split in the place of several; what the new initializers hold."""
    first = projections[0]
    packed = {}
    weight, parts = _packed_initializer(graph, [projection.weight for projection in projections], factors)
    packed[str(weight.name)] = parts
    name = str(weight.name).removesuffix(".weight")
    dtype, width = first.output.type, sum(projection.sizes[1] for projection in projections)
    shape = None if first.output.shape is None else ir.Shape([*list(first.output.shape)[:-1], width])
    matmuls = {projection.nodes[0] for projection in projections}
    place = next(node for node in graph if node in matmuls)
    nodes = [_node("MatMul", [first.source, weight], name, dtype, shape)]
    biases = [projection.bias for projection in projections if projection.bias is not None]
    if biases:
        bias, parts = _packed_initializer(graph, biases, factors)
        packed[str(bias.name)] = parts
        nodes.append(_node("Add", [nodes[0].outputs[0], bias], f"{name}.biased", dtype, shape))
    split = _split(nodes[-1].outputs[0], len(projections), f"{name}.split")
    graph.insert_before(place, [*nodes, split])
    for projection, output in zip(projections, split.outputs, strict=True):
        output.type, output.shape = projection.output.type, projection.output.shape
        projection.output.replace_all_uses_with(output)
        for node in reversed(projection.nodes):
            graph.remove(node, safe=True)
    _drop_unread(graph, [*(projection.weight for projection in projections), *biases])
    return packed


def _node(
    op_type: str, inputs: Sequence[ir.Value], name: str, dtype: ir.TypeProtocol | None, shape: ir.Shape | None
) -> ir.Node:
    node = ir.node(op_type, inputs, name=name)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{name}.output", dtype, shape
    return node


def _split(value: ir.Value, count: int, name: str) -> ir.Node:
    node = ir.node("Split", [value], attributes={"axis": -1, "num_outputs": count}, num_outputs=count, name=name)
    for index, output in enumerate(node.outputs):
        output.name = f"{name}_{index}"
    return node


def _packed_initializer(
    graph: ir.Graph, values: Sequence[ir.Value], factors: Sequence[float]
) -> tuple[ir.Value, tuple[PackedPart, ...]]:
    """Initializers side by side in one, each times its factor."""
    tensors = [value.const_value for value in values if value.const_value is not None]
    shapes = [tensor.shape.numpy() for tensor in tensors]
    stops = list(accumulate(shape[-1] for shape in shapes))
    parts = tuple(
        PackedPart(str(value.name), start, stop, factor)
        for value, start, stop, factor in zip(values, [0, *stops], stops, factors, strict=False)
    )

    def side_by_side(*arrays: Values) -> Values:
        scaled = (
            array if factor == 1 else array * array.dtype.type(factor)
            for array, factor in zip(arrays, factors, strict=True)
        )
        return np.concatenate(list(scaled), axis=-1)

    name = packed_name([part.name for part in parts])
    shape = (*shapes[0][:-1], stops[-1])
    packed = derived(tensors, side_by_side, shape=shape, dtype=tensors[0].dtype, name=name)
    value = ir.Value(name=name, type=ir.TensorType(packed.dtype), shape=ir.Shape(shape), const_value=packed)
    graph.register_initializer(value)
    return value, parts


def packed_name(names: Sequence[str]) -> str:
    """`…attn1.to_qkv.weight` for `…attn1.to_q.weight`, `…attn1.to_k.weight`, `…attn1.to_v.weight`; also `qkv_proj`."""
    layers = [name.rpartition(".")[0] for name in names]
    owner, _, leaf = layers[0].rpartition(".")
    kind = names[0].rpartition(".")[2]
    letters = "".join(_letter(layer.rpartition(".")[2]) for layer in layers)
    packed = f"{letters}_proj" if leaf.endswith("_proj") else f"to_{letters}"
    return f"{owner}.{packed}.{kind}"


def _letter(layer: str) -> str:
    """The q of `to_q` and `q_proj`."""
    return layer.removeprefix("to_").removesuffix("_proj")
