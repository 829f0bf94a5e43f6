from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.testing import assert_array_equal
from small_graphs import counts, model_of, outputs_of, run
from tiny import COMPONENTS

from latentrt.export.group_norm import NativeGroupNormPass
from latentrt.export.shape_arithmetic import shape_nodes
from latentrt.export.static_shapes import input_dimensions, static_graph
from latentrt.runtime.errors import ExportError, UsageError

TEXT = """
g (float[batch,n,4] x) => (float[batch,m,2] out) {
    batch = Shape<start=0, end=1>(x)
    n = Shape<start=1, end=2>(x)
    twice = Mul(n, two)
    to = Concat<axis=0>(batch, twice, two)
    y = Reshape(x, to)
    out = MatMul(y, w)
}
"""


def halves(reads: list[str] | None = None) -> ir.Model:
    return model_of(TEXT, {"two": np.array([2]), "w": np.eye(2, dtype=np.float32)}, reads=reads)


def test_sizes_are_folded_and_the_original_is_as_it_was(tmp_path: Path) -> None:
    model = halves()
    static = static_graph(model, {"batch": 3, "n": 5})
    assert counts(static) == {"Reshape": 1, "MatMul": 1}
    assert [list(value.shape or ()) for value in (*static.graph.inputs, *static.graph.outputs)] == [
        [3, 5, 4],
        [3, 10, 2],
    ]
    assert len(model.graph) == 6
    assert input_dimensions(model) == ("batch", "n")
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 5, 4), np.float32)}
    assert_array_equal(run(static, tmp_path, feeds)["out"], run(model, tmp_path, feeds)["out"])


def test_weights_are_neither_read_nor_copied() -> None:
    reads: list[str] = []
    text = "g (float[batch,400] x) => (float[batch,300] out) { t = Transpose(w) out = MatMul(x, t) }"
    model = model_of(text, {"w": np.ones((300, 400), np.float32)}, reads=reads)
    static = static_graph(model, {"batch": 2})
    assert reads == []
    assert static.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value


@pytest.mark.parametrize("sizes", [{}, {"batch": 1}, {"batch": 1, "n": 2, "height": 3}, {"batch": 0, "n": 2}])
def test_wrong_sizes_are_usage_errors_with_the_names(sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="batch"):
        static_graph(halves(), sizes)


def test_a_shape_that_depends_on_values_is_an_export_error() -> None:
    model = model_of("g (float[batch] x) => (int64[1,k] out) { out = NonZero(x) }")
    with pytest.raises(ExportError, match="out"):
        static_graph(model, {"batch": 4})


def test_native_group_norms_have_a_shape_too(tiny_bundle: Path, tiny_cases: dict[str, Any], tmp_path: Path) -> None:
    model, feeds = ir.load(tiny_bundle / "vae_decoder/model.onnx"), tiny_cases["vae_decoder"][0].feeds
    NativeGroupNormPass()(model)
    expected = run(model, tmp_path, feeds)["sample"]
    static = static_graph(model, sizes_of(model, feeds))
    assert counts(static)["GroupNormalization"] == counts(model)["GroupNormalization"] > 8
    assert_array_equal(run(static, tmp_path, feeds)["sample"], expected)


def sizes_of(model: ir.Model, feeds: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that feeds have, by the names of the dimensions."""
    return {
        str(dim.value): int(size)
        for value in model.graph.inputs
        for dim, size in zip(value.shape or (), feeds[str(value.name)].shape, strict=True)
        if isinstance(dim, ir.SymbolicDim)
    }


@pytest.mark.parametrize("name", COMPONENTS)
def test_whole_graphs_with_sizes_of_their_own_give_the_same(
    name: str, tiny_bundle: Path, tiny_cases: dict[str, Any], tmp_path: Path
) -> None:
    source = tiny_bundle / name / "model.onnx"
    model = ir.load(source)
    case = tiny_cases[name][0]
    static = static_graph(model, sizes_of(model, case.feeds))
    assert shape_nodes(static) == []
    assert len(static.graph) <= len(model.graph) - len(shape_nodes(model))
    assert all(out.shape is not None and out.shape.is_static() for node in static.graph for out in node.outputs)
    expected = outputs_of(source, case.feeds)
    for output, values in run(static, tmp_path, case.feeds).items():
        assert_array_equal(values, expected[output])
