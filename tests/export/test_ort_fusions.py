from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from ort_graphs import attention, floats, geglu, native_norm, residual_norm, resnet, run_in_numpy
from small_graphs import counts, model_of

from latentrt.export.attention_fusion import AttentionFusionPass
from latentrt.export.channels_last import ChannelsLastPass
from latentrt.export.cuda_operators import PlainOperatorsPass
from latentrt.export.group_norm_fusion import GroupNormFusionPass
from latentrt.export.ort_fusions import fuse, fused_operators
from latentrt.export.silu_fusion import SiluFusionPass
from latentrt.export.skip_layer_norm_fusion import SkipLayerNormFusionPass
from latentrt.runtime.session import OnnxSession

RESNET_FEEDS = {"sample": floats(2, 8, 5, 7), "time": floats(2, 8)}


def run(model: ir.Model, folder: Path, feeds: dict[str, Any]) -> dict[str, Any]:
    """The outputs of a graph in ONNX Runtime as it stands, its nodes in an order that ONNX allows."""
    made = {*model.graph.inputs, *model.graph.initializers.values()}
    for node in model.graph:
        assert {value for value in node.inputs if value is not None} <= made, node.name
        made |= set(node.outputs)
    path = folder / "model.onnx"
    ir.save(model, path)
    return dict(OnnxSession(path, optimize=False)(feeds))


def assert_same(wanted: dict[str, Any], found: dict[str, Any], bound: float = 2e-6) -> None:
    assert wanted.keys() == found.keys()
    for name, value in wanted.items():
        assert value.shape == found[name].shape
        error = np.linalg.norm(value.astype(np.float64) - found[name]) / np.linalg.norm(value)
        assert error <= bound, (name, error)


@pytest.mark.parametrize("form", [{}, {"mask": True}, {"packed": True}])
def test_attention_is_one_operator(tmp_path: Path, form: dict[str, bool]) -> None:
    model = attention(**form)
    feeds = {"x": floats(2, 6, 32), "text": floats(2, 5, 16)}
    feeds = {name: feeds[name] for name in [value.name for value in model.graph.inputs] if name is not None}
    wanted = run(model, tmp_path, feeds)
    assert AttentionFusionPass()(model).modified
    assert counts(model)["MultiHeadAttention"] == 1
    assert not {"Softmax", "Transpose", "Reshape", "Mul", "Add"} & counts(model).keys()
    node = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert node.attributes["num_heads"].as_int() == 4
    assert node.attributes["scale"].as_float() == pytest.approx(0.36)
    assert_same(wanted, run(model, tmp_path, feeds))


def test_a_scale_that_is_no_part_of_the_pattern_is_left() -> None:
    model = attention(late_scale=True)
    assert not AttentionFusionPass()(model).modified
    assert counts(model)["Softmax"] == 1


@pytest.mark.parametrize("alpha", [None, 1.702])
def test_silu_and_quick_gelu(tmp_path: Path, alpha: float | None) -> None:
    scaled = "s = Mul(x, alpha) g = Sigmoid(s)" if alpha else "g = Sigmoid(x)"
    weights = {"alpha": np.array(alpha, np.float32)} if alpha else {}
    model = model_of(f"net (float[b, 8] x) => (float[b, 8] y) {{ {scaled} y = Mul(x, g) }}", weights)
    feeds = {"x": 4 * floats(3, 8)}
    wanted = run(model, tmp_path, feeds)
    assert SiluFusionPass()(model).modified
    assert [node.op_type for node in model.graph] == ["QuickGelu"]
    assert_same(wanted, run(model, tmp_path, feeds))


def test_a_gate_of_something_else_is_no_silu() -> None:
    model = model_of("net (float[b, 8] x, float[b, 8] z) => (float[b, 8] y) { g = Sigmoid(x) y = Mul(z, g) }")
    assert not SiluFusionPass()(model).modified


@pytest.mark.parametrize("summed", [False, True])
def test_a_residual_joins_the_layer_norm(tmp_path: Path, summed: bool) -> None:
    model = residual_norm(summed=summed)
    feeds = {"x": floats(2, 3, 16), "skip": floats(2, 3, 16)}
    wanted = run(model, tmp_path, feeds)
    assert SkipLayerNormFusionPass()(model).modified
    found = counts(model)
    assert found["SkipLayerNormalization"] == 1
    assert not found["Add"]
    assert_same(wanted, run(model, tmp_path, feeds))


def test_a_block_has_channels_last_from_end_to_end(tmp_path: Path) -> None:
    model = resnet()
    wanted = run(model, tmp_path, RESNET_FEEDS)
    operators = fuse(model, "cuda")
    assert operators == {"GroupNorm": 1, "NhwcConv": 5, "SkipGroupNorm": 2}
    # One at each end: the tokens' is gone, because they are read with channels last anyway.
    assert counts(model)["Transpose"] == 2
    assert not {"Conv", "InstanceNormalization", "Sigmoid", "Add"} & counts(model).keys()
    assert_same(wanted, run_in_numpy(model, RESNET_FEEDS))
    PlainOperatorsPass()(model)
    assert not fused_operators(model)
    assert_same(wanted, run(model, tmp_path, RESNET_FEEDS))


def test_group_norm_as_one_operator_and_constant_scales(tmp_path: Path) -> None:
    model, feeds = native_norm(), {"x": floats(2, 8, 3, 5)}
    wanted = run(model, tmp_path, feeds)
    assert fuse(model, "cuda") == {"GroupNorm": 1, "NhwcConv": 1}
    assert [node.op_type for node in model.graph] == ["Transpose", "GroupNorm", "Resize", "NhwcConv", "Transpose"]
    assert_same(wanted, run_in_numpy(model, feeds))
    PlainOperatorsPass()(model)
    assert_same(wanted, run(model, tmp_path, feeds))


def test_weights_are_read_when_they_are_written() -> None:
    reads: list[str] = []
    weights = {"w": floats(4, 4, 3, 3), "b": floats(4)}
    text = "net (float[n, 4, h, w] x) => (float[n, 4, i, j] y) { y = Conv <pads = [1, 1, 1, 1]> (x, w, b) }"
    model = model_of(text, weights, reads=reads)
    fuse(model, "cuda")
    assert not reads
    moved = model.graph.initializers["w_channels_last"].const_value
    assert moved is not None
    np.testing.assert_array_equal(moved.numpy(), weights["w"].transpose(0, 2, 3, 1))


def test_group_norms_without_a_kernel_stay() -> None:
    model = resnet()
    model.graph.initializers["groups"].const_value = ir.tensor(np.array([0, 8, -1]), name="groups")
    for node in model.graph:
        if node.op_type == "Reshape" and node.inputs[1] is model.graph.initializers["groups"]:
            node.outputs[0].shape = ir.Shape(["b", 8, None])  # one channel a group: the kernel reads two at once
    assert not GroupNormFusionPass()(model).modified


def test_layouts_are_left_without_convolutions() -> None:
    model = residual_norm(summed=True)
    assert not ChannelsLastPass()(model).modified


@pytest.mark.parametrize(("width", "fused"), [(1280, True), (64, False)])
def test_geglu_of_the_kernels_widths(tmp_path: Path, width: int, fused: bool) -> None:
    model = geglu(width)
    feeds = {"x": floats(2, 3, 4)}
    wanted = run(model, tmp_path, feeds)
    assert fuse(model, "cuda") == ({"BiasSplitGelu": 1} if fused else {})
    assert_same(wanted, run_in_numpy(model, feeds))
    PlainOperatorsPass()(model)
    assert_same(wanted, run(model, tmp_path, feeds))


def test_the_cpu_gets_no_operator_without_a_kernel() -> None:
    assert fuse(resnet(), "cpu") == {"QuickGelu": 2}
