"""On ones, without padding, an output is the number of products that were summed: ONNX Runtime does the counting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, shape_inference

from latentrt.benchmarks.graph_flops import graph_work
from latentrt.benchmarks.operator_flops import MICROSOFT, node_flops
from latentrt.runtime.errors import ExportError

Arrays = Mapping[str, NDArray[Any]]
FLOAT = TensorProto.FLOAT


def one_node(
    operator: str,
    inputs: Sequence[str],
    arrays: Arrays,
    *,
    domain: str = "",
    out: Sequence[int] | None = None,
    out_type: int = FLOAT,
    opset: int = 20,
    **attributes: Any,
) -> Any:
    """A graph of one operator, whose inputs have the types and shapes of the arrays; "" is an input left out."""
    info = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in arrays.items()
    ]
    graph = helper.make_graph(
        [helper.make_node(operator, inputs, ["out"], name="node", domain=domain, **attributes)],
        "graph",
        info,
        [helper.make_tensor_value_info("out", out_type, out)],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def counted(model: Any) -> int:
    return node_flops(next(iter(ir.from_proto(shape_inference.infer_shapes(model)).graph)))


def summed(model: Any, arrays: Arrays) -> int:
    """The products in all outputs, of factors that are all ones."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return int(np.asarray(session.run(None, dict(arrays))[0], np.float64).sum())


def ones(*shape: int) -> NDArray[np.float32]:
    return np.ones(shape, np.float32)


small = st.integers(1, 5)
few = settings(max_examples=8, deadline=None)


@few
@given(n=small, groups=small, inner=small, outer=small, kernel=st.tuples(small, small), stride=small, more=small)
def test_convolutions(
    n: int, groups: int, inner: int, outer: int, kernel: tuple[int, int], stride: int, more: int
) -> None:
    x = ones(n, groups * inner, kernel[0] + more, kernel[1] + 2)
    arrays = {"x": x, "w": ones(groups * outer, inner, *kernel), "b": ones(groups * outer)}
    model = one_node("Conv", ["x", "w"], {name: arrays[name] for name in "xw"}, group=groups, strides=[stride, 1])
    assert counted(model) == 2 * summed(model, {name: arrays[name] for name in "xw"})
    biased = one_node("Conv", ["x", "w", "b"], arrays, group=groups, strides=[stride, 1])
    assert counted(biased) == counted(model)
    upwards = {"x": ones(n, groups * inner, 3, more), "w": ones(groups * inner, outer, *kernel)}
    model = one_node("ConvTranspose", ["x", "w"], upwards, group=groups, strides=[stride, 1])
    assert counted(model) == 2 * summed(model, upwards)


@few
@given(st.lists(small, min_size=0, max_size=2), small, small, small, st.booleans(), st.booleans())
def test_products(batch: list[int], m: int, k: int, n: int, left: bool, right: bool) -> None:
    arrays: dict[str, NDArray[Any]] = {"a": ones(*batch, m, k), "b": ones(k, n)}
    model = one_node("MatMul", ["a", "b"], arrays)
    assert counted(model) == 2 * summed(model, arrays)
    integers = {"a": ones(*batch, m, k).astype(np.uint8), "b": ones(k, n).astype(np.int8)}
    model = one_node("MatMulInteger", ["a", "b"], integers, out_type=TensorProto.INT32)
    assert counted(model) == 2 * summed(model, integers)
    arrays = {"a": ones(k, m) if left else ones(m, k), "b": ones(n, k) if right else ones(k, n)}
    model = one_node("Gemm", ["a", "b"], arrays, transA=int(left), transB=int(right))
    assert counted(model) == 2 * summed(model, arrays)
    arrays = {"a": ones(2, k, m) if left else ones(2, m, k), "b": ones(2, n, k) if right else ones(2, k, n)}
    model = one_node(
        "FusedMatMul", ["a", "b"], arrays, domain=MICROSOFT, out=[2, m, n], transA=int(left), transB=int(right)
    )
    assert counted(model) == 2 * summed(model, arrays)


@few
@given(b=small, h=small, i=small, j=small, k=small)
def test_sums_of_einstein(b: int, h: int, i: int, j: int, k: int) -> None:
    arrays = {"x": ones(b, h, i, k), "y": ones(b, h, k, j)}
    model = one_node("Einsum", ["x", "y"], arrays, equation="bhik, bhkj -> bhij")
    assert counted(model) == 2 * summed(model, arrays)
    broadcast = {"x": ones(b, 1, i, k), "y": ones(h, k, j)}
    dots = one_node("Einsum", ["x", "y"], broadcast, out=[b, h, i, j], equation="...ik,...kj->...ij")
    assert counted(dots) == counted(model)
    three = {"x": ones(i, k), "y": ones(k, j), "z": ones(j, h)}
    chain = one_node("Einsum", [*"xyz"], three, out=[i, h], equation="ik,kj,jh->ih")
    assert counted(chain) == 3 * summed(chain, three)
    transposed = one_node("Einsum", ["x"], {"x": ones(i, k)}, out=[k, i], equation="ik->ki")
    assert counted(transposed) == 0


def attention(batch: int, heads: int, queries: int, keys: int, width: int, value_width: int) -> int:
    """Scores and the sum of values, written out as products."""
    scores = {"q": ones(batch, heads, queries, width), "k": ones(batch, heads, width, keys)}
    values = {"p": ones(batch, heads, queries, keys), "v": ones(batch, heads, keys, value_width)}
    return sum(2 * summed(one_node("MatMul", list(arrays), arrays), arrays) for arrays in (scores, values))


@few
@given(b=small, n=small, s=small, m=small, d=small, v=small)
def test_attention_operators_are_their_products(b: int, n: int, s: int, m: int, d: int, v: int) -> None:
    expected = attention(b, n, s, m, d, v)
    out = [b, s, n * v]
    flat = {"q": ones(b, s, n * d), "k": ones(b, m, n * d), "v": ones(b, m, n * v)}
    split = {"q": ones(b, n, s, d), "k": ones(b, n, m, d), "v": ones(b, n, m, v)}
    given_heads = {**flat, "k": split["k"], "v": split["v"]}
    for arrays in (flat, given_heads):
        fused = one_node("MultiHeadAttention", [*"qkv"], arrays, domain=MICROSOFT, out=out, num_heads=n)
        assert counted(fused) == expected
    standard = one_node("Attention", [*"qkv"], split, out=[b, n, s, v], opset=23)
    assert counted(standard) == expected
    standard = one_node("Attention", [*"qkv"], flat, out=out, opset=23, q_num_heads=n, kv_num_heads=n)
    assert counted(standard) == expected
    past = {**flat, "pk": ones(b, n, 3, d), "pv": ones(b, n, 3, v)}
    cached = one_node(
        "MultiHeadAttention", [*"qkv", "", "", "", "pk", "pv"], past, domain=MICROSOFT, out=out, num_heads=n
    )
    assert counted(cached) == attention(b, n, s, m + 3, d, v)


@few
@given(b=small, n=small, s=small, m=small, d=small, inner=small)
def test_packed_attention_operators(b: int, n: int, s: int, m: int, d: int, inner: int) -> None:
    out = [b, s, n * d]
    packed = {"q": ones(b, s, n, 3, d)}
    fused = one_node("MultiHeadAttention", ["q"], packed, domain=MICROSOFT, out=out, num_heads=n)
    assert counted(fused) == attention(b, n, s, s, d, d)
    pairs = {"q": ones(b, s, n * d), "k": ones(b, m, n, 2, d)}
    fused = one_node("MultiHeadAttention", ["q", "k"], pairs, domain=MICROSOFT, out=out, num_heads=n)
    assert counted(fused) == attention(b, n, s, m, d, d)
    whole = {"x": ones(b, s, inner), "w": ones(inner, 3 * n * d)}
    projected = one_node("Attention", ["x", "w"], whole, domain=MICROSOFT, out=out, num_heads=n)
    projections = 2 * summed(one_node("MatMul", ["x", "w"], whole), whole)
    assert counted(projected) == projections + attention(b, n, s, s, d, d)
    assert counted(
        one_node("Attention", ["x", "w"], whole, domain=MICROSOFT, out=out, qkv_hidden_sizes=[n * d] * 3)
    ) == counted(projected)


def test_quantized_operators_are_as_much_work_as_plain_ones() -> None:
    scales: dict[str, NDArray[Any]] = {"s": ones(), "z": np.zeros((), np.uint8)}
    x, w = ones(2, 6, 9, 7).astype(np.uint8), ones(8, 3, 3, 3).astype(np.uint8)
    plain = {"x": x.astype(np.float32), "w": w.astype(np.float32)}
    model = one_node(
        "QLinearConv", [*"xszwszsz"], {"x": x, "w": w, **scales}, out_type=TensorProto.UINT8, group=2, pads=[1] * 4
    )
    assert counted(model) == counted(one_node("Conv", ["x", "w"], plain, group=2, pads=[1] * 4))
    integers = one_node("ConvInteger", ["x", "w"], {"x": x, "w": w}, out_type=TensorProto.INT32, group=2, pads=[1] * 4)
    assert counted(integers) == counted(model) == 2 * (2 * 8 * 9 * 7) * 3 * 9
    a, b = ones(4, 5, 6).astype(np.uint8), ones(6, 7).astype(np.uint8)
    product = one_node("QLinearMatMul", [*"aszbszsz"], {"a": a, "b": b, **scales}, out_type=TensorProto.UINT8)
    assert counted(product) == 2 * 4 * 5 * 7 * 6
    packed: dict[str, NDArray[Any]] = {"a": ones(4, 5, 64), "b": np.ones((7, 2, 16), np.uint8), "s": ones(14)}
    few_bits = one_node(
        "MatMulNBits", [*"abs"], packed, domain=MICROSOFT, out=[4, 5, 7], K=64, N=7, bits=4, block_size=32
    )
    assert counted(few_bits) == 2 * 4 * 5 * 7 * 64


@pytest.mark.parametrize("operator", ["Softmax", "Relu", "Identity"])
def test_what_multiplies_no_matrices_counts_nothing(operator: str) -> None:
    assert counted(one_node(operator, ["x"], {"x": ones(2, 3)})) == 0


@pytest.mark.parametrize(
    ("operator", "domain"), [("GroupQueryAttention", MICROSOFT), ("SparseConv", "other"), ("LSTM", "")]
)
def test_what_cannot_be_counted_is_an_error_and_not_nothing(operator: str, domain: str) -> None:
    model = one_node(operator, ["x"], {"x": ones(2, 3, 4)}, domain=domain, out=[2, 3, 4])
    with pytest.raises(ExportError, match=operator):
        node_flops(next(iter(ir.from_proto(model).graph)))


def test_an_operator_whose_shapes_nobody_knows_is_an_error() -> None:
    model = one_node("MatMul", ["x", "x"], {"x": ones(3, 3)}, out=None)
    with pytest.raises(ExportError, match="node: expected the shape"):
        node_flops(next(iter(ir.from_proto(model).graph)))


def test_bytes_of_a_single_product_are_its_factors_and_its_result() -> None:
    arrays = {"a": ones(4, 5, 6), "b": ones(6, 7)}
    work = graph_work(ir.from_proto(one_node("MatMul", ["a", "b"], arrays)), {"a": (4, 5, 6), "b": (6, 7)})
    assert work.flops == 2 * 4 * 5 * 6 * 7
    assert work.weight_bytes == 0
    assert work.activation_bytes == 4 * (math.prod((4, 5, 6)) + 6 * 7 + math.prod((4, 5, 7)))
    assert work.outputs == {"out": ((4, 5, 7), "float32")}
