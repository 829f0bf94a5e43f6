from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.testing import assert_allclose
from small_graphs import counts, model_of, outputs_of, run

from latentrt.export.gelu import GeluPass
from latentrt.export.weights import Values

X = np.linspace(-6, 6, 49).astype(np.float32)
FACTORS: dict[str, Values] = {
    "root": np.array(2**0.5, np.float32),
    "inverse": np.array(0.5**0.5, np.float32),
    "half": np.array(0.5, np.float32),
    "one": np.array(1, np.float32),
}
ERF = "a = Div(x, root) e = Erf(a) p = Add(e, one)"
FORMS = {
    "half last": f"{ERF} m = Mul(x, p) out = Mul(m, half)",
    "half first": f"{ERF} m = Mul(x, half) out = Mul(m, p)",
    "half on the sum": f"{ERF} m = Mul(half, p) out = Mul(x, m)",
    "by the inverse": "a = Mul(inverse, x) e = Erf(a) p = Add(one, e) m = Mul(p, x) out = Mul(half, m)",
}


def graph(nodes: str, *, opset: int = 20, tensor: str = "float[n]") -> ir.Model:
    header = f'<ir_version: 10, opset_import: ["" : {opset}]>'
    dtype = np.float16 if tensor.startswith("float16") else np.float32
    factors = {name: value.astype(dtype) for name, value in FACTORS.items() if name in nodes}
    return model_of(f"{header} g ({tensor} x) => ({tensor} out) {{ {nodes} }}", factors)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tensor", ["float[n]", "float16[n]"])
def test_the_chain_around_an_erf_becomes_one_operator(name: str, tensor: str, tmp_path: Path) -> None:
    model = graph(FORMS[name], tensor=tensor)
    assert len(model.graph) == 5
    assert GeluPass()(model).modified
    assert counts(model) == {"Gelu": 1}
    bound = 1e-6 if tensor == "float[n]" else 3e-3
    feeds = {"x": X.astype(np.float32 if tensor == "float[n]" else np.float16)}
    expected = torch.nn.functional.gelu(torch.from_numpy(X)).numpy()
    assert_allclose(run(model, tmp_path, feeds)["out"], expected, rtol=bound, atol=bound)
    assert not GeluPass()(model).modified


@pytest.mark.parametrize(
    "nodes",
    [
        f"{ERF} m = Mul(x, p) out = Mul(m, root)",
        f"{ERF} n = Neg(x) m = Mul(n, p) out = Mul(m, half)",
        "a = Mul(half, x) e = Erf(a) p = Add(one, e) m = Mul(p, x) out = Mul(half, m)",
        f"{ERF} m = Mul(x, p) h = Mul(m, half) out = Add(h, m)",
        "out = Gelu<approximate=\"tanh\">(x)",
    ],
)  # fmt: skip
def test_what_is_another_function_stays(nodes: str, tmp_path: Path) -> None:
    model = graph(nodes)
    before = counts(model)
    assert not GeluPass()(model).modified
    assert counts(model) == before


def test_opsets_without_the_operator_keep_the_chain() -> None:
    assert not GeluPass()(graph(FORMS["half last"], opset=18)).modified


def test_a_whole_graph_of_chains_is_the_same_with_the_operator(
    tiny_bundle: Path, tiny_cases: dict[str, Any], tmp_path: Path
) -> None:
    source, feeds = tiny_bundle / "unet/model.onnx", tiny_cases["unet"][0].feeds
    model = ir.load(source)
    expected = outputs_of(source, feeds)["out_sample"]
    gelus = [node for node in model.graph if node.op_type == "Gelu"]
    assert len(gelus) == 4
    names = {number: f"factor_{number}" for number in (2.0**0.5, 1.0, 0.5)}
    for number, name in names.items():
        tensor = ir.tensor(np.array(number, np.float32), name=name)
        model.graph.register_initializer(
            ir.Value(name=name, const_value=tensor, shape=ir.Shape([]), type=ir.TensorType(tensor.dtype))
        )
    root, one, half = (model.graph.initializers[name] for name in names.values())
    for gelu in gelus:
        data = gelu.inputs[0]
        chain = [ir.node("Div", [data, root])]
        chain.append(ir.node("Erf", chain[-1].outputs))
        chain.append(ir.node("Add", [chain[-1].outputs[0], one]))
        chain.append(ir.node("Mul", [data, chain[-1].outputs[0]]))
        chain.append(ir.node("Mul", [chain[-1].outputs[0], half]))
        model.graph.insert_before(gelu, chain)
        gelu.outputs[0].replace_all_uses_with(chain[-1].outputs[0])
        model.graph.remove(gelu, safe=True)
    assert GeluPass()(model).modified
    assert counts(model)["Gelu"] == 4
    assert counts(model)["Erf"] == 0
    assert_allclose(run(model, tmp_path, feeds)["out_sample"], expected, rtol=1e-5, atol=1e-5)
