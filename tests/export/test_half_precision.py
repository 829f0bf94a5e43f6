from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from small_graphs import counts, model_of
from tiny import COMPONENTS

from latentrt.export import half_precision
from latentrt.export.float32_nodes import float32_nodes
from latentrt.export.half_precision import HALF_TYPES, HalfPrecisionPass, cast_count, half_of
from latentrt.runtime.errors import ExportError
from latentrt.runtime.manifest import load_manifest
from latentrt.runtime.session import OnnxSession

FP16, BF16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
TINY = {FP16: np.float32(2.0**-24), BF16: np.float32(2.0**-133)}
LARGEST = {FP16: 65504.0, BF16: 3.3895313892515355e38}
LOWEST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_weights_are_rounded_with_the_edges_of_the_range_handled(dtype: ir.DataType) -> None:
    given = np.array([1 / 3, -1e-41, 1e-41, 0.0, 65504, LOWEST, -np.inf], np.float32)
    found = half_of(given, dtype, name="w")
    third = np.float32(1 / 3).astype(dtype.numpy())
    assert found.dtype == dtype.numpy()
    tiny, largest = TINY[dtype], LARGEST[dtype]
    wanted = np.array([third, -tiny, tiny, 0, 65504 if dtype == FP16 else 65536, -largest, -np.inf], np.float32)
    np.testing.assert_array_equal(found.astype(np.float32), wanted)
    assert given[5] == LOWEST
    # In any order in memory, and as a scalar.
    turned = half_of(np.stack([given, given]).T, dtype, name="w").astype(np.float32)
    np.testing.assert_array_equal(turned, np.stack([wanted, wanted]).T)
    assert half_of(given[1:2].reshape(()), dtype, name="w").astype(np.float32) == -tiny


@pytest.mark.parametrize("value", [65536.0, -1e6])
def test_a_weight_beyond_the_range_is_an_error_that_names_it(value: float) -> None:
    given = np.array([1.0, value], np.float32)
    with pytest.raises(ExportError, match=r"float16: expected weights within 65504, got .* in conv_in\.weight"):
        half_of(given, FP16, name="conv_in.weight")
    half_of(given, BF16, name="conv_in.weight")


WEIGHTS = {
    "first_weight": np.linspace(-1, 1, 4096, dtype=np.float32).reshape(64, 64),
    "second_weight": np.full((64, 64), 1e-9, np.float32),
}
TWO_LAYERS = """
    net (float[b,64] sample) => (float[b,64] out_sample) {
        first = MatMul(sample, first_weight)
        out_sample = MatMul(first, second_weight)
    }
"""


def test_weights_are_converted_when_they_are_read_and_not_before() -> None:
    reads: list[str] = []
    model = model_of(TWO_LAYERS, WEIGHTS, reads=reads)
    HalfPrecisionPass()(model)
    assert reads == []
    assert set(model.graph.initializers) == set(WEIGHTS)  # by the names that refitting goes by
    for name, weight in model.graph.initializers.items():
        assert weight.const_value is not None
        np.testing.assert_array_equal(weight.const_value.numpy(), half_of(WEIGHTS[name], FP16, name=name))
    assert reads == list(WEIGHTS)


def test_a_weight_that_overflows_says_its_name_when_it_is_read() -> None:
    model = model_of(TWO_LAYERS, WEIGHTS | {"second_weight": np.full((64, 64), 1e5, np.float32)})
    HalfPrecisionPass()(model)
    tensor = model.graph.initializers["second_weight"].const_value
    assert tensor is not None
    with pytest.raises(ExportError, match="got 100000 in second_weight"):
        tensor.numpy()


def test_a_bfloat16_graph_is_valid_in_an_opset_that_has_such_convolutions(tmp_path: Path) -> None:
    text = """
        net (float[b,2,h,w] sample) => (float[b,2,h,w] out_sample)
        <float[2,2,1,1] weight = {1, 2, 3, 4}, float[2] scale = {1, 1}, float[2] bias = {0, 0}>
        {
            normed = InstanceNormalization(sample, scale, bias)
            out_sample = Conv(normed, weight)
        }
    """
    model = model_of(text)
    HalfPrecisionPass(BF16)(model)
    ir.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    assert model.opset_imports[""] == 22
    assert [value.dtype for node in model.graph for value in node.outputs] == [BF16, BF16, BF16, ir.DataType.FLOAT]
    assert model.graph.initializers["weight"].const_value is not None
    assert model.graph.initializers["weight"].const_value.numpy().dtype == ml_dtypes.bfloat16


def test_an_opset_whose_operators_changed_their_meaning_since_is_refused() -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        net (float[b,4,h,w] sample) => (float[b,4,h,w] out_sample)
        <float[2] scale = {1, 1}, float[2] bias = {0, 0}>
        { out_sample = GroupNormalization<num_groups = 2>(sample, scale, bias) }
    """
    with pytest.raises(ExportError, match="bf16: expected opset 22"):
        HalfPrecisionPass(BF16)(model_of(text))


def test_control_flow_is_refused() -> None:
    text = """
        net (float[2] sample, bool yes) => (float[2] out_sample) {
            out_sample = If(yes) <
                then_branch = a () => (float[2] x) { x = Identity(sample) },
                else_branch = b () => (float[2] y) { y = Neg(sample) }
            >
        }
    """
    with pytest.raises(ExportError, match="expected no control flow"):
        HalfPrecisionPass()(model_of(text))


# Two islands, kept at `large` and `larger`, with only elementwise operators and moves between them and before.
ISLANDS = """
    net (float[b,4,8] sample) => (float[b,8,4] out_sample)
    <float[8,8] weight, float[8] scale, float[8] bias>
    {
        before = MatMul(sample, weight)
        negated = Neg(before)
        gain = Sigmoid(before)
        large = Mul(negated, gain)
        kept_small = Sigmoid(large)
        moved = Transpose<perm = [0, 2, 1]>(kept_small)
        twice = Add(moved, moved)
        back = Transpose<perm = [0, 2, 1]>(twice)
        larger = Mul(back, scale)
        normed = LayerNormalization(larger, scale, bias)
        gate = Sigmoid(normed)
        silu = Mul(normed, gate)
        after = MatMul(silu, weight)
        out_sample = Transpose<perm = [0, 2, 1]>(after)
    }
"""


def islands() -> ir.Model:
    rng = np.random.default_rng(0)
    shapes = {"weight": (8, 8), "scale": (8,), "bias": (8,)}
    text = ISLANDS.replace("<float[8,8] weight, float[8] scale, float[8] bias>", "")
    return model_of(text, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    return {str(value.name): value.dtype for node in model.graph for value in node.outputs}


def test_kept_tensors_their_makers_and_readers_are_float32_and_islands_merge() -> None:
    model = islands()
    HalfPrecisionPass(keep={"large", "larger"})(model)
    found = types(model)
    full = ["large", "kept_small", "moved", "twice", "back", "larger", "normed"]
    assert [found[name] for name in full] == [ir.DataType.FLOAT] * 7
    assert [found[name] for name in ("before", "gate", "silu", "after")] == [FP16] * 4
    # The input's, the output's, one into the island before its two branches, and one out of it.
    assert found["negated"] == found["gain"] == ir.DataType.FLOAT
    assert counts(model)["Cast"] == 4


def test_an_island_ends_at_the_first_heavy_operator() -> None:
    model = islands()
    HalfPrecisionPass(keep={"before"})(model)
    found = types(model)
    assert [found[name] for name in ("before", "negated", "gain")] == [ir.DataType.FLOAT] * 3
    assert found["normed"] == FP16
    # The whole beginning of the graph is float32: its input needs no Cast.
    assert counts(model)["Cast"] == 2


def test_the_casts_are_as_few_as_trying_every_choice_finds() -> None:
    """Every assignment of the free nodes, for every pair of kept tensors."""
    reference = islands()
    free = [n for n in reference.graph if n.op_type in ("Mul", "Neg", "Sigmoid", "Add", "Transpose")]
    names = [str(node.outputs[0].name) for node in reference.graph]
    position = {str(node.outputs[0].name): index for index, node in enumerate(free)}

    def casts(model: ir.Model, full: set[str]) -> int:
        total = 0
        for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
            maker = value.producer()
            side = maker is None or str(maker.outputs[0].name) in full
            readers = [str(node.outputs[0].name) in full for node, _ in value.uses()]
            readers += [True] if value.is_graph_output() else []
            total += any(reader != side for reader in readers)
        return total

    for first in range(0, len(names) - 1, 2):
        for second in range(first + 1, len(names), 3):
            keep = {names[first], names[second]}
            model = islands()
            found = {str(node.outputs[0].name) for node in float32_nodes(model, keep)}
            forced = {
                str(node.outputs[0].name)
                for node in model.graph
                if keep & {str(v.name) for v in (*node.inputs, *node.outputs) if v is not None}
            }
            assert forced <= found <= forced | set(position)
            choices = []
            for bits in range(2 ** len(free)):
                chosen = {name for name, index in position.items() if bits >> index & 1} | forced
                choices.append((casts(model, chosen), len(chosen)))
            assert (casts(model, found), len(found)) == min(choices)
            HalfPrecisionPass(keep=keep)(model)
            assert counts(model)["Cast"] == casts(islands(), found)


@pytest.mark.parametrize("precision", ["fp16", "mixed"])
def test_a_converted_graph_runs_in_onnx_runtime(precision: str, tmp_path: Path) -> None:
    model, plain = islands(), islands()
    ir.save(plain, tmp_path / "plain.onnx")
    HalfPrecisionPass(HALF_TYPES[precision], {"large", "larger"} if precision == "mixed" else ())(model)
    ir.save(model, tmp_path / "half.onnx")
    feeds = {"sample": np.random.default_rng(1).standard_normal((2, 4, 8)).astype(np.float32)}
    wanted = np.asarray(OnnxSession(tmp_path / "plain.onnx")(feeds)["out_sample"], np.float32)
    found = np.asarray(OnnxSession(tmp_path / "half.onnx")(feeds)["out_sample"], np.float32)
    np.testing.assert_allclose(found, wanted, atol=2e-2)
    assert not np.array_equal(found, wanted)


def test_a_comparison_with_a_kept_tensor_sees_it_in_float32() -> None:
    text = """
        net (float[b,4] sample) => (float[b,4] out_sample)
        <float limit = {70000}, float[4,4] weight, float small = {1}>
        {
            made = MatMul(sample, weight)
            over = Greater(made, limit)
            out_sample = Where(over, small, made)
        }
    """
    weight = {"weight": np.eye(4, dtype=np.float32)}
    model = model_of(text.replace("float[4,4] weight, ", ""), weight)
    HalfPrecisionPass(keep={"made"})(model)
    compared = next(node for node in model.graph if node.op_type == "Greater")
    assert [value.dtype for value in compared.inputs if value is not None] == [ir.DataType.FLOAT] * 2


@pytest.mark.parametrize("name", COMPONENTS)
def test_casts_stand_only_at_the_borders(name: str, tiny_bundle: Path) -> None:
    full, half = (ir.load(tiny_bundle / name / file) for file in ("model.onnx", "model.fp16.onnx"))
    inputs = sum(value.dtype == ir.DataType.FLOAT for value in full.graph.inputs)
    assert cast_count(half) - cast_count(full) <= inputs + len(full.graph.outputs)
    kept = {value.name for value in half.graph.initializers.values()}
    large = {v.name for v in full.graph.initializers.values() if v.const_value is not None and v.const_value.size > 64}
    assert large <= kept  # by the names that refitting goes by


def test_the_timestep_keeps_its_float32_angles(tiny_bundle: Path) -> None:
    half = ir.load(tiny_bundle / "unet/model.fp16.onnx")
    sines = [node for node in half.graph if node.op_type in ("Sin", "Cos")]
    assert len(sines) == 2
    assert all(value is not None and value.dtype == ir.DataType.FLOAT for node in sines for value in node.inputs)
    rest = [n for n in half.graph if n.op_type in ("Conv", "MatMul", "Gemm", "Softmax", "LayerNormalization")]
    assert all(node.outputs[0].dtype == FP16 for node in rest)


def test_the_angles_matter(tiny_bundle: Path, tiny_cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16, the U-Net at neighbouring large timesteps would see the same angle."""
    feeds = dict(next(case.feeds for case in tiny_cases["unet"] if case.name == "one row"))
    feeds["timestep"] = np.array([980.75], np.float32)
    wanted = np.asarray(OnnxSession(tiny_bundle / "unet/model.onnx")(feeds)["out_sample"], np.float32)

    def error(path: Path) -> float:
        found = np.asarray(OnnxSession(path)(feeds)["out_sample"], np.float32)
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    with_island = error(tiny_bundle / "unet/model.fp16.onnx")
    monkeypatch.setattr(half_precision, "float32_nodes", lambda model, keep: set())
    model = ir.load(tiny_bundle / "unet/model.onnx")
    HalfPrecisionPass()(model)
    ir.save(model, tmp_path / "model.onnx")
    assert with_island <= 2e-3
    assert error(tmp_path / "model.onnx") > 2 * with_island


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_recorded_error_is_that_of_float16_not_of_float32_chains(name: str, tiny_bundle: Path) -> None:
    artifact = load_manifest(tiny_bundle).artifact(name, "fp16")
    assert artifact is not None
    # Rounding nothing but the result costs 2.8e-4.
    assert 2.8e-4 < artifact.parity["worst_relative_l2"] <= 1e-2
