from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from small_graphs import counts, model_of, outputs_of, run
from tiny import COMPONENTS

from latentrt.export.silu import SiluPass

X = np.concatenate([np.linspace(-20, 20, 41), [-90, -1e-6, 1e-6, 88]]).astype(np.float32)
HEADER = '<ir_version: 10, opset_import: ["" : 24]>'
CONSTANTS = {"one": np.float32(1), "minus": np.float32(-1), "quick": np.float32(1.702)}
FORMS = {
    "swish": "out = Swish(x)",
    "division": "a = Neg(x) b = Exp(a) c = Add(one, b) out = Div(x, c)",
    "division, turned": "a = Mul(minus, x) b = Exp(a) c = Add(b, one) out = Div(x, c)",
    "reversed": "a = Sigmoid(x) out = Mul(a, x)",
    "as it should be": "a = Sigmoid(x) out = Mul(x, a)",
}
QUICK = {
    "swish": "out = Swish<alpha=1.702>(x)",
    "reversed": "a = Mul(quick, x) b = Sigmoid(a) out = Mul(b, x)",
    "as it should be": "a = Mul(x, quick) b = Sigmoid(a) out = Mul(x, b)",
}


def graph(nodes: str) -> ir.Model:
    constants = {name: np.array(value) for name, value in CONSTANTS.items() if name in nodes}
    return model_of(f"{HEADER} g (float[n] x) => (float[n] out) {{ {nodes} }}", constants)


@pytest.mark.parametrize("name", FORMS)
def test_every_silu_is_a_product_with_a_sigmoid(name: str, tmp_path: Path) -> None:
    model = graph(FORMS[name])
    assert SiluPass()(model).modified == (name != "as it should be")
    assert [node.op_type for node in model.graph] == ["Sigmoid", "Mul"]
    assert model.graph[1].inputs[0] is model.graph.inputs[0]
    expected = torch.nn.functional.silu(torch.from_numpy(X)).numpy()
    assert_allclose(run(model, tmp_path, {"x": X})["out"], expected, rtol=1e-6, atol=1e-6)
    assert not SiluPass()(model).modified


@pytest.mark.parametrize("name", QUICK)
def test_quick_gelu_keeps_its_factor(name: str, tmp_path: Path) -> None:
    model = graph(QUICK[name])
    SiluPass()(model)
    assert [node.op_type for node in model.graph] == ["Mul", "Sigmoid", "Mul"]
    assert model.graph[2].inputs[0] is model.graph.inputs[0]
    expected = torch.from_numpy(X) * torch.sigmoid(1.702 * torch.from_numpy(X))
    assert_allclose(run(model, tmp_path, {"x": X})["out"], expected.numpy(), rtol=1e-6, atol=1e-6)
    assert not SiluPass()(model).modified


@pytest.mark.parametrize(
    "nodes",
    [
        "a = Neg(x) b = Exp(a) c = Add(quick, b) out = Div(x, c)",
        "a = Exp(x) c = Add(one, a) out = Div(x, c)",
        "a = Sigmoid(x) b = Neg(x) out = Mul(a, b)",
    ],
)
def test_what_only_looks_alike_is_left_alone(nodes: str) -> None:
    assert not SiluPass()(graph(nodes)).modified


@pytest.mark.parametrize("name", COMPONENTS)
def test_whole_graphs_give_the_same_in_the_one_form(
    name: str, tiny_bundle: Path, tiny_cases: dict[str, Any], tmp_path: Path
) -> None:
    source, feeds = tiny_bundle / name / "model.onnx", tiny_cases[name][0].feeds
    model = ir.load(source)
    expected = outputs_of(source, feeds)
    gates = [node for node in model.graph if node.op_type == "Sigmoid"]
    for gate in gates:  # turned round, they are put right again
        (product,) = [user for user, _ in gate.outputs[0].uses() if user.op_type == "Mul"]
        left, right = product.inputs
        product.replace_input_with(0, right)
        product.replace_input_with(1, left)
    before = counts(model)
    assert SiluPass()(model).modified
    assert counts(model) == before
    for gate in gates:
        (product,) = [user for user, _ in gate.outputs[0].uses()]
        assert product.inputs[1] is gate.outputs[0]
    for output, values in run(model, tmp_path, feeds).items():
        assert_array_equal(values, expected[output])
