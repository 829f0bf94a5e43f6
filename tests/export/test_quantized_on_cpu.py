from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from small_graphs import counts, model_of

from latentrt.calibrate.layer_quant import LayerQuant
from latentrt.calibrate.quantize_pass import QuantizePass
from latentrt.export.quantized_on_cpu import QuantizedOnCpuPass

RNG = np.random.default_rng(3)
WEIGHTS = {
    "conv": (0.3 * RNG.standard_normal((32, 16, 3, 3))).astype(np.float32),
    **{name: (RNG.standard_normal((32, 48)) / 6).astype(np.float32) for name in ("to_q", "to_k", "to_v")},
}
# Three products of one tensor, and a convolution.
TEXT = """
    net (float[b,16,h,w] sample, float[b,n,32] text) => (float[b,32,h,w] out, float[b,n,48] q, float[b,n,48] v) {
        out = Conv<pads=[1,1,1,1]>(sample, conv)
        q0 = MatMul(text, to_q)
        k = MatMul(text, to_k)
        q = Add(q0, k)
        v = MatMul(text, to_v)
    }
"""
FEEDS = {
    "sample": RNG.standard_normal((2, 16, 6, 5)).astype(np.float32),
    "text": RNG.standard_normal((2, 7, 32)).astype(np.float32),
}


def graph(*names: str, kind: Any = "int8", scale: float | None = 1 / 64) -> ir.Model:
    model = model_of(TEXT, WEIGHTS)
    QuantizePass({name: LayerQuant(scale=scale, kind=kind) for name in names or WEIGHTS})(model)
    return model


def values(model: ir.Model, name: str) -> Any:
    """Of an initializer."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def run(model: ir.Model, path: Path, *, optimize: bool) -> tuple[list[Any], Counter[str]]:
    """What a graph computes, and the operators that ONNX Runtime made of it."""
    ir.save(model, path)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    made = onnx.load(options.optimized_model_filepath)
    return session.run(None, FEEDS), Counter(node.op_type for node in made.graph.node)


def test_nothing_changes_in_value_and_the_products_are_of_integers(tmp_path: Path) -> None:
    plain, _ = run(graph(), tmp_path / "plain.onnx", optimize=False)
    model = graph()
    assert QuantizedOnCpuPass()(model).modified
    found, _ = run(model, tmp_path / "cpu.onnx", optimize=False)
    for ours, theirs in zip(found, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (counts(graph())["DequantizeLinear"], counts(model)["DequantizeLinear"]) == (6, 5)
    fast, kernels = run(model, tmp_path / "fast.onnx", optimize=True)
    for ours, theirs in zip(fast, plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    # Without the pass, none of the three that read one tensor.
    assert (kernels["MatMulIntegerToFloat"], kernels["MatMul"]) == (3, 0)
    assert run(graph(), tmp_path / "slow.onnx", optimize=True)[1]["MatMulIntegerToFloat"] == 0


def test_floats_of_a_convolution_are_its_integers(tmp_path: Path) -> None:
    plain, model = graph("conv"), graph("conv")
    QuantizedOnCpuPass()(model)
    integers, steps = (values(plain, f"conv.{name}") for name in ("int8", "scale"))
    (name,) = (name for name in model.graph.initializers if name.endswith(".floats"))
    np.testing.assert_array_equal(values(model, name) / steps[:, None, None, None], integers)
    assert "conv.int8" not in model.graph.initializers


@pytest.mark.parametrize(("kind", "scale"), [("fp8", 1 / 64), ("int8", None)])
def test_what_has_no_kernel_keeps_its_values_too(tmp_path: Path, kind: str, scale: float | None) -> None:
    """float8, and weights that alone are quantized."""
    plain, _ = run(graph(kind=kind, scale=scale), tmp_path / "plain.onnx", optimize=False)
    model = graph(kind=kind, scale=scale)
    assert QuantizedOnCpuPass()(model).modified
    found, _ = run(model, tmp_path / "cpu.onnx", optimize=False)
    for ours, theirs in zip(found, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # One for each of the two tensors that are rounded; none for a weight.
    assert counts(model).get("DequantizeLinear", 0) == (2 if kind == "fp8" else 0)


def test_branches_of_a_concat_go_together(tmp_path: Path) -> None:
    text = """
        net (float[b,16,h,w] sample, float[b,16,h,w] skip) => (float[b,32,h,w] out) {
            x = QuantizeLinear(sample, s, zero)
            y = QuantizeLinear(skip, t, zero)
            both = Concat<axis=1>(x, y)
            up = DequantizeLinear(both, s, zero)
            out = Relu(up)
        }
    """
    constants = {"s": np.float32(1 / 32), "t": np.float32(1 / 16), "zero": np.int8(0)}
    feeds = dict.fromkeys(("sample", "skip"), FEEDS["sample"])
    answers = []
    for rewrite in (False, True):
        model = model_of(text, {name: np.array(value) for name, value in constants.items()})
        model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
        assert QuantizedOnCpuPass()(model).modified if rewrite else True
        path = tmp_path / f"{rewrite}.onnx"
        ir.save(model, path)
        answers.append(ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)[0])
    np.testing.assert_array_equal(*answers)
    types = {node.op_type: node.outputs[0].dtype for node in model.graph}
    assert types["Concat"] == types["QuantizeLinear"] == ir.DataType.UINT8


def test_a_graph_that_is_not_quantized_stays() -> None:
    model = model_of(TEXT, WEIGHTS)
    assert not QuantizedOnCpuPass()(model).modified
