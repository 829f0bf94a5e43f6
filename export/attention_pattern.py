"""Finding attention in a graph: projections, heads, scale, mask, and where its output goes.

    q, k, v   MatMul by a weight -> [Add of a bias] -> Reshape to heads, Transpose, [Mul by a scalar], [Cast]
    scores    MatMul(q, k) -> [Add of a mask] -> [Cast] -> Softmax -> [Cast]
    output    MatMul(scores, v) -> Transpose, Reshape -> MatMul by a weight -> [Add of a bias]

as diffusers' and transformers' attention is exported, in any order of what moves, scales and casts. Sizes may be
dynamic; the number of heads and their width are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from .graph_matching import producer

_MOVES = ("Transpose", "Reshape", "Cast", "Identity")


@dataclass(frozen=True, eq=False)
class Projection:
    """A Linear layer.

    Attributes:
        source: what it projects (b, n, in).
        weight: (in, out), an initializer.
        bias: (out,), an initializer, or None.
        nodes: the MatMul, and the Add of the bias.
    """

    source: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    nodes: tuple[ir.Node, ...]

    @property
    def output(self) -> ir.Value:
        """The result (b, n, out)."""
        return self.nodes[-1].outputs[0]

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers in and out."""
        inner, outer = _sizes(self.weight)
        return inner, outer


@dataclass(frozen=True, eq=False)
class Operand:
    """What attention multiplies: a projection, then the nodes that move, scale and cast it, in this order."""

    value: ir.Value
    projection: Projection
    steps: tuple[ir.Node, ...]

    @property
    def scales(self) -> tuple[ir.Node, ...]:
        """The steps that multiply by a scalar."""
        return tuple(node for node in self.steps if node.op_type == "Mul")

    @property
    def factor(self) -> float:
        """What the scales multiply by, together."""
        return math.prod(factor for node in self.steps if (factor := scalar_factor(node)) is not None)


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention.

    Attributes:
        name: of its module, such as `unet.mid_block.attentions.0.transformer_blocks.0.attn2`; empty where the weights
            do not have their parameters' names.
        query: (b, heads, n, d).
        key: (b, heads, d, m).
        value: (b, heads, m, d).
        heads: how many.
        width: of a head, d.
        mask: added to the scores, or None.
        output: the projection of the heads put together again; None if something else follows.
    """

    name: str
    query: Operand
    key: Operand
    value: Operand
    heads: int
    width: int
    mask: ir.Value | None
    output: Projection | None

    @property
    def is_self(self) -> bool:
        """Whether queries, keys and values are projected from the same values."""
        return self.query.projection.source is self.key.projection.source is self.value.projection.source

    @property
    def scale(self) -> float:
        """What the scores are multiplied by, wherever that happens before the first MatMul."""
        return self.query.factor * self.key.factor


def find_attention(model: ir.Model) -> list[Attention]:
    """Every attention of a graph, in its order."""
    return [found for node in model.graph if node.op_type == "Softmax" and (found := _attention(node)) is not None]


def scalar_factor(node: ir.Node) -> float | None:
    """The constant scalar that a Mul multiplies by; None for other nodes."""
    if node.op_type != "Mul":
        return None
    constants = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    if len(constants) != 1 or constants[0].size != 1:
        return None
    return float(constants[0].numpy().reshape(()))


def data_input(node: ir.Node) -> ir.Value | None:
    """What a node moves, scales or casts: its first input that is no constant."""
    return next((value for value in node.inputs if value is not None and value.const_value is None), None)


def _attention(softmax: ir.Node) -> Attention | None:
    scores = _before_casts(softmax.inputs[0])
    add, mask = producer(scores, "Add"), None
    matmul = producer(scores, "MatMul")
    if add is not None:
        left, right = add.inputs
        matmul = producer(left, "MatMul") or producer(right, "MatMul")
        mask = right if producer(left, "MatMul") is matmul else left
    context = _reader(softmax.outputs[0])
    if context is not None and context.op_type == "Cast":
        context = _reader(context.outputs[0])
    if matmul is None or context is None or context.op_type != "MatMul":
        return None
    query, key, value = (_operand(operand) for operand in (*matmul.inputs, context.inputs[1]))
    if query is None or key is None or value is None:
        return None
    heads = _head_sizes(query)
    if heads is None:
        return None
    return Attention(
        name=_module_of(query, key, value),
        query=query,
        key=key,
        value=value,
        heads=heads[0],
        width=heads[1],
        mask=mask,
        output=_output(context),
    )


def _operand(value: ir.Value | None) -> Operand | None:
    """The projection behind a value, if only moves, scales and casts lie between."""
    steps: list[ir.Node] = []
    current = value
    while current is not None and (node := current.producer()) is not None:
        if node.op_type not in _MOVES and scalar_factor(node) is None:
            break
        steps.insert(0, node)
        current = data_input(node)
    projection = _projection(current)
    return None if value is None or projection is None else Operand(value, projection, tuple(steps))


def _projection(value: ir.Value | None) -> Projection | None:
    add, bias = producer(value, "Add"), None
    matmul = producer(value, "MatMul")
    if add is not None:
        bias = next((v for v in add.inputs if v is not None and v.is_initializer()), None)
        matmul = next((node for v in add.inputs if (node := producer(v, "MatMul")) is not None), None)
    if matmul is None or (add is not None and bias is None):
        return None
    source, weight = matmul.inputs
    if source is None or weight is None or not weight.is_initializer() or len(_sizes(weight)) != 2:
        return None
    return Projection(source, weight, bias, (matmul,) if add is None else (matmul, add))


def _output(context: ir.Node) -> Projection | None:
    """The projection that follows the heads' results."""
    node = _reader(context.outputs[0])
    while node is not None and node.op_type in _MOVES:
        node = _reader(node.outputs[0])
    if node is None or node.op_type != "MatMul":
        return None
    add = _reader(node.outputs[0])
    biased = _projection(add.outputs[0]) if add is not None and add.op_type == "Add" else None
    return biased or _projection(node.outputs[0])


def _head_sizes(operand: Operand) -> tuple[int, int] | None:
    """Heads and their width, of an operand (b, heads, n, d)."""
    shapes = (node.outputs[0].shape for node in reversed(operand.steps) if node.op_type == "Transpose")
    for shape in shapes:
        if shape is not None and len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[3], int):
            return shape[1], shape[3]
    return None


def _module_of(*operands: Operand) -> str:
    """What the names of the weights, `<module>.<projection>.weight`, have in common."""
    modules = {str(operand.projection.weight.name).rpartition(".")[0].rpartition(".")[0] for operand in operands}
    return modules.pop() if len(modules) == 1 else ""


def _before_casts(value: ir.Value | None) -> ir.Value | None:
    while (cast := producer(value, "Cast")) is not None:
        value = cast.inputs[0]
    return value


def _reader(value: ir.Value) -> ir.Node | None:
    """The only node that reads a value."""
    readers = value.consumers()
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _sizes(value: ir.Value) -> tuple[int, ...]:
    shape = value.shape if value.const_value is None else value.const_value.shape
    return () if shape is None else tuple(size for size in shape if isinstance(size, int))
