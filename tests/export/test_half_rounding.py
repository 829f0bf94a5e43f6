from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from small_graphs import model_of

from latentrt.export.activation_range import activation_ranges, recorded_runs
from latentrt.export.half_precision import HALF_TYPES, HalfPrecisionPass
from latentrt.export.half_rounding import HalfRoundingPass, session_beside
from latentrt.runtime.session import OnnxSession

Floats = NDArray[np.float32]
RNG = np.random.default_rng(0)
SAMPLE = RNG.standard_normal((3, 16)).astype(np.float32)
WEIGHT = RNG.standard_normal((16, 16)).astype(np.float32)
SMALL = np.array(1 / 3, np.float32)
TEXT = """
    net (float[b,16] sample) => (float[16,b] out_sample) {
        scaled = Mul(sample, small)
        product = MatMul(scaled, weight)
        kept = Mul(product, product)
        gate = Sigmoid(kept)
        silu = Mul(kept, gate)
        again = MatMul(silu, weight)
        out_sample = Transpose<perm = [1, 0]>(again)
    }
"""


def half_graph(path: Path, precision: str) -> Path:
    model = model_of(TEXT, {"weight": WEIGHT, "small": SMALL})
    HalfPrecisionPass(HALF_TYPES[precision], {"kept"} if precision == "mixed" else ())(model)
    ir.save(model, path, external_data=f"{path.name}_data", size_threshold_bytes=0)
    return path


def emulated(precision: str) -> Floats:
    """The graph written out in NumPy: float32 arithmetic, every result rounded to the type that it is stored in."""
    half = HALF_TYPES[precision].numpy()

    def rounded(x: Floats) -> Floats:
        return x.astype(half).astype(np.float32)

    kept_in = (lambda x: x) if precision == "mixed" else rounded
    weight = rounded(WEIGHT)
    product = rounded(rounded(rounded(SAMPLE) * rounded(SMALL)) @ weight)
    kept = kept_in(product * product)
    gate = kept_in((1 / (1 + np.exp(-kept))).astype(np.float32))
    silu = rounded(kept * gate)
    return np.asarray(rounded(silu @ weight).T)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "mixed"])
def test_every_stored_tensor_is_rounded_and_nothing_else(precision: str, tmp_path: Path) -> None:
    """Nothing in ONNX Runtime folds the weights' Casts away or merges a pair of them with its neighbours."""
    path = half_graph(tmp_path / "model.onnx", precision)
    found = np.asarray(recorded_runs(path, [{"sample": SAMPLE}], rounding=True)[0][0]["out_sample"], np.float32)
    wanted = emulated(precision)
    # Sums in another order may round the other way, once in a while; without the rounding all would be off.
    steps = np.abs(found - wanted) / np.spacing(wanted.astype(np.float16)).astype(np.float32)
    one = 1 if precision != "bf16" else 8
    assert steps.max() <= one
    assert (found == wanted).mean() > 0.9
    stored = HALF_TYPES[precision].numpy()
    np.testing.assert_array_equal(found, found.astype(stored).astype(np.float32))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["model.onnx", "model.onnx_data"]


def test_bfloat16_costs_eight_times_float16(tmp_path: Path) -> None:
    full = model_of(TEXT, {"weight": WEIGHT, "small": SMALL})
    ir.save(full, tmp_path / "full.onnx")
    wanted = np.asarray(OnnxSession(tmp_path / "full.onnx")({"sample": SAMPLE})["out_sample"], np.float32)

    def error(precision: str) -> float:
        path = half_graph(tmp_path / f"{precision}.onnx", precision)
        found = np.asarray(recorded_runs(path, [{"sample": SAMPLE}], rounding=True)[0][0]["out_sample"], np.float32)
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    assert error("bf16") / error("fp16") == pytest.approx(8, rel=0.5)


def test_without_rounding_only_the_weights_are_half(tmp_path: Path) -> None:
    path = half_graph(tmp_path / "model.onnx", "fp16")
    model = ir.load(path)
    HalfRoundingPass(rounding=False)(model)
    found = np.asarray(session_beside(model, path)({"sample": SAMPLE})["out_sample"], np.float32)
    weight, small = (x.astype(np.float16).astype(np.float32) for x in (WEIGHT, SMALL))
    product = (SAMPLE * small) @ weight
    kept = product * product
    wanted = (kept / (1 + np.exp(-kept)) @ weight).T
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_ranges_of_a_half_graph_are_those_of_its_fp32_graph(tmp_path: Path) -> None:
    """Of the tensors by their own names; what would overflow shows by how much."""
    text = """
        net (float[b,3] sample) => (float[b,3] out_sample) <float small = {0.00001}> {
            doubled = MatMul(sample, twice)
            squared = Mul(doubled, doubled)
            fourth = Mul(squared, squared)
            normed = Mul(fourth, small)
            out_sample = MatMul(normed, twice)
        }
    """
    model = model_of(text, {"twice": 2 * np.eye(3, dtype=np.float32)})
    HalfPrecisionPass()(model)
    ir.save(model, tmp_path / "half.onnx")
    ranges = activation_ranges(tmp_path / "half.onnx", [{"sample": np.array([[-10, 2, 3]], np.float32)}])
    found = {name: ranges[name] for name in ("doubled", "squared", "fourth", "normed", "out_sample")}
    assert found == pytest.approx(
        {"doubled": 20, "squared": 400, "fourth": 160_000, "normed": 1.6, "out_sample": 3.2}, rel=1e-2
    )


def test_a_masks_stand_in_for_infinity_is_no_activation_in_half_either(tmp_path: Path) -> None:
    text = """
        net (float[b,3] sample, bool[b,3] seen) => (float[b,3] out_sample) <float zero = {0}> {
            mask = Where(seen, zero, lowest)
            scores = Add(sample, mask)
            out_sample = Softmax(scores)
        }
    """
    model = model_of(text, {"lowest": np.array(np.finfo(np.float32).min)})
    HalfPrecisionPass()(model)
    ir.save(model, tmp_path / "half.onnx")
    feeds = {"sample": np.array([[5, 2, 3]], np.float32), "seen": np.array([[True, True, False]])}
    ranges = activation_ranges(tmp_path / "half.onnx", [feeds])
    assert (ranges["mask"], ranges["scores"]) == (0, 5)


CHAIN = """
import resource, sys
from pathlib import Path
import numpy as np
from latentrt.export.activation_range import recorded_runs

path, sample = Path(sys.argv[1]), np.ones((int(sys.argv[3]), 1024), np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
recorded_runs(path, [{"sample": sample}], rounding=sys.argv[2] == "rounded")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("what", ["rounded", "ranges"])
def test_a_check_holds_neither_all_weights_in_float32_nor_all_activations(what: str, tmp_path: Path) -> None:
    layers, width, batch = 32, 1024, 1024 if what == "ranges" else 1
    lines = [f"h{i + 1} = MatMul(h{i}, w{i})" for i in range(layers)]
    text = (
        f"net (float[b,{width}] sample) => (float[b,{width}] out_sample) {{ h0 = Neg(sample) "
        + " ".join(lines)
        + f" out_sample = Neg(h{layers}) }}"
    )
    weight = (RNG.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)
    model = model_of(text, {f"w{i}": weight for i in range(layers)})
    HalfPrecisionPass()(model)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx_data")
    stored = layers * weight.size * 2  # mapped while they are read, and so counted
    activations = layers * batch * width * 4 if what == "ranges" else 0
    command = [sys.executable, "-c", CHAIN, str(tmp_path / "model.onnx"), what, str(batch)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # All weights in float32 would be twice `stored` on top.
    assert grown < stored + (2 * stored + activations) / 3
