from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.testing import assert_array_equal
from small_graphs import counts, model_of, outputs_of, run
from tiny import COMPONENTS

from latentrt.export.cast_cleanup import CastCleanupPass
from latentrt.export.weights import Values

RNG = np.random.default_rng(0)
F32, F16, BF16 = "Cast<to=1>", "Cast<to=10>", "Cast<to=16>"
# Normal, tiny and huge values, some beyond float16.
X = np.concatenate([RNG.standard_normal(6), [1e-8, 6e-5, 65504, 1e6, -1e6, 0.1]]).astype(np.float32).reshape(3, 4)


def graph(nodes: str, kind: str, out: str, weights: dict[str, Values] | None = None) -> ir.Model:
    return model_of(f"g ({kind}[n,4] x) => ({out} out) {{ {nodes} }}", weights)


REMOVED: dict[str, tuple[str, str, str, dict[str, int]]] = {
    "to the same type": (f"a = {F32}(x) out = Neg(a)", "float", "float[n,4]", {"Neg": 1}),
    "there and back": (f"a = {F32}(x) b = {F16}(a) out = Neg(b)", "float16", "float16[n,4]", {"Neg": 1}),
    "by way of a wider type": (
        f"a = {F32}(x) b = {BF16}(a) c = {F32}(b) out = Neg(c)", "float16", "float[n,4]", {"Cast": 2, "Neg": 1},
    ),
    "around moves": (
        f"a = {F32}(x) b = Transpose(a) c = Reshape(b, to) d = {F16}(c) out = Neg(d)",
        "float16", "float16[k]", {"Transpose": 1, "Reshape": 1, "Neg": 1},
    ),
    "around a concat": (
        f"y = Neg(x) a = {F32}(x) b = {F32}(y) c = Concat<axis=1>(a, b) d = {F16}(c) out = Neg(d)",
        "float16", "float16[n,8]", {"Neg": 2, "Concat": 1},
    ),
    "before two of them": (
        f"a = {F32}(x) b = Transpose(a) c = {F16}(b) d = {F16}(b) e = Neg(c) out = Add(d, e)",
        "float16", "float16[4,n]", {"Transpose": 1, "Neg": 1, "Add": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REMOVED)
def test_casts_that_change_nothing_go(name: str, tmp_path: Path) -> None:
    nodes, kind, out, left = REMOVED[name]
    model = graph(nodes, kind, out, {"to": np.array([-1])} if "to)" in nodes else None)
    with np.errstate(over="ignore"):
        feeds = {"x": X.astype(kind.replace("float", "float32") if kind == "float" else kind)}
    expected = run(model, tmp_path, feeds)["out"]
    assert CastCleanupPass()(model).modified
    assert counts(model) == left
    assert_array_equal(run(model, tmp_path, feeds)["out"], expected)
    assert not CastCleanupPass()(model).modified


ROUNDING = {
    "down and up": f"a = {F16}(x) b = {F32}(a) out = Neg(b)",
    "by way of a narrower type": f"a = {F16}(x) b = {BF16}(a) c = {F32}(b) out = Neg(c)",
    "around a move": f"a = {F16}(x) b = Transpose(a) c = {F32}(b) d = Transpose(c) out = Neg(d)",
}


@pytest.mark.parametrize("name", ROUNDING)
def test_casts_that_round_stay(name: str, tmp_path: Path) -> None:
    model = graph(ROUNDING[name], "float", "float[n,4]")
    expected = run(model, tmp_path, {"x": X})["out"]
    assert not np.array_equal(expected, -X)
    CastCleanupPass()(model)
    assert counts(model)["Cast"] >= 2
    assert_array_equal(run(model, tmp_path, {"x": X})["out"], expected)


@pytest.mark.parametrize(
    ("nodes", "out"),
    [
        # Something else reads the moved values in the wide type, or the graph returns them.
        (f"a = {F32}(x) b = Transpose(a) c = {F16}(b) d = Neg(b) e = {F32}(c) out = Add(d, e)", "float[4,n]"),
        (f"a = {F32}(x) b = Exp(a) c = {F16}(b) out = {F32}(c)", "float[n,4]"),
    ],
)
def test_what_computes_in_the_wide_type_keeps_it(nodes: str, out: str, tmp_path: Path) -> None:
    model, feeds = graph(nodes, "float16", out), {"x": np.clip(X, -9, 9).astype(np.float16)}
    expected = run(model, tmp_path, feeds)["out"]
    CastCleanupPass()(model)
    assert_array_equal(run(model, tmp_path, feeds)["out"], expected)


def test_outputs_keep_their_type_and_name(tmp_path: Path) -> None:
    model = graph(f"a = {F32}(x) out = {F16}(a)", "float16", "float16[n,4]")
    feeds = {"x": np.clip(X, -9, 9).astype(np.float16)}
    CastCleanupPass()(model)
    assert_array_equal(run(model, tmp_path, feeds)["out"], feeds["x"])


def test_a_cast_weight_is_converted_when_it_is_read(tmp_path: Path) -> None:
    reads: list[str] = []
    text = f"g (float16[n,4] x) => (float16[n,3] out) {{ a = {F16}(w) out = MatMul(x, a) }}"
    weight = np.resize(X, (4, 3))
    model = model_of(text, {"w": weight}, reads=reads)
    feeds = {"x": np.eye(4, dtype=np.float16)[[2, 0, 1]]}
    assert CastCleanupPass()(model).modified
    assert reads == []
    assert counts(model) == {"MatMul": 1}
    stored = model.graph.initializers["w"].const_value
    assert stored is not None
    with np.errstate(over="ignore"):
        assert_array_equal(stored.numpy(), weight.astype(np.float16))
    assert run(model, tmp_path, feeds)["out"].dtype == np.float16


@pytest.mark.parametrize("name", COMPONENTS)
def test_whole_half_precision_graphs_give_the_same_with_no_more_casts(
    name: str, tiny_bundle: Path, tiny_cases: dict[str, Any], tmp_path: Path
) -> None:
    source, feeds = tiny_bundle / name / "model.fp16.onnx", tiny_cases[name][0].feeds
    model = ir.load(source)
    before = counts(model)
    # Around every transposition a pair that changes nothing, as converters that do not look around leave them.
    for node in [
        node for node in model.graph if node.op_type == "Transpose" and node.outputs[0].dtype == ir.DataType.FLOAT16
    ]:
        up = ir.node("Cast", node.inputs, attributes={"to": ir.DataType.FLOAT})
        up.outputs[0].dtype = ir.DataType.FLOAT
        model.graph.insert_before(node, up)
        node.replace_input_with(0, up.outputs[0])
        down = ir.node("Cast", node.outputs, attributes={"to": ir.DataType.FLOAT16})
        down.outputs[0].dtype = ir.DataType.FLOAT16
        node.outputs[0].replace_all_uses_with(down.outputs[0])
        down.replace_input_with(0, node.outputs[0])
        node.outputs[0].dtype = ir.DataType.FLOAT
        model.graph.insert_after(node, down)
    assert counts(model)["Cast"] >= before["Cast"] + 2
    CastCleanupPass()(model)
    assert counts(model)["Cast"] <= before["Cast"]
    expected = outputs_of(source, feeds)
    for output, values in run(model, tmp_path, feeds).items():
        assert_array_equal(values, expected[output])
