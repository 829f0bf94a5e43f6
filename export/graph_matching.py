"""Looking around in a graph: what stands before and after a value, and putting a fused node in a pattern's place."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

# The domain of ONNX Runtime's own operators.
MICROSOFT = "com.microsoft"


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node behind a value, if it is of that type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def consumer(value: ir.Value, op_type: str) -> ir.Node | None:
    """The only reader of a value, if it is of that type and nothing else sees the value."""
    readers = value.consumers()
    if len(readers) != 1 or value.is_graph_output() or readers[0].op_type != op_type:
        return None
    return readers[0]


def permutation(node: ir.Node | None) -> tuple[int, ...] | None:
    """How a Transpose orders the axes; None for other nodes."""
    attribute = node.attributes.get("perm") if node is not None and node.op_type == "Transpose" else None
    return None if attribute is None else tuple(attribute.as_ints())


def is_vector(value: ir.Value | None) -> bool:
    """Whether a value is an initializer of one axis."""
    return value is not None and value.is_initializer() and value.shape is not None and len(value.shape) == 1


def integers(graph: ir.Graph, values: tuple[int, ...]) -> ir.Value:
    """An int64 initializer of these numbers, shared by all that ask for the same."""
    name = "integers" + "".join(f"_{value}" for value in values)
    return initializer(graph, ir.tensor(values, dtype=ir.DataType.INT64, name=name))


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """The graph's initializer of the tensor's name; the tensor itself, if there is none yet."""
    name = str(tensor.name)
    if name not in graph.initializers:
        shape, dtype = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        graph.register_initializer(ir.Value(name=name, type=dtype, shape=shape, const_value=tensor))
    return graph.initializers[name]


def redirect(old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads `old` read `new`, which takes over its name, type and shape."""
    name = old.name
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}_replaced", name


def replace_with(graph: ir.Graph, end: ir.Node, fused: ir.Node, *, before: ir.Node | None = None) -> None:
    """Put `fused` in the place of `end`, the last node of a pattern; its first output takes over from end's.

    What stood before `end` and is read by nothing else now is left for `finished`.

    Args:
        before: where to insert it, if not where `end` stands.
    """
    fused.name = f"{end.outputs[0].name}_fused"
    graph.insert_before(end if before is None else before, fused)
    redirect(end.outputs[0], fused.outputs[0])
    graph.remove(end, safe=True)


def finished(model: ir.Model, *, modified: bool) -> PassResult:
    """The result of a pass that put ONNX Runtime's operators in: without what nothing reads now."""
    if modified:
        model.opset_imports[MICROSOFT] = 1
        RemoveUnusedNodesPass()(model)
    return PassResult(model, modified=modified)
