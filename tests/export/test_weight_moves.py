from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.testing import assert_array_equal
from small_graphs import counts, model_of, outputs_of, run
from tiny import COMPONENTS

from latentrt.export.weight_moves import FoldWeightMovesPass, weight_moves
from latentrt.export.weights import Values

RNG = np.random.default_rng(0)
FEEDS = {"x": RNG.standard_normal((3, 4), np.float32)}


def normal(*shape: int) -> Values:
    return RNG.standard_normal(shape, np.float32)


def ints(*values: int) -> Values:
    return np.array(values, np.int64)


def graph(nodes: str, weights: dict[str, Values], reads: list[str] | None = None) -> ir.Model:
    return model_of(f"g (float[n,4] x) => (float[n,m] out) {{ {nodes} }}", weights, reads=reads)


MOVES: dict[str, tuple[str, dict[str, Values]]] = {
    "transpose": ("t = Transpose<perm=[1, 0]>(w) out = MatMul(x, t)", {"w": normal(5, 4)}),
    "transpose without perm": ("t = Transpose(w) out = MatMul(x, t)", {"w": normal(5, 4)}),
    "reshape": ("t = Reshape(w, to) out = MatMul(x, t)", {"w": normal(2, 2, 5), "to": ints(-1, 5)}),
    "reshape that copies a size": ("t = Reshape(w, to) out = MatMul(x, t)", {"w": normal(4, 2, 3), "to": ints(0, -1)}),
    "flatten": ("t = Flatten<axis=2>(w) out = MatMul(x, t)", {"w": normal(2, 2, 5)}),
    "unsqueeze": ("t = Unsqueeze(w, to) out = Add(x, t)", {"w": normal(4), "to": ints(0)}),
    "unsqueeze from the end": ("t = Unsqueeze(w, to) out = Add(x, t)", {"w": normal(3), "to": ints(-1)}),
    "squeeze": ("t = Squeeze(w, to) out = MatMul(x, t)", {"w": normal(1, 4, 1, 5), "to": ints(0, -2)}),
    "squeeze of all": ("t = Squeeze(w) out = MatMul(x, t)", {"w": normal(1, 4, 1, 5)}),
    "identity": ("t = Identity(w) out = MatMul(x, t)", {"w": normal(4, 5)}),
    "chain": (
        "a = Transpose<perm=[1, 0]>(w) b = Reshape(a, to) t = Squeeze(b) out = MatMul(x, t)",
        {"w": normal(5, 4), "to": ints(1, 4, 5)},
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_moved_weight_is_stored_as_it_is_read_under_its_own_name(name: str, tmp_path: Path) -> None:
    nodes, weights = MOVES[name]
    model = graph(nodes, weights)
    expected = run(model, tmp_path, FEEDS)
    assert weight_moves(model)[0] == "w"
    assert FoldWeightMovesPass()(model).modified
    assert len(model.graph) == 1
    assert weight_moves(model) == []
    assert model.graph[0].inputs[1] is model.graph.initializers["w"]
    assert_array_equal(run(model, tmp_path, FEEDS)["out"], expected["out"])
    assert not FoldWeightMovesPass()(model).modified


def test_nothing_is_read_before_the_graph_is_written(tmp_path: Path) -> None:
    reads: list[str] = []
    model = graph("t = Transpose(w) out = MatMul(x, t)", {"w": normal(5, 4)}, reads)
    FoldWeightMovesPass()(model)
    assert reads == []
    ir.save(model, tmp_path / "model.onnx")
    assert set(reads) == {"w"}


SEVERAL: dict[str, tuple[str, dict[str, Values], set[str]]] = {
    "itself too": (
        "t = Transpose(w) a = MatMul(x, t) b = MatMul(a, w) out = Add(x, b)",
        {"w": normal(4, 4)},
        {"w", "w.transposed"},
    ),
    "twice in one way": (
        "t = Transpose(w) u = Transpose(w) a = MatMul(x, t) out = MatMul(a, u)",
        {"w": normal(4, 4)},
        {"w"},
    ),
    "in two ways": (
        "t = Transpose(w) u = Reshape(w, to) a = MatMul(x, t) b = MatMul(x, u) out = Add(a, b)",
        {"w": normal(2, 4), "to": ints(4, 2)},
        {"w.transposed", "w.reshaped"},
    ),
    "at two points of a chain": (
        "t = Reshape(w, to) u = Transpose(t) a = MatMul(x, u) out = MatMul(a, t)",
        {"w": normal(8), "to": ints(2, 4)},
        {"w.reshaped", "w.reshaped.transposed"},
    ),
    "unmoved": ("t = Identity(w) a = MatMul(x, t) out = MatMul(a, w)", {"w": normal(4, 4)}, {"w"}),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_a_weight_read_in_several_ways_is_kept_once_for_each(name: str, tmp_path: Path) -> None:
    nodes, weights, names = SEVERAL[name]
    model = graph(nodes, weights)
    expected = run(model, tmp_path, FEEDS)
    FoldWeightMovesPass()(model)
    assert model.graph.initializers.keys() - {"to"} == names
    assert_array_equal(run(model, tmp_path, FEEDS)["out"], expected["out"])


@pytest.mark.parametrize("nodes", ["t = Transpose(x) s = MatMul(t, x) out = MatMul(x, s)", "out = Transpose(w)"])
def test_what_moves_activations_or_makes_an_output_stays(nodes: str) -> None:
    model = graph(nodes, {"w": normal(5, 4)})
    assert not FoldWeightMovesPass()(model).modified


def unfold(model: ir.Model) -> int:
    """Put a Transpose back before every MatMul by a weight, as a graph traced without weights has it."""
    moved = 0
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not weight.is_initializer() or weight.const_value is None or len(weight.uses()) > 1:
            continue
        transposed = ir.tensor(np.ascontiguousarray(weight.const_value.numpy().T), name=weight.name)
        weight.const_value, weight.shape = transposed, ir.Shape(transposed.shape.numpy())
        transpose = ir.node("Transpose", [weight], attributes={"perm": [1, 0]})
        transpose.outputs[0].name = f"{weight.name}_t"
        model.graph.insert_before(node, transpose)
        node.replace_input_with(1, transpose.outputs[0])
        moved += 1
    return moved


@pytest.mark.parametrize("name", COMPONENTS)
def test_whole_graphs_read_their_weights_as_stored(
    name: str, tiny_bundle: Path, tiny_cases: dict[str, Any], tmp_path: Path
) -> None:
    source = tiny_bundle / name / "model.onnx"
    model = ir.load(source)
    assert weight_moves(model) == []
    folded, names = counts(model), set(model.graph.initializers)
    moved = unfold(model)
    assert moved >= 3
    FoldWeightMovesPass()(model)
    assert counts(model) == folded
    assert set(model.graph.initializers) == names
    feeds = tiny_cases[name][0].feeds
    expected = outputs_of(source, feeds)
    for output, values in run(model, tmp_path, feeds).items():
        assert_array_equal(values, expected[output])
