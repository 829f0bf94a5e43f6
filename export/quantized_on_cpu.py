"""A quantized graph as ONNX Runtime's CPU kernels want it: the same integers, held in the form that is fast there."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .lazy_weight import derived
from .weights import Values

_DOWN, _UP = "QuantizeLinear", "DequantizeLinear"
# Of unsigned activations: q + 128 stands for q.
_ZERO = 128


class QuantizedOnCpuPass(InPlacePass):
    """Rewrite pairs as TensorRT wants them into what ONNX Runtime runs fast on the CPU; nothing changes in value.

    Activations become uint8 with zero point 128. The int8 products of x86 are unsigned by signed; ONNX Runtime makes
    that change itself, but not of a tensor that several operators read, as queries, keys and values do.

    Weights of operators for which it has no int8 kernel without a quantized output, which are convolutions, become the
    floats that their integers stand for. Otherwise they are multiplied out at every run, and the kernels for constant
    weights are not taken. An integer times a scale that float16 holds is exact in float32.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite a float32-typed graph; `modified` says whether anything was quantized."""
        graph = model.graph
        modified = False
        for node in list(graph):
            if node.op_type == _DOWN and node.outputs[0].dtype == ir.DataType.INT8 and not _of_weight(node):
                modified |= _make_unsigned(graph, node)
        for node in list(graph):
            if node.op_type == _UP and _is_stored(node) and not all(_has_kernel(user) for user, _ in _users(node)):
                _multiply_out(graph, node)
                modified = True
        return PassResult(model, modified=modified)


def _users(node: ir.Node) -> list[tuple[ir.Node, int]]:
    return list(node.outputs[0].uses())


def _of_weight(node: ir.Node) -> bool:
    return node.inputs[0] is not None and node.inputs[0].is_initializer()


def _is_stored(node: ir.Node) -> bool:
    """Whether DequantizeLinear reads constants that are stored quantized."""
    return all(value is None or value.is_initializer() for value in node.inputs)


def _has_kernel(user: ir.Node) -> bool:
    """Whether an operator multiplies int8 with int8: a MatMul whose other input is an int8 activation."""
    maker = None if user.inputs[0] is None else user.inputs[0].producer()
    if user.op_type != "MatMul" or maker is None or maker.op_type != _UP:
        return False
    return maker.inputs[0] is not None and maker.inputs[0].dtype == ir.DataType.UINT8


def _make_unsigned(graph: ir.Graph, node: ir.Node) -> bool:
    """Shift a tensor's integers, from QuantizeLinear to where they are read; a Concat takes all its branches along."""
    downs, joints, ups = [node], list[ir.Node](), list[ir.Node]()
    for user, _ in _users(node):
        if user.op_type == "Concat":
            joints.append(user)
            ups += [reader for reader, _ in _users(user)]
            makers = [None if value is None else value.producer() for value in user.inputs]
            downs += [maker for maker in makers if maker is not None and maker is not node]
            if len(makers) != len({maker for maker in makers if maker is not None}):
                return False
        else:
            ups.append(user)
    symmetric = all(len(each.inputs) > 2 and _is_zero(each.inputs[2]) for each in (*downs, *ups))
    if not symmetric or {each.op_type for each in downs} != {_DOWN} or {each.op_type for each in ups} != {_UP}:
        return False
    zero = _zero_point(graph)
    for each in (*downs, *ups):
        each.replace_input_with(2, zero)
    for each in (*downs, *joints):
        each.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    return True


def _is_zero(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and not value.const_value.numpy().any()


def _zero_point(graph: ir.Graph) -> ir.Value:
    name = "unsigned.zero_point"
    if name not in graph.initializers:
        _register(graph, name, ir.tensor(np.array(_ZERO, np.uint8), name=name))
    return graph.initializers[name]


def _register(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _multiply_out(graph: ir.Graph, node: ir.Node) -> None:
    """Put the floats that stored integers stand for in the place of DequantizeLinear."""
    stored, scale = (value.const_value for value in node.inputs[:2] if value is not None)
    assert stored is not None
    assert scale is not None
    axis, result = node.attributes.get_int("axis", 1), node.outputs[0]

    def floats(integers: Values, steps: Values) -> Values:
        if steps.ndim:
            steps = steps.reshape([-1 if index == axis % integers.ndim else 1 for index in range(integers.ndim)])
        return np.asarray(integers.astype(np.float32) * steps.astype(np.float32))

    name = f"{result.name}.floats"
    tensor = derived([stored, scale], floats, shape=stored.shape.numpy(), dtype=ir.DataType.FLOAT, name=name)
    result.replace_all_uses_with(_register(graph, name, tensor))
    inputs = [value for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for value in inputs:
        if not value.uses() and value.name in graph.initializers:
            del graph.initializers[str(value.name)]
