from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attention_graphs import (
    FAMILIES,
    attention_graph,
    attention_oracle,
    feeds_of,
    relative_l2,
    torch_unet,
    unet_feeds,
    unet_oracle,
)
from families import Sources
from numpy.testing import assert_allclose, assert_array_equal
from small_graphs import counts, run

from latentrt.export.half_precision import HalfPrecisionPass
from latentrt.export.qkv_packing import PackedPart, PackProjectionsPass, packed_name, packed_parameters
from latentrt.runtime.session import OnnxSession


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_projections_of_one_input_become_one_product(cross: bool, biases: bool, tmp_path: Path) -> None:
    model, weights = attention_graph(cross=cross, biases=biases)
    feeds = feeds_of(model)
    before, plain = run(model, tmp_path, feeds)["out"], counts(model)
    assert PackProjectionsPass()(model).modified
    after = counts(model)
    saved = 1 if cross else 2
    assert plain["MatMul"] - after["MatMul"] == saved
    assert plain["Add"] - after["Add"] == (saved if biases else 0)
    packed = "block.attn.to_kv.weight" if cross else "block.attn.to_qkv.weight"
    letters = "kv" if cross else "qkv"
    expected = np.concatenate([weights[f"block.attn.to_{letter}.weight"] for letter in letters], axis=1)
    value = model.graph.initializers[packed].const_value
    assert value is not None
    assert_array_equal(value.numpy(), expected)
    assert not any(f"block.attn.to_{letter}.weight" in model.graph.initializers for letter in letters)
    found = run(model, tmp_path, feeds)["out"]
    assert_array_equal(found, before)
    assert_allclose(found, attention_oracle(weights, feeds), rtol=1e-5, atol=1e-6)
    assert not PackProjectionsPass()(model).modified


def test_no_weight_is_read_before_it_is_written() -> None:
    reads: list[str] = []
    model, _ = attention_graph(biases=True, reads=reads)
    PackProjectionsPass(fold_scale=True)(model)
    assert reads == []


@pytest.mark.parametrize(("scale", "exact"), [(0.5, True), (0.6, False)])
@pytest.mark.parametrize("cross", [False, True])
def test_a_folded_scale_is_exact_if_a_power_of_two(scale: float, exact: bool, cross: bool, tmp_path: Path) -> None:
    model, weights = attention_graph(cross=cross, biases=True, scale=scale)
    feeds = feeds_of(model)
    before = run(model, tmp_path, feeds)["out"]
    PackProjectionsPass(fold_scale=True)(model)
    assert counts(model)["Mul"] == 0
    assert "s" not in model.graph.initializers
    found = run(model, tmp_path, feeds)["out"]
    if exact:
        assert_array_equal(found, before)
    assert_allclose(found, attention_oracle(weights, feeds, scale=scale), rtol=1e-5, atol=1e-6)
    parts = packed_parameters(model)[f"block.attn.to_{'kv' if cross else 'qkv'}.bias"]
    assert [part.factor for part in parts] == [pytest.approx(scale**2), *[1.0] * (len(parts) - 1)]


def test_a_scale_that_something_else_reads_the_result_of_stays(tmp_path: Path) -> None:
    model, weights = attention_graph()
    keys = next(node for node in model.graph if node.outputs[0].name == "k_heads").outputs[0]
    negated = ir.node("Neg", [keys])
    negated.outputs[0].name = "negated"
    negated.outputs[0].type, negated.outputs[0].shape = keys.type, keys.shape
    model.graph.append(negated)
    model.graph.outputs.append(negated.outputs[0])
    PackProjectionsPass(fold_scale=True)(model)
    assert counts(model)["Mul"] == 2
    feeds = feeds_of(model)
    assert_allclose(run(model, tmp_path, feeds)["out"], attention_oracle(weights, feeds), rtol=1e-5, atol=1e-6)


def test_weights_without_names_are_left_alone() -> None:
    model, _ = attention_graph()
    for index, value in enumerate(list(model.graph.initializers.values())):
        value.name = f"val_{index}"
    assert not PackProjectionsPass()(model).modified


@pytest.mark.parametrize(
    ("names", "packed"),
    [
        (["a.to_q.weight", "a.to_k.weight", "a.to_v.weight"], "a.to_qkv.weight"),
        (["a.b.to_k.bias", "a.b.to_v.bias"], "a.b.to_kv.bias"),
        (["s.q_proj.weight", "s.k_proj.weight", "s.v_proj.weight"], "s.qkv_proj.weight"),
    ],
)
def test_packed_weights_are_called_after_what_they_hold(names: list[str], packed: str) -> None:
    assert packed_name(names) == packed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_unet_is_the_unet_and_says_where_its_parameters_are(
    family: str, family_bundle: Callable[[str], Path], family_sources: Callable[[str], Sources], tmp_path: Path
) -> None:
    path = family_bundle(family) / "unet/model.onnx"
    model = ir.load(path)
    unet = torch_unet(family_sources(family).path)
    attentions = sum(node.op_type == "Softmax" for node in model.graph)
    plain = counts(model)
    PackProjectionsPass()(model)
    assert plain["MatMul"] - counts(model)["MatMul"] == attentions // 2 * 3
    ir.save(model, tmp_path / "packed.onnx")
    onnx.checker.check_model(str(tmp_path / "packed.onnx"), full_check=True)
    feeds = unet_feeds(unet)
    found = OnnxSession(tmp_path / "packed.onnx")(feeds)["out_sample"]
    assert relative_l2(OnnxSession(path)(feeds)["out_sample"], found) <= 1e-6
    assert relative_l2(unet_oracle(unet, feeds), found) <= 1e-5
    held = packed_parameters(ir.load(tmp_path / "packed.onnx"))
    assert len(held) == attentions
    parameters = unet.state_dict()
    for name, parts in held.items():
        value = model.graph.initializers[name].const_value
        assert value is not None
        for part in parts:
            expected = parameters[part.name.removeprefix("unet.")].numpy().T
            assert_array_equal(value.numpy()[:, part.start : part.stop], expected)


def test_what_is_packed_is_said_by_the_graph_also_in_half_precision(tmp_path: Path) -> None:
    model, _ = attention_graph()
    PackProjectionsPass()(model)
    HalfPrecisionPass()(model)
    ir.save(model, tmp_path / "half.onnx")
    loaded = ir.load(tmp_path / "half.onnx")
    names = [f"block.attn.to_{letter}.weight" for letter in "qkv"]
    parts = tuple(PackedPart(name, 16 * i, 16 * i + 16) for i, name in enumerate(names))
    assert packed_parameters(loaded) == {"block.attn.to_qkv.weight": parts}
    assert loaded.graph.initializers["block.attn.to_qkv.weight"].dtype == ir.DataType.FLOAT16
