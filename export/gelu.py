"""GELU as one operator."""

from __future__ import annotations

import math

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import RemoveUnusedNodesPass

from .graph_matching import consumer, producer, redirect
from .graph_values import number_of

# The first opset with Gelu.
GELU_OPSET = 20
# The factors are rounded to float16 in some graphs.
_TOLERANCE = 1e-3


class GeluPass(InPlacePass):
    """Write GELU as Gelu, in graphs of opset 20 and later.

        before   0.5 · x · (1 + Erf(x / √2)), in any order of the products
        after    Gelu(x)

    A tanh GELU that is a Gelu node already stays what it is. Equal up to rounding; in float16 the chain rounds five
    times, the operator once.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        graph = model.graph
        modified = False
        if model.opset_imports[""] < GELU_OPSET:
            return PassResult(model, modified=False)
        for node in list(graph):
            match = _match(node) if node.op_type == "Erf" else None
            if match is None:
                continue
            data, end = match
            gelu = ir.node("Gelu", [data], attributes={"approximate": "none"}, name=f"{node.name}_gelu")
            graph.insert_before(end, gelu)
            redirect(end.outputs[0], gelu.outputs[0])
            graph.remove(end, safe=True)
            modified = True
        RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=modified)


def _match(erf: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """X and the last product of a GELU around an Erf."""
    data = _over_root_of_two(erf.inputs[0])
    total = consumer(erf.outputs[0], "Add")
    if data is None or total is None or not any(_is(value, 1.0) for value in total.inputs):
        return None
    product = consumer(total.outputs[0], "Mul")
    last = consumer(product.outputs[0], "Mul") if product is not None else None
    if product is None:
        return None
    other = _other(product, total.outputs[0])
    if _is_half_of(other, data):
        return data, product
    if last is None:
        return None
    missing = _other(last, product.outputs[0])
    both = (other is data and _is(missing, 0.5)) or (missing is data and _is(other, 0.5))
    return (data, last) if both else None


def _over_root_of_two(value: ir.Value | None) -> ir.Value | None:
    """X of x / √2, which may be written as a product."""
    quotient, product = producer(value, "Div"), producer(value, "Mul")
    if quotient is not None and _is(quotient.inputs[1], math.sqrt(2)):
        return quotient.inputs[0]
    if product is not None:
        return _factor_beside(product, math.sqrt(0.5))
    return None


def _is_half_of(value: ir.Value | None, data: ir.Value) -> bool:
    product = producer(value, "Mul")
    return product is not None and _factor_beside(product, 0.5) is data


def _factor_beside(product: ir.Node, number: float) -> ir.Value | None:
    """What a product multiplies by a number."""
    left, right = product.inputs
    if _is(right, number):
        return left
    return right if _is(left, number) else None


def _other(product: ir.Node, value: ir.Value) -> ir.Value | None:
    left, right = product.inputs
    return right if left is value else left


def _is(value: ir.Value | None, number: float) -> bool:
    found = number_of(value)
    return found is not None and math.isclose(found, number, rel_tol=_TOLERANCE)
