"""Say the sizes that a graph reshapes to as constants, where they are the input's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from .graph_matching import integers, producer
from .graph_values import insert, ints_of

_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div"})
_RESIZE_SIZES = 3  # the input


@dataclass(frozen=True)
class _Read:
    """A size that only a run knows: the element at `index` of a one-dimensional value."""

    value: ir.Value
    index: int


# A known size, the name of a dimension of the graph's inputs, or one read in the run.
_Size = int | str | _Read


class ShapeArithmeticPass(InPlacePass):
    """Replace computed shapes by constants with 0 (as in the input) and -1 (what is left), and share the others.

        before   Reshape(x, Concat(Shape(sample)[0:1], h · w, 320))       x: (batch, h, w, 320)
        after    Reshape(x, [0, -1, 320])
        before   Reshape(x, Concat(Shape(sample)[0:1], h, w, 320))        x: (batch, h · w, 320)
        after    Reshape(x, Concat(0, h, -1, 320))
        before   Resize(x, Concat(Shape(x)[0:2], Concat(h, w)))           x: (batch, 320, …)
        after    Resize(x, Concat(Shape(sample)[0:1], 320, h, w))

    The exporter writes every size out, each from the graph's inputs. TensorRT and ONNX Runtime see a constant target
    for the mere view that it is; a computed one they work out in every run. Sizes are one-element vectors all the
    way, so that nothing squeezes and reshapes them, and a Reshape to the shape that its input has anyway goes.

    Relies only on what the graph states: the shapes of its values, and that dimensions of one name are equal. Only
    views change: equal bit for bit.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        graph = model.graph
        modified = CommonSubexpressionEliminationPass()(model).modified
        sources = _dimension_sources(graph)
        for node in list(graph):
            if node.op_type == "Squeeze":
                modified |= _kept_a_vector(graph, node)
            elif node.op_type == "Reshape":
                modified |= _viewed(graph, node, sources)
            elif node.op_type == "Resize" and len(node.inputs) > _RESIZE_SIZES:
                modified |= _written_out(graph, node, sources)
        # What was made anew for several nodes becomes one again.
        CommonSubexpressionEliminationPass()(model)
        RemoveUnusedNodesPass()(model)
        return PassResult(model, modified=modified)


def shape_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes that compute with sizes: Shape, and what is made of its results and constants alone."""
    found: dict[ir.Node, None] = {}
    for node in model.graph:
        made = [value.producer() for value in node.inputs if value is not None and value.const_value is None]
        if node.op_type in ("Shape", "Size") or (made and all(producer in found for producer in made)):
            found[node] = None
    return list(found)


def _dimension_sources(graph: ir.Graph) -> dict[str, ir.Value]:
    """The sizes of the graph's named dimensions, each read once and before everything else."""
    sources: dict[str, ir.Value] = {}
    for value in graph.inputs:
        for axis, size in enumerate(value.shape or ()):
            if not isinstance(size, ir.SymbolicDim) or size.value is None or size.value in sources:
                continue
            wanted = {"start": axis, "end": axis + 1}
            found = [user for user, _ in value.uses() if user.op_type == "Shape" and _bounds(user) == wanted]
            if found:
                graph.remove(found[0])
                graph.insert_before(graph[0], found[0])
                sources[size.value] = found[0].outputs[0]
                continue
            sources[size.value] = insert(
                graph,
                "Shape",
                [value],
                before=graph[0],
                name=f"size_of_{size.value}",
                shape=ir.Shape([1]),
                dtype=ir.DataType.INT64,
                attributes=wanted,
            )
    return sources


def _bounds(node: ir.Node) -> dict[str, int]:
    """The `start` and `end` of a Shape node, as far as it has them."""
    return {name: attribute.as_int() for name, attribute in node.attributes.items() if name in ("start", "end")}


def _kept_a_vector(graph: ir.Graph, node: ir.Node) -> bool:
    """Compute with one-element vectors where a size is made a number and, in the end, a vector again."""
    size, number = node.inputs[0], node.outputs[0]
    if size is None or size.dtype != ir.DataType.INT64 or size.shape is None or list(size.shape) != [1]:
        return False
    ends, through = _vector_ends(number)
    if ends is None:
        return False
    number.replace_all_uses_with(size)
    graph.remove(node, safe=True)
    for value in through:
        value.shape = ir.Shape([1])
    for end in ends:
        if end.inputs[0] is not None:
            end.outputs[0].replace_all_uses_with(end.inputs[0])
        graph.remove(end, safe=True)
    return True


def _vector_ends(number: ir.Value) -> tuple[list[ir.Node] | None, list[ir.Value]]:
    """The nodes that make vectors of a number, and the numbers computed on the way; None if it is used otherwise."""
    ends: dict[ir.Node, None] = {}
    through: list[ir.Value] = []
    pending = [number]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            return None, []
        for user, _ in value.uses():
            if user.op_type in _ARITHMETIC and user.outputs[0].shape is not None:
                if not len(user.outputs[0].shape):  # of a vector, it stays one
                    through.append(user.outputs[0])
                    pending.append(user.outputs[0])
            elif _makes_vector(user):
                ends[user] = None
            else:
                return None, []
    return list(ends), through


def _makes_vector(node: ir.Node) -> bool:
    """Whether a node makes a vector of one element of a number, for others to read."""
    arguments = {"Reshape": ([-1], [1]), "Unsqueeze": ([0], [-1])}.get(node.op_type, ())
    return not node.outputs[0].is_graph_output() and bool(arguments) and ints_of(node.inputs[1]) in arguments


def _viewed(graph: ir.Graph, node: ir.Node, sources: Mapping[str, ir.Value]) -> bool:
    """Give a Reshape the simplest target that makes the same shape, or remove it."""
    data, target, result = node.inputs[0], node.inputs[1], node.outputs[0]
    sizes = _sizes(target, sources)
    if data is None or data.shape is None or target is None or sizes is None:
        return False
    copies = not node.attributes.get_int("allowzero", 0)
    own = [_stated(size, sources) for size in data.shape]
    as_input = [(copies and size == 0) or (axis < len(own) and size == own[axis]) for axis, size in enumerate(sizes)]
    if len(sizes) == len(own) and sum(as_input) >= len(own) - 1 and not result.is_graph_output():
        result.replace_all_uses_with(data)
        graph.remove(node, safe=True)
        return True
    plain: list[_Size] = [0 if same else size for same, size in zip(as_input, sizes, strict=True)]
    unknown = [axis for axis, size in enumerate(plain) if not isinstance(size, int)]
    if target.const_value is not None or (not copies and 0 in sizes):
        return False
    if len(unknown) > 1 and producer(target, "Concat") is None:  # one Shape node gives them all
        return False
    if unknown and -1 not in plain:
        plain[unknown[-1]] = -1
    return _set_sizes(graph, node, 1, plain, sources)


def _written_out(graph: ir.Graph, node: ir.Node, sources: Mapping[str, ir.Value]) -> bool:
    """Make a Resize's computed sizes of as few pieces as there are."""
    target = node.inputs[_RESIZE_SIZES]
    sizes = _sizes(target, sources)
    if target is None or sizes is None or target.const_value is not None:
        return False
    return _set_sizes(graph, node, _RESIZE_SIZES, sizes, sources)


def _stated(size: int | ir.SymbolicDim, sources: Collection[str]) -> _Size | None:
    """A size that the graph states, if it does."""
    if isinstance(size, int):
        return size
    return size.value if size.value in sources else None


def _sizes(value: ir.Value | None, sources: Collection[str]) -> list[_Size] | None:
    """The elements of a vector of sizes; None if its length is unknown or it holds something else."""
    if value is None or value.dtype != ir.DataType.INT64:
        return None
    if value.const_value is not None:
        constant = ints_of(value)
        return None if constant is None else [*constant]
    shape, concat = producer(value, "Shape"), producer(value, "Concat")
    source = shape.inputs[0] if shape is not None else None
    if shape is not None and source is not None and source.shape is not None:
        bounds = _bounds(shape)
        stated = [_stated(size, sources) for size in list(source.shape)[bounds.get("start", 0) : bounds.get("end")]]
        return [_Read(value, index) if size is None else size for index, size in enumerate(stated)]
    if concat is not None:
        parts = [_sizes(part, sources) for part in concat.inputs]
        return None if None in parts else [size for part in parts if part is not None for size in part]
    if value.shape is not None and list(value.shape) == [1]:
        return [_Read(value, 0)]
    return None


def _set_sizes(
    graph: ir.Graph, node: ir.Node, index: int, sizes: Sequence[_Size], sources: Mapping[str, ir.Value]
) -> bool:
    """Make an input of a node of these sizes; False if it is made of them already."""
    parts: list[ir.Value] = []
    for known, group in groupby(sizes, lambda size: isinstance(size, int)):
        if known:
            parts.append(integers(graph, tuple(size for size in group if isinstance(size, int))))
        else:
            parts += [_vector(graph, size, sources, before=node) for size in group if not isinstance(size, int)]
    made, old = parts[0], producer(node.inputs[index], "Concat")
    if old is not None and list(old.inputs) == parts:
        return False
    if len(parts) > 1:
        name, shape = f"{node.outputs[0].name}_sizes", ir.Shape([len(sizes)])
        made = insert(
            graph, "Concat", parts, before=node, name=name, shape=shape, dtype=ir.DataType.INT64, attributes={"axis": 0}
        )
    node.replace_input_with(index, made)
    node.attributes.pop("allowzero", None)
    return True


def _vector(graph: ir.Graph, size: str | _Read, sources: Mapping[str, ir.Value], *, before: ir.Node) -> ir.Value:
    """A size as a vector of one element."""
    if isinstance(size, str):
        return sources[size]
    shape = producer(size.value, "Shape")
    if shape is None or list(size.value.shape or ()) == [1]:
        return size.value
    at = _bounds(shape).get("start", 0) + size.index
    return insert(
        graph,
        "Shape",
        [shape.inputs[0]],
        before=before,
        name=f"{size.value.name}_{size.index}",
        shape=ir.Shape([1]),
        dtype=ir.DataType.INT64,
        attributes={"start": at, "end": at + 1},
    )
