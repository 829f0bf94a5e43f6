"""Pictures inside a U-Net as (b, h, w, c), for ONNX Runtime's CUDA provider: tensor cores want channels last."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from .graph_matching import MICROSOFT, finished, initializer, integers, permutation, producer
from .graph_values import small_constant
from .lazy_weight import derived

_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Cast", "Sigmoid", "Tanh", "Relu", "Clip", "Gelu", "QuickGelu"})


class ChannelsLastPass(InPlacePass):
    """Bring convolutions, group norms and what lies between them to channels last.

        before   x (b, c, h, w) -> GroupNorm -> Conv -> Add -> Concat(axis 1) -> Resize -> ...
        after    Transpose once -> GroupNorm, NhwcConv, Add, Concat(axis 3), Resize (b, h, w, c) -> Transpose once

    A convolution or a group norm is rewritten with a Transpose before and after it; nodes between two Transposes take
    the new layout too, and the Transposes meet and go. Those around the attentions, which read (b, h w, c), go as well.

    Requires GroupNormFusionPass before. The tensors are the same in another order, bit for bit.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite; `modified` says whether there was a convolution or a group norm."""
        layout = _Layout(model.graph)
        rewrite: Mapping[str, Callable[[ir.Node], None]] = {
            "Conv": layout.convolution,
            "GroupNorm": layout.group_norm,
            "Transpose": layout.transpose,
            "Concat": layout.concat,
            "Resize": layout.resize,
            "Shape": layout.shape,
            **dict.fromkeys(_ELEMENTWISE, layout.elementwise),
        }
        for node in list(model.graph):
            if node.op_type in rewrite:
                rewrite[node.op_type](node)
        return finished(model, modified=layout.modified)


class _Layout:
    """A graph on its way: which value (b, c, h, w) there is as which other (b, h, w, c)."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.last: dict[ir.Value, ir.Value] = {}
        self.modified = False

    def convolution(self, node: ir.Node) -> None:
        weight = node.inputs[1]
        tensor = weight.const_value if weight is not None else None
        group = node.attributes.get("group")
        if weight is None or tensor is None or len(tensor.shape) != 4 or (group is not None and group.as_int() != 1):
            return
        out, into, height, width = tensor.shape.numpy()
        moved = derived(
            [tensor],
            lambda array: np.ascontiguousarray(array.transpose(_LAST)),
            shape=[out, height, width, into],
            dtype=tensor.dtype,
            name=f"{weight.name}_channels_last",
        )
        inputs = [self._as_last(node.inputs[0], node), initializer(self.graph, moved), *node.inputs[2:]]
        self._replace(node, ir.node("NhwcConv", inputs, attributes=node.attributes, domain=MICROSOFT))

    def group_norm(self, node: ir.Node) -> None:
        if node.attributes["channels_last"].as_int() == 1:
            return
        attributes = {**node.attributes, "channels_last": ir.AttrInt64("channels_last", 1)}
        inputs = [self._as_last(node.inputs[0], node), *node.inputs[1:]]
        self._replace(node, ir.node("GroupNorm", inputs, attributes=attributes, domain=MICROSOFT))

    def transpose(self, node: ir.Node) -> None:
        source, order = node.inputs[0], permutation(node)
        if source is None:
            return
        if order == _FIRST:
            self.last[node.outputs[0]] = source
        elif order == _LAST and source in self.last:
            node.outputs[0].replace_all_uses_with(self.last[source])

    def concat(self, node: ir.Node) -> None:
        if node.attributes["axis"].as_int() in (1, -3) and all(value in self.last for value in node.inputs):
            inputs = [self._as_last(value, node) for value in node.inputs]
            self._replace(node, ir.node("Concat", inputs, attributes={"axis": 3}))

    def resize(self, node: ir.Node) -> None:
        source, region, scales, sizes = (*node.inputs, None, None, None)[:4]
        if source not in self.last or region is not None or "axes" in node.attributes:
            return
        inputs = [self._as_last(source, node), None, self._reordered(scales, node), self._reordered(sizes, node)]
        self._replace(node, ir.node("Resize", inputs, attributes=node.attributes))

    def shape(self, node: ir.Node) -> None:
        source = node.inputs[0]
        if source is None or source not in self.last:
            return
        start, end = (node.attributes.get(name) for name in ("start", "end"))
        axes = _FIRST[start.as_int() if start is not None else None : end.as_int() if end is not None else None]
        shape = ir.node("Shape", [self.last[source]])
        sizes = ir.node("Gather", [shape.outputs[0], integers(self.graph, axes)])
        self.graph.insert_before(node, [shape, sizes])
        sizes.outputs[0].type, sizes.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        node.outputs[0].replace_all_uses_with(sizes.outputs[0])

    def elementwise(self, node: ir.Node) -> None:
        if not any(value in self.last for value in node.inputs):
            return
        if all(value is None or value in self.last or self._broadcasts(value) for value in node.inputs):
            inputs = [self._as_broadcast(value, node) for value in node.inputs]
            attributes = node.attributes
            self._replace(node, ir.node(node.op_type, inputs, attributes=attributes, domain=node.domain))

    def _broadcasts(self, value: ir.Value) -> bool:
        """Whether a value means the same in both layouts: a scalar, or (b, c) with two axes of one put behind it."""
        if value.const_value is not None:
            return value.const_value.size == 1
        node = producer(value, "Unsqueeze")
        axes = node.inputs[1].const_value if node is not None and node.inputs[1] is not None else None
        return axes is not None and axes.numpy().tolist() in ([2, 3], [-2, -1])

    def _as_broadcast(self, value: ir.Value | None, before: ir.Node) -> ir.Value | None:
        node = producer(value, "Unsqueeze")
        if value is None or value in self.last or node is None:
            return self.last.get(value, value) if value is not None else None
        moved = ir.node("Unsqueeze", [node.inputs[0], integers(self.graph, (1, 2))], name=f"{value.name}_channels_last")
        _describe(moved.outputs[0], value, _LAST)
        self.graph.insert_before(before, moved)
        self.last[value] = moved.outputs[0]
        return moved.outputs[0]

    def _as_last(self, value: ir.Value | None, before: ir.Node) -> ir.Value:
        """A value in the new layout, transposed before `before` if it has to be."""
        assert value is not None
        if value not in self.last:
            moved = ir.node("Transpose", [value], attributes={"perm": _LAST}, name=f"{value.name}_to_channels_last")
            _describe(moved.outputs[0], value, _LAST)
            self.graph.insert_before(before, moved)
            self.last[value] = moved.outputs[0]
        return self.last[value]

    def _reordered(self, value: ir.Value | None, before: ir.Node) -> ir.Value | None:
        """Scales or sizes of the four axes in the new order."""
        if value is None:
            return None
        numbers = small_constant(value)
        if numbers is not None:
            return initializer(self.graph, ir.tensor(numbers[list(_LAST)], name=f"{value.name}_channels_last"))
        node = ir.node("Gather", [value, integers(self.graph, _LAST)])
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def _replace(self, old: ir.Node, new: ir.Node) -> None:
        """Put `new` in the place of `old`, and behind it a Transpose for all that still read the old layout."""
        source, name = old.outputs[0], old.outputs[0].name
        back = ir.node("Transpose", [new.outputs[0]], attributes={"perm": _FIRST}, name=f"{name}_to_channels_first")
        result = back.outputs[0]
        new.name = f"{name}_channels_last"
        _describe(new.outputs[0], source, _LAST)
        result.type, result.shape = source.type, source.shape
        self.graph.insert_before(old, [new, back])
        source.replace_all_uses_with(result, replace_graph_outputs=True)
        self.graph.remove(old, safe=True)
        result.name = name
        self.last[result] = new.outputs[0]
        self.modified = True


def _describe(value: ir.Value, source: ir.Value, order: tuple[int, ...]) -> None:
    """Name, type and shape of a value that is another one with its axes in this order."""
    value.name, value.type = f"{source.name}_channels_last", source.type
    if source.shape is not None:
        value.shape = ir.Shape([source.shape[axis] for axis in order])
