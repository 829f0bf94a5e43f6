"""Floating point operations of ONNX's operators, from the shapes of what they read and write.

A multiplication and an addition are two, whatever the type of the numbers. Counted are convolutions and matrix
products, those of attention included, as for engines (`export/engine_flops.py`) and in the published figures of Stable
Diffusion; norms, activations and the softmax are left out of all of these. A quantized operator does the operations of
the plain one, and QuantizeLinear and DequantizeLinear do none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from latentrt.runtime.errors import ExportError

MICROSOFT = "com.microsoft"

Shape = tuple[int, ...]


def node_flops(node: ir.Node) -> int:
    """Operations of one node; 0 of a kind that is not counted.

    Args:
        node: with the shapes of its inputs and outputs stated.

    Raises:
        ExportError: a shape is not stated, or the node multiplies matrices in a way that nothing here knows.
    """
    count = COUNTED.get((_domain(node), node.op_type))
    if count is not None:
        return count(node)
    if _MULTIPLIES.search(node.op_type):
        raise ExportError(f"{_name(node)}: expected an operator that can be counted, got {node.op_type}.")
    return 0


def is_counted(node: ir.Node) -> bool:
    """Whether it is a convolution, a matrix product or attention."""
    return (_domain(node), node.op_type) in COUNTED


def shape_of(node: ir.Node, value: ir.Value | None) -> Shape:
    """The sizes of a value that a node reads or writes.

    Raises:
        ExportError: they are not stated.
    """
    stated: Sequence[object] = ("none",)
    if value is not None and value.const_value is not None:
        stated = tuple(value.const_value.shape)
    elif value is not None and value.shape is not None:
        stated = tuple(value.shape)
    sizes = tuple(size for size in stated if isinstance(size, int))
    if len(sizes) != len(stated):
        raise ExportError(
            f"{_name(node)}: expected the shape of all that {node.op_type} reads and writes, got {stated}."
        )
    return sizes


def _convolution(weight: int) -> Callable[[ir.Node], int]:
    """Each output is a sum over the input channels of its group and the kernel: weights (m, c / groups, k…)."""

    def count(node: ir.Node) -> int:
        return 2 * math.prod(_out(node)) * math.prod(_in(node, weight)[1:])

    return count


def _transposed_convolution(node: ir.Node) -> int:
    """Each input is spread over the output channels of its group and the kernel: weights (c, m / groups, k…)."""
    return 2 * math.prod(_in(node, 0)) * math.prod(_in(node, 1)[1:])


def _product(node: ir.Node) -> int:
    """Each output is a sum over the last axis of the first factor, or over the one before if that is transposed."""
    first = _in(node, 0)
    return 2 * math.prod(_out(node)) * (first[-2] if _int(node, "transA") else first[-1])


def _product_of_few_bits(node: ir.Node) -> int:
    """MatMulNBits, whose second factor is packed in blocks: K is an attribute."""
    return 2 * math.prod(_out(node)) * _int(node, "K")


def _einsum(node: ir.Node) -> int:
    """One loop over all indices: of n factors n - 1 multiplications and an addition each; nothing of a single one."""
    equation = node.attributes["equation"].as_string()
    terms = equation.replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for index, term in enumerate(terms):
        shape = _in(node, index)
        before, dots, after = term.partition("...")
        hidden = [f"...{place}" for place in range(len(shape) - len(before) - len(after), 0, -1)] if dots else []
        for letter, size in zip((*before, *hidden, *after), shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))  # what an ellipsis stands for may be broadcast
    return len(terms) * math.prod(sizes.values()) if len(terms) > 1 else 0


def _fused_attention(node: ir.Node) -> int:
    """MultiHeadAttention: Q (b, s, w) or packed (b, s, n, 3, d), K and V (b, l, w), (b, n, l, d) or packed."""
    query = _in(node, 0)
    batch, length = query[:2]
    if len(query) == 5:
        width = query[2] * query[4]
        return _attention(batch, length, length + _past(node, 6), width, width)
    if _given(node, 1) is None:
        raise ExportError(f"{_name(node)}: expected keys, got none.")
    key = _in(node, 1)
    if len(key) == 5:
        return _attention(batch, length, key[1] + _past(node, 6), query[2], query[2])
    value = _in(node, 2)
    keys, width = (value[1], value[2]) if len(value) == 3 else (value[2], value[1] * value[3])
    return _attention(batch, length, keys + _past(node, 6), query[2], width)


def _attention_with_projections(past: int) -> Callable[[ir.Node], int]:
    """Attention of com.microsoft: its input (b, s, in) is projected by weights (in, q + k + v) first."""

    def count(node: ir.Node) -> int:
        batch, length, inner = _in(node, 0)
        joined = _in(node, 1)[1]
        sizes = node.attributes.get("qkv_hidden_sizes")
        query, _, value = (joined // 3,) * 3 if sizes is None else sizes.as_ints()
        projections = 2 * batch * length * inner * joined
        return projections + _attention(batch, length, length + _past(node, past), query, value)

    return count


def _standard_attention(node: ir.Node) -> int:
    """Attention of ONNX: Q, K and V (b, n, s, d), or (b, s, n d) with the numbers of heads as attributes."""
    query, value = _in(node, 0), _in(node, 2)
    if len(query) == 4:
        batch, heads, length, width = query
    else:
        batch, length, heads = query[0], query[1], _int(node, "q_num_heads")
        width = query[2] // heads
    if len(value) == 4:
        keys, value_width = value[2], value[3]
    else:
        keys, value_width = value[1], value[2] // _int(node, "kv_num_heads")
    return _attention(batch, length, keys + _past(node, 4), heads * width, heads * value_width)


def _attention(batch: int, queries: int, keys: int, width: int, value_width: int) -> int:
    """Both products: scores of all queries with all keys, and the sum of values. Widths are of all heads together."""
    return 2 * batch * queries * keys * (width + value_width)


def _past(node: ir.Node, index: int) -> int:
    """Keys of earlier calls, (b, n, l, d) or (2, b, n, l, d)."""
    return 0 if _given(node, index) is None else _in(node, index)[-2]


def _domain(node: ir.Node) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


def _name(node: ir.Node) -> str:
    return node.name or str(node.outputs[0].name)


def _given(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _in(node: ir.Node, index: int) -> Shape:
    return shape_of(node, _given(node, index))


def _out(node: ir.Node) -> Shape:
    return shape_of(node, node.outputs[0])


def _int(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return 0 if attribute is None else attribute.as_int()


def _in_both(*names: str) -> Sequence[tuple[str, str]]:
    return [(domain, name) for domain in ("", MICROSOFT) for name in names]


# By domain and operator.
COUNTED: Mapping[tuple[str, str], Callable[[ir.Node], int]] = {
    **dict.fromkeys(_in_both("Conv", "ConvInteger", "FusedConv", "NhwcConv", "NhwcFusedConv"), _convolution(1)),
    **dict.fromkeys(_in_both("QLinearConv"), _convolution(3)),
    **dict.fromkeys(_in_both("ConvTranspose"), _transposed_convolution),
    **dict.fromkeys(
        _in_both("MatMul", "MatMulInteger", "QLinearMatMul", "FusedMatMul", "FusedMatMulActivation"), _product
    ),
    **dict.fromkeys(_in_both("DynamicQuantizeMatMul", "MatMulIntegerToFloat"), _product),
    **dict.fromkeys(_in_both("Gemm", "QGemm", "FusedGemm"), _product),
    (MICROSOFT, "MatMulNBits"): _product_of_few_bits,
    ("", "Einsum"): _einsum,
    ("", "Attention"): _standard_attention,
    (MICROSOFT, "Attention"): _attention_with_projections(4),
    (MICROSOFT, "QAttention"): _attention_with_projections(8),
    (MICROSOFT, "MultiHeadAttention"): _fused_attention,
}
_MULTIPLIES = re.compile(r"Conv|MatMul|Gemm|Attention|LSTM|GRU|RNN|^(If|Loop|Scan)$")
