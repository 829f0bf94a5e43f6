"""Scale attention's queries before the first matmul instead of the scores after it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult


class AttentionScalePass(InPlacePass):
    """Move the scale of the scores onto the queries.

        before   MatMul(Q, K) -> Mul by s, or Div by 1/s -> [Add mask] -> Softmax
        after    MatMul(Mul(Q, s), K)                    -> [Add mask] -> Softmax

    Unscaled scores grow with the head's width and are the first tensors to overflow in fp16, and TensorRT fuses
    attention only in this form. The dynamo exporter's own decomposition of scaled_dot_product_attention already
    scales Q and K by the square root each and is left as it is; eager attention is not.

    Requires a constant scalar scale and scores that nothing else reads. Equal up to the rounding of one product.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        matches = _late_scales(model)
        for scale_node, matmul, scale in matches:
            query = matmul.inputs[0]
            if query is None or query.dtype is None or scale_node.outputs[0].name is None:
                continue
            value = ir.tensor(np.asarray(scale, query.dtype.numpy()), name=f"{scale_node.outputs[0].name}_scale")
            constant = ir.Value(name=value.name, type=ir.TensorType(query.dtype), shape=ir.Shape([]), const_value=value)
            model.graph.register_initializer(constant)
            scaled = ir.node("Mul", [query, constant], name=f"{matmul.name}_scaled_query")
            scaled.outputs[0].name = f"{matmul.outputs[0].name}_scaled_query"
            scaled.outputs[0].type, scaled.outputs[0].shape = query.type, query.shape
            model.graph.insert_before(matmul, scaled)
            matmul.replace_input_with(0, scaled.outputs[0])
            scale_node.outputs[0].replace_all_uses_with(matmul.outputs[0])
            model.graph.remove(scale_node, safe=True)
        return PassResult(model, modified=bool(matches))


def scales_after_matmul(model: ir.Model) -> list[str]:
    """The outputs of attention's first matmuls that are still scaled afterwards."""
    return [str(matmul.outputs[0].name) for _, matmul, _ in _late_scales(model)]


def _late_scales(model: ir.Model) -> list[tuple[ir.Node, ir.Node, float]]:
    """(scale node, first matmul, factor) of every attention whose scores are scaled."""
    found = []
    for node in model.graph:
        if node.op_type != "Softmax":
            continue
        scores = node.inputs[0]
        producer = scores.producer() if scores is not None else None
        candidates = [producer]
        if producer is not None and producer.op_type in ("Add", "Where"):
            candidates = [value.producer() for value in producer.inputs if value is not None]
        matches = ((candidate, _scale_of(candidate)) for candidate in candidates if candidate is not None)
        found += [(candidate, *match) for candidate, match in matches if match is not None]
    return found


def _scale_of(node: ir.Node) -> tuple[ir.Node, float] | None:
    """The matmul and the factor, if the node multiplies or divides one matmul's result by a constant scalar."""
    if node.op_type not in ("Mul", "Div") or node.outputs[0].is_graph_output():
        return None
    left, right = node.inputs
    if node.op_type == "Mul" and left is not None and left.const_value is not None:
        left, right = right, left
    if left is None or right is None or right.const_value is None or right.const_value.size != 1:
        return None
    matmul = left.producer()
    if matmul is None or matmul.op_type != "MatMul" or len(left.uses()) != 1 or left.is_graph_output():
        return None
    factor = float(right.const_value.numpy().reshape(()))
    return matmul, factor if node.op_type == "Mul" else 1.0 / factor
