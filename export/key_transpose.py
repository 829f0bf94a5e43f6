"""Transpose attention's keys with one Transpose, as they were before the exporter's decomposition."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

FIRST, LAST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


class KeyTransposePass(InPlacePass):
    """Replace the reshape sandwich around the keys' transposition by a Transpose.

        before   Shape, 3 Slice, 2 Concat; Reshape to (-1, n, d) -> Transpose(0, 2, 1) -> Reshape to (..., d, n)
        after    Transpose of the last two axes, merged with a Transpose before it

    The exporter writes the sandwich because it does not use the rank, which is known here. TensorRT sees through a
    Transpose when it looks for attention; through run-time shape arithmetic it does not.

    Requires the rank of the keys. The result is the same tensor, bit for bit.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every match; `modified` says whether there was one."""
        modified = False
        for node in list(model.graph):
            source = _sandwich_source(node)
            if source is None or source.shape is None:
                continue
            rank = len(source.shape)
            perm = [*range(rank - 2), rank - 1, rank - 2]
            before = source.producer()
            if before is not None and before.op_type == "Transpose" and (inner := _perm(before)) is not None:
                perm = [inner[axis] for axis in perm]
                moved, shape = before.inputs[0], source.shape
            else:
                moved, shape = source, source.shape
            transpose = ir.node("Transpose", [moved], attributes={"perm": perm}, name=f"{node.name}_transpose")
            old, new = node.outputs[0], transpose.outputs[0]
            new.name, new.type = f"{old.name}_transposed", source.type
            new.shape = ir.Shape([*list(shape)[:-2], shape[-1], shape[-2]])
            model.graph.insert_before(node, transpose)
            old.replace_all_uses_with(new)
            modified = True
        return PassResult(model, modified=modified)


def _perm(node: ir.Node) -> list[int] | None:
    attribute = node.attributes.get("perm")
    return None if attribute is None else list(attribute.as_ints())


def _producer(node: ir.Node | None, index: int, op_type: str) -> ir.Node | None:
    """The node behind an input, if it is of that type."""
    if node is None or len(node.inputs) <= index or (value := node.inputs[index]) is None:
        return None
    producer = value.producer()
    return producer if producer is not None and producer.op_type == op_type else None


def _sandwich_source(node: ir.Node) -> ir.Value | None:
    """The tensor whose last two axes a Reshape-Transpose-Reshape exchanges, if `node` ends one."""
    if node.op_type != "Reshape" or node.outputs[0].is_graph_output():
        return None
    transpose = _producer(node, 0, "Transpose")
    if transpose is None or _perm(transpose) != [0, 2, 1]:
        return None
    flatten = _producer(transpose, 0, "Reshape")
    source = flatten.inputs[0] if flatten is not None else None
    if source is None:
        return None
    leading, last, second = ("slice", FIRST, -2), ("slice", -1, LAST), ("slice", -2, -1)
    if _pieces(flatten, source) == [("value", -1, -1), second, last] and _pieces(node, source) == [
        leading,
        last,
        second,
    ]:
        return source
    return None


def _pieces(reshape: ir.Node | None, source: ir.Value) -> list[tuple[str, int, int]] | None:
    """What a Reshape's target shape is put together from: constants, and slices of the shape of `source`."""
    concat = _producer(reshape, 1, "Concat")
    if concat is None:
        return None
    pieces = []
    for value in concat.inputs:
        if value is None:
            return None
        if value.const_value is not None and value.const_value.size == 1:
            constant = int(value.const_value.numpy().reshape(()))
            pieces.append(("value", constant, constant))
            continue
        cut = value.producer()
        shape = _producer(cut, 0, "Shape")
        if cut is None or cut.op_type != "Slice" or shape is None or shape.inputs[0] is not source:
            return None
        bounds = [bound.const_value if bound is not None else None for bound in cut.inputs[1:3]]
        if len(cut.inputs) != 3 or bounds[0] is None or bounds[1] is None:
            return None
        pieces.append(("slice", int(bounds[0].numpy().reshape(())), int(bounds[1].numpy().reshape(()))))
    return pieces
