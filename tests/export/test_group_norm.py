from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from small_graphs import counts, model_of, outputs_of, run
from tiny import COMPONENTS

from latentrt.export.group_norm import InstanceGroupNormPass, NativeGroupNormPass, ShapeFreeGroupNormPass
from latentrt.export.weights import Values

RNG = np.random.default_rng(0)
X = {"x": RNG.standard_normal((3, 12, 5, 7), np.float32) * 4 + 1}


def exported(nodes: str = "out = Add(scaled, bias)", changes: Mapping[str, Values] | None = None) -> ir.Model:
    """A group norm of 12 channels in 4 groups as the exporter writes it."""
    text = f"""
    g (float[n,12,h,w] x) => (float[n,12,h,w] out) {{
        grouped = Reshape(x, to)
        normed = InstanceNormalization<epsilon=0.001>(grouped, ones, zeros)
        shape = Shape(x)
        back = Reshape(normed, shape)
        scaled = Mul(back, scale)
        {nodes}
    }}
    """
    weights = {
        "to": np.array([0, 4, -1]),
        "ones": np.ones(4, np.float32),
        "zeros": np.zeros(4, np.float32),
        "scale": RNG.standard_normal((12, 1, 1), np.float32),
        "bias": RNG.standard_normal((12, 1, 1), np.float32),
    }
    return model_of(text, {**weights, **(changes or {})})


def oracle(model: ir.Model) -> Values:
    weights = [model.graph.initializers[name].const_value for name in ("scale", "bias")]
    scale, bias = (torch.from_numpy(np.array(w.numpy()).reshape(-1)) for w in weights if w is not None)
    return torch.nn.functional.group_norm(torch.from_numpy(X["x"]), 4, scale, bias, eps=0.001).numpy()


def test_the_shape_is_not_computed_any_more_and_nothing_changes(tmp_path: Path) -> None:
    model = exported()
    expected = run(model, tmp_path, X)["out"]
    assert ShapeFreeGroupNormPass()(model).modified
    assert counts(model) == {"Reshape": 2, "InstanceNormalization": 1, "Mul": 1, "Add": 1}
    result = run(model, tmp_path, X)["out"]
    assert_array_equal(result, expected)
    assert_allclose(result, oracle(model), rtol=1e-5, atol=1e-5)
    assert not ShapeFreeGroupNormPass()(model).modified


@pytest.mark.parametrize("shape_free", [True, False])
def test_the_native_operator_gives_the_same(shape_free: bool, tmp_path: Path) -> None:
    model = exported()
    if shape_free:
        ShapeFreeGroupNormPass()(model)
    assert NativeGroupNormPass()(model).modified
    assert counts(model) == {"GroupNormalization": 1}
    assert model.opset_imports[""] == 21
    assert [value.name for value in model.graph[0].inputs if value is not None] == ["x", "scale", "bias"]
    assert_allclose(run(model, tmp_path, X)["out"], oracle(model), rtol=1e-5, atol=1e-5)
    assert not NativeGroupNormPass()(model).modified


def test_there_and_back_again(tmp_path: Path) -> None:
    model = exported()
    before, result = counts(model), run(model, tmp_path, X)["out"]
    NativeGroupNormPass()(model)
    assert InstanceGroupNormPass()(model).modified
    assert counts(model) == before
    assert_array_equal(run(model, tmp_path, X)["out"], result)
    assert not InstanceGroupNormPass()(model).modified


@pytest.mark.parametrize(
    "changes",
    [
        {"ones": np.full(4, 2, np.float32)},
        {"zeros": np.full(4, 0.5, np.float32)},
        {"to": np.array([-1, 4, 105])},
    ],
)
def test_another_instance_normalization_is_no_group_norm(changes: dict[str, Values]) -> None:
    for graph_pass in (ShapeFreeGroupNormPass(), NativeGroupNormPass()):
        assert not graph_pass(exported(changes=changes)).modified


@pytest.mark.parametrize("nodes", ["out = Add(scaled, x)", "low = Add(scaled, bias) out = Mul(low, scaled)"])
def test_what_is_not_of_the_channels_or_is_read_twice_is_not_taken_in(nodes: str) -> None:
    assert not NativeGroupNormPass()(exported(nodes)).modified


def test_a_norm_that_is_reshaped_elsewhere_is_left_alone() -> None:
    model = exported()
    shape = next(node for node in model.graph if node.op_type == "Shape")
    other = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 12, "w", "h"]))
    model.graph.inputs.append(other)
    shape.replace_input_with(0, other)
    for graph_pass in (ShapeFreeGroupNormPass(), NativeGroupNormPass()):
        assert not graph_pass(model).modified


@pytest.mark.parametrize("name", COMPONENTS[1:])
def test_whole_graphs_have_no_shape_in_their_group_norms_and_give_the_same(
    name: str, tiny_bundle: Path, tiny_cases: dict[str, Any], tmp_path: Path
) -> None:
    source, feeds = tiny_bundle / name / "model.onnx", tiny_cases[name][0].feeds
    model = ir.load(source)
    expected = outputs_of(source, feeds)
    ShapeFreeGroupNormPass()(model)
    before, norms = len(model.graph), counts(model)["InstanceNormalization"]
    assert norms > 8
    targets = {
        reader.inputs[1]
        for node in model.graph
        if node.op_type == "InstanceNormalization"
        for reader in node.outputs[0].consumers()
    }
    assert all(target is not None and target.const_value is not None for target in targets)
    for output, values in run(model, tmp_path, feeds).items():
        assert_array_equal(values, expected[output])
    NativeGroupNormPass()(model)
    assert counts(model)["GroupNormalization"] == norms
    assert len(model.graph) <= before - 4 * norms
    for output, values in run(model, tmp_path, feeds).items():
        assert_allclose(values, expected[output], rtol=1e-4, atol=1e-4)
