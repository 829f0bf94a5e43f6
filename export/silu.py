"""SiLU in the one form that is fused at every opset."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .graph_matching import producer, redirect
from .graph_values import insert, number_of


class SiluPass(InPlacePass):
    """Write SiLU as Mul(x, Sigmoid(x)).

        before   Swish(x);  Div(x, 1 + Exp(Neg(x)));  Mul(Sigmoid(x), x)
        after    Mul(x, Sigmoid(x))

    TensorRT and ONNX Runtime both look for this form; the Swish operator is there from opset 24 only. Quick GELU, as
    CLIP has it, is the same with Sigmoid(1.702 · x), and Swish with that alpha becomes it.

    Equal up to rounding.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        graph = model.graph
        modified = False
        for node in list(graph):
            if node.op_type == "Swish":
                _write(graph, node, node.inputs[0], alpha=node.attributes.get_float("alpha", 1.0))
            elif (data := _divided_by_exponential(node)) is not None:
                _write(graph, node, data, alpha=1.0)
            elif _is_reversed(node):
                gate, data = node.inputs
                node.replace_input_with(0, data)
                node.replace_input_with(1, gate)
            else:
                continue
            modified = True
        RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=modified)


def _write(graph: ir.Graph, node: ir.Node, data: ir.Value | None, *, alpha: float) -> None:
    """Put Mul(data, Sigmoid(alpha · data)) in the place of a node."""
    result = node.outputs[0]
    shape, dtype, name = result.shape, result.dtype, str(result.name)
    scaled = data
    if alpha != 1.0 and dtype is not None:
        factor = ir.tensor(alpha, dtype=dtype, name=f"{name}_alpha")
        constant = ir.Value(name=factor.name, type=ir.TensorType(dtype), shape=ir.Shape([]), const_value=factor)
        graph.register_initializer(constant)
        scaled = insert(graph, "Mul", [data, constant], before=node, name=f"{name}_scaled", shape=shape, dtype=dtype)
    gate = insert(graph, "Sigmoid", [scaled], before=node, name=f"{name}_gate", shape=shape, dtype=dtype)
    product = insert(graph, "Mul", [data, gate], before=node, name=f"{name}_product", shape=shape, dtype=dtype)
    redirect(result, product)
    graph.remove(node, safe=True)


def _divided_by_exponential(node: ir.Node) -> ir.Value | None:
    """X of Div(x, 1 + Exp(-x))."""
    if node.op_type != "Div":
        return None
    data, denominator = node.inputs
    total = producer(denominator, "Add")
    if total is None or data is None:
        return None
    for one, power in (total.inputs, reversed(total.inputs)):
        exponential = producer(power, "Exp")
        negated = exponential.inputs[0] if exponential is not None else None
        if number_of(one) == 1 and _is_negative_of(negated, data):
            return data
    return None


def _is_negative_of(value: ir.Value | None, data: ir.Value) -> bool:
    negation, product = producer(value, "Neg"), producer(value, "Mul")
    if negation is not None:
        return negation.inputs[0] is data
    if product is None:
        return False
    left, right = product.inputs
    return (left is data and number_of(right) == -1) or (right is data and number_of(left) == -1)


def _is_reversed(node: ir.Node) -> bool:
    """Whether a node is Mul(Sigmoid(x), x), or the same with a factor before the Sigmoid."""
    sigmoid = producer(node.inputs[0], "Sigmoid") if node.op_type == "Mul" else None
    if sigmoid is None:
        return False
    argument, data = sigmoid.inputs[0], node.inputs[1]
    scaled = producer(argument, "Mul")
    return argument is data or (scaled is not None and any(value is data for value in scaled.inputs))
