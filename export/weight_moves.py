"""Store weights the way the graph reads them, instead of moving them in every run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .graph_values import ints_of, is_weight
from .lazy_weight import derived
from .weights import Values


@dataclass(frozen=True)
class WeightChange:
    """What a node makes of a weight.

    Attributes:
        word: of the new tensor's name; with `target` it tells two changes of one weight apart.
        target: the arguments of the change.
        shape: of the result.
        apply: values to values.
        dtype: of the result, if it is another.
    """

    word: str
    target: tuple[int, ...]
    shape: tuple[int, ...]
    apply: Callable[[Values], Values]
    dtype: ir.DataType | None = None


# From a node whose first input is a weight of that shape to what it makes of it, or None.
Rule = Callable[[ir.Node, tuple[int, ...]], WeightChange | None]


class FoldWeightMovesPass(InPlacePass):
    """Fold Transpose, Reshape, Flatten, Unsqueeze, Squeeze and Identity of initializers into initializers.

        before   MatMul(x, Transpose(to_q.weight));  Mul(x, Unsqueeze(Unsqueeze(norm.weight)))
        after    MatMul(x, to_q.weight);             Mul(x, norm.weight)

    A graph traced without its weights keeps these, because there was nothing to fold. The result is computed when it
    is read, so a pass over a graph of any size reads no weight. It takes over the name of its parameter, which
    refitting goes by, where nothing reads the parameter itself any more; otherwise it is `<name>.transposed`,
    `<name>.reshaped`… Elements are moved, never computed: equal bit for bit.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Fold every move, chains included; `modified` says whether there was one."""
        return PassResult(model, modified=fold_into_weights(model.graph, _MOVES))


def weight_moves(model: ir.Model) -> list[str]:
    """The weights whose elements the graph moves in every run."""
    return [str(found[0].name) for node in model.graph if (found := _change_of(node, _MOVES)) is not None]


def fold_into_weights(graph: ir.Graph, rules: Mapping[str, Rule]) -> bool:
    """Let the readers of changed weights read tensors that are computed when they are read.

    Args:
        rules: by operator, what may be folded.

    Returns:
        Whether anything was.
    """
    made: dict[tuple[ir.Value, str, tuple[int, ...]], ir.Value] = {}
    roots: dict[ir.Value, ir.Value] = {}
    modified = False
    for node in list(graph):
        found = _change_of(node, rules)
        if found is None:
            continue
        weight, tensor, change = found
        key = (weight, change.word, change.target)
        if change.word == "reshaped" and change.shape == tuple(tensor.shape.numpy()):
            made[key] = weight
        elif key not in made:
            made[key] = _changed(graph, str(weight.name), tensor, change)
            roots[made[key]] = roots.get(weight, weight)
        node.outputs[0].replace_all_uses_with(made[key])
        graph.remove(node, safe=True)
        modified = True
    _take_over_names(graph, roots)
    return modified


def _changed(graph: ir.Graph, weight: str, tensor: ir.TensorProtocol, change: WeightChange) -> ir.Value:
    name, count = f"{weight}.{change.word}", 1
    while name in graph.initializers:
        count += 1
        name = f"{weight}.{change.word}_{count}"
    dtype = change.dtype or tensor.dtype
    values = derived([tensor], change.apply, shape=change.shape, dtype=dtype, name=name)
    result = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(change.shape), const_value=values)
    graph.register_initializer(result)
    return result


def _take_over_names(graph: ir.Graph, roots: dict[ir.Value, ir.Value]) -> None:
    """Drop what nothing reads any more, and give a parameter's name to the one tensor that is left of it."""
    results: dict[ir.Value, list[ir.Value]] = defaultdict(list)
    for result, root in roots.items():
        if result.uses():
            results[root].append(result)
        else:
            del graph.initializers[str(result.name)]
    for root in dict.fromkeys(roots.values()):
        if root.uses() or root.is_graph_output():
            continue
        del graph.initializers[str(root.name)]
        if len(results[root]) == 1:
            results[root][0].name = root.name


def _change_of(node: ir.Node, rules: Mapping[str, Rule]) -> tuple[ir.Value, ir.TensorProtocol, WeightChange] | None:
    """The weight that a node changes, its tensor and the change, if a rule covers it."""
    weight, rule = node.inputs[0] if node.inputs else None, rules.get(node.op_type)
    if rule is None or node.domain or node.outputs[0].is_graph_output():
        return None
    if weight is None or not is_weight(weight) or weight.const_value is None:
        return None
    change = rule(node, tuple(weight.const_value.shape.numpy()))
    return None if change is None else (weight, weight.const_value, change)


def _transpose(node: ir.Node, shape: tuple[int, ...]) -> WeightChange:
    perm = tuple(node.attributes.get_ints("perm", tuple(reversed(range(len(shape))))))
    return WeightChange(
        "transposed", perm, tuple(shape[axis] for axis in perm), lambda values: np.transpose(values, perm)
    )


def _reshape(node: ir.Node, shape: tuple[int, ...]) -> WeightChange | None:
    target = ints_of(node.inputs[1])
    if target is None:
        return None
    if not node.attributes.get_int("allowzero", 0):
        target = [shape[axis] if size == 0 else size for axis, size in enumerate(target)]
    if -1 in target:
        target[target.index(-1)] = math.prod(shape) // -math.prod(target)
    return _reshaped(target)


def _flatten(node: ir.Node, shape: tuple[int, ...]) -> WeightChange:
    axis = node.attributes.get_int("axis", 1)
    return _reshaped([math.prod(shape[:axis]), math.prod(shape[axis:])])


def _unsqueeze(node: ir.Node, shape: tuple[int, ...]) -> WeightChange | None:
    axes = ints_of(node.inputs[1])
    return None if axes is None else _reshaped(np.expand_dims(np.broadcast_to(np.int8(), shape), tuple(axes)).shape)


def _squeeze(node: ir.Node, shape: tuple[int, ...]) -> WeightChange | None:
    if len(node.inputs) < 2:
        return _reshaped([size for size in shape if size != 1])
    axes = ints_of(node.inputs[1])
    return None if axes is None else _reshaped(np.squeeze(np.broadcast_to(np.int8(), shape), tuple(axes)).shape)


def _identity(_: ir.Node, shape: tuple[int, ...]) -> WeightChange:
    return _reshaped(shape)


def _reshaped(shape: Sequence[int]) -> WeightChange:
    target = tuple(int(size) for size in shape)
    return WeightChange("reshaped", target, target, lambda values: np.reshape(values, target))


_MOVES: Mapping[str, Rule] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Identity": _identity,
}
