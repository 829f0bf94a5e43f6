from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_bundle import SIZES, network
from small_graphs import model_of

from latentrt.calibrate.layer_quant import LayerQuant
from latentrt.calibrate.placement import Placement, check_placement
from latentrt.calibrate.quantize_pass import QuantizePass

WEIGHTS: dict[str, Any] = {
    "w": np.ones((4, 8), np.int8),
    "float_w": np.ones((4, 8), np.float32),
    "s": np.array(0.5, np.float32),
    "s2": np.array(0.25, np.float32),
    "half_s": np.array(0.5, np.float16),
    "nothing": np.array(0, np.float32),
    "nan": np.array(np.nan, np.float32),
    "by_channel": np.full(8, 0.5, np.float32),
    "z": np.array(0, np.int8),
    "zs": np.zeros(8, np.int8),
    "three": np.array(3, np.int8),
    "unsigned": np.array(0, np.uint8),
    "bias": np.zeros(8, np.int32),
}


def check(body: str, inputs: str = "float[n,4] x, float r") -> Placement:
    names = WEIGHTS.keys() & set(re.findall(r"\w+", body))
    model = model_of(f"net ({inputs}) => (y) {{ {body} }}", {name: WEIGHTS[name] for name in names})
    return check_placement(model)


STORED = "dw = DequantizeLinear<axis=1>(w, by_channel)"
ROUNDED = "fw = QuantizeLinear<axis=1>(float_w, by_channel, zs) dw = DequantizeLinear<axis=1>(fw, by_channel)"


def pair(scale: str = "s", zero: str = "z") -> str:
    return f"q = QuantizeLinear(x, {scale}, {zero}) d = DequantizeLinear(q, {scale}, {zero}) "


PAIR = pair()
PRODUCT = f" {STORED} y = MatMul(d, dw)"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (PAIR + PRODUCT, None),
        # Weights alone: the operator computes in floats.
        (f"{STORED} y = MatMul(x, dw)", None),
        (f"{ROUNDED} {PAIR} y = MatMul(d, dw)", None),
        # Without a zero point, ONNX has it be uint8.
        (f"{ROUNDED} {PAIR} y = MatMul(d, dw)".replace(", zs", ""), "uint8, which TensorRT has no kernels for"),
        (pair(zero="three") + PRODUCT, "a zero point that is not 0"),
        (pair(zero="unsigned") + PRODUCT, "uint8, which TensorRT has no kernels for"),
        (pair(scale="r") + PRODUCT, "a scale that is computed in the run"),
        ("t = Abs(s) " + pair(scale="t") + PRODUCT, "a scale that is computed in the run"),
        (pair(scale="nothing") + PRODUCT, "a scale that is not a positive number"),
        (pair(scale="nan") + PRODUCT, "a scale that is not a positive number"),
        (f"{PAIR}{STORED} m = MatMul(d, dw) b = DequantizeLinear(bias, s) y = Add(m, b)", "an int32 bias with a scale"),
    ],
)
def test_what_tensorrt_refuses_is_found(body: str, problem: str | None) -> None:
    found = check(body)
    assert found.total == {"MatMul": 1}
    assert [text.startswith(problem or "") for text in found.problems] == ([] if problem is None else [True])


def test_scales_have_the_type_of_what_they_scale() -> None:
    model = model_of(
        f"net (float[n,4] x) => (y) {{ {PAIR}{PRODUCT} }}",
        {name: WEIGHTS[name] for name in ("s", "z", "w", "by_channel")},
    )
    assert check_placement(model).problems == ()
    model.graph.initializers["s"].type = ir.TensorType(ir.DataType.FLOAT16)
    model.graph.initializers["s"].const_value = ir.tensor(WEIGHTS["half_s"])
    (problem,) = check_placement(model).problems
    assert problem.startswith("a scale of another type than what it scales: ")


TWICE = f"q2 = QuantizeLinear(x, s2, z) d2 = DequantizeLinear(q2, s2, z) {STORED} m = MatMul(d, dw) n = MatMul(d2, dw)"


@pytest.mark.parametrize(
    ("body", "warning"),
    [
        ("y = Add(d, x)", "Add with quantized inputs"),
        ("y = MatMul(d, float_w)", "MatMul with one input quantized and one not"),
        ("y = Softmax(d)", "Softmax with quantized inputs"),
        ("t = Transpose(d) y = Relu(t)", "Relu with quantized inputs"),
        (f"{TWICE} y = Add(m, n)", "one tensor quantized more than once"),
    ],
)
def test_what_costs_time_is_a_warning(body: str, warning: str) -> None:
    found = check(PAIR + body)
    assert found.problems == ()
    assert [text.startswith(warning) for text in found.warnings] == [True]


def test_layers_and_multiplications_are_counted() -> None:
    model = network()
    QuantizePass({"conv2.weight": LayerQuant(0.05), "to_k.weight": LayerQuant(0.05), "to_v.weight": LayerQuant(0.05)})(
        model
    )
    found = check_placement(model, SIZES)
    assert (found.problems, found.warnings) == ((), ())
    assert found.quantized == {"Conv": 1, "MatMul": 2}
    assert found.total == {"Conv": 3, "MatMul": 2}
    # By hand: 16 x 16 pixels of a 3 x 3 convolution from 24 to 16, and 77 tokens from 32 to 16, twice.
    quantized = 256 * 16 * 24 * 9 + 2 * 77 * 32 * 16
    assert found.macs == pytest.approx(quantized / (quantized + 256 * 24 * 16 * 9 + 256 * 16 * 40))
    assert check_placement(network()).quantized == {}


def test_branches_of_a_concat_are_one_pair() -> None:
    """As the split of a shortcut has it, while another convolution reads one of the branches with its own scale."""
    text = """
        net (float[b,2,h,w] x, float[b,2,h,w] y) => (out) {
            qx = QuantizeLinear(x, s, z)
            qy = QuantizeLinear(y, s, z)
            q = Concat<axis=1>(qx, qy)
            d = DequantizeLinear(q, s, z)
            weight = DequantizeLinear<axis=0>(k, ks)
            a = Conv(d, weight)
            own = QuantizeLinear(x, s, z)
            dx = DequantizeLinear(own, s, z)
            other = DequantizeLinear<axis=0>(k2, ks)
            c = Conv(dx, other)
            out = Add(a, c)
        }
    """
    held = {"s": WEIGHTS["s"], "z": WEIGHTS["z"], "ks": np.ones(3, np.float32)}
    kernels = {"k": np.ones((3, 4, 1, 1), np.int8), "k2": np.ones((3, 2, 1, 1), np.int8)}
    found = check_placement(model_of(text, {**held, **kernels}))
    assert (found.problems, found.warnings) == ((), ())
    assert found.quantized == {"Conv": 2}
