from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from small_graphs import outputs_of
from tiny import COMPONENTS
from torch import nn

from latentrt.export.attention_scale import AttentionScalePass, scales_after_matmul
from latentrt.export.component import Component
from latentrt.export.key_transpose import KeyTransposePass
from latentrt.export.networks import libraries_quiet
from latentrt.export.opset import OPSETS, checked_opset
from latentrt.export.to_onnx import to_onnx
from latentrt.export.unet import unet_component
from latentrt.runtime.errors import ExportError, UsageError
from latentrt.runtime.session import OnnxSession
from latentrt.runtime.specs import ModelSpec, TensorSpec


def attention_model(scale: str = "Mul", *, mask: bool = True, sandwich: bool = True) -> ir.Model:
    """softmax(Q K^T · 0.25 + mask) V over (b, 2, n, 16), keys transposed as the dynamo exporter does it."""
    keys = (
        """
        shape = Shape(k)
        last = Slice(shape, minus_one, end)
        second = Slice(shape, minus_two, minus_one)
        leading = Slice(shape, begin, minus_two)
        flat_shape = Concat<axis=0>(minus_one, second, last)
        flat = Reshape(k, flat_shape)
        turned = Transpose<perm=[0, 2, 1]>(flat)
        back = Concat<axis=0>(leading, last, second)
        kt = Reshape(turned, back)
        """
        if sandwich
        else "kt = Transpose<perm=[0, 1, 3, 2]>(k)"
    )
    scaled = {"Mul": "Mul(scores, scale)", "Mul reversed": "Mul(scale, scores)", "Div": "Div(scores, inverse)"}[scale]
    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    attention (float[b,2,n,16] q, float[b,n,2,16] key, float[b,2,n,16] v) => (float[b,2,n,16] out)
    <float scale = {{0.25}}, float inverse = {{4.0}}, float[1] mask = {{-1.5}},
     int64[1] minus_one = {{-1}}, int64[1] minus_two = {{-2}},
     int64[1] end = {{9223372036854775807}}, int64[1] begin = {{-9223372036854775808}}>
    {{
        k = Transpose<perm=[0, 2, 1, 3]>(key)
        {keys}
        scores = MatMul(q, kt)
        scaled = {scaled}
        masked = {"Add(scaled, mask)" if mask else "Identity(scaled)"}
        weights = Softmax<axis=-1>({"masked" if mask else "scaled"})
        out = MatMul(weights, v)
    }}
    """
    proto = onnx.parser.parse_model(text)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model, path: Path, feeds: dict[str, Any]) -> Any:
    ir.save(model, path)
    return OnnxSession(path)(feeds)["out"]


@pytest.fixture
def feeds() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "q": rng.standard_normal((3, 2, 5, 16), np.float32),
        "key": rng.standard_normal((3, 5, 2, 16), np.float32),
        "v": rng.standard_normal((3, 2, 5, 16), np.float32),
    }


def oracle(feeds: dict[str, Any], mask: bool) -> Any:
    q, k, v = (torch.from_numpy(feeds[name]) for name in ("q", "key", "v"))
    bias = torch.full((5, 5), -1.5) if mask else None
    return nn.functional.scaled_dot_product_attention(q, k.transpose(1, 2), v, attn_mask=bias, scale=0.25).numpy()


@pytest.mark.parametrize("scale", ["Mul", "Mul reversed", "Div"])
@pytest.mark.parametrize("mask", [True, False])
def test_the_scale_moves_before_the_matmul_and_changes_nothing(
    scale: str, mask: bool, feeds: dict[str, Any], tmp_path: Path
) -> None:
    model = attention_model(scale, mask=mask)
    assert scales_after_matmul(model) == ["scores"]
    assert AttentionScalePass()(model).modified
    assert scales_after_matmul(model) == []
    scores = next(node for node in model.graph if node.op_type == "Softmax").inputs[0]
    assert scores is not None
    above = scores.producer()
    assert above is not None
    assert above.op_type == ("Add" if mask else "MatMul")
    np.testing.assert_allclose(run(model, tmp_path / "m.onnx", feeds), oracle(feeds, mask), rtol=1e-5, atol=1e-6)
    assert not AttentionScalePass()(model).modified


def test_scores_that_something_else_reads_are_left_alone() -> None:
    model = attention_model(mask=False)
    scores = next(node for node in model.graph if node.op_type == "MatMul").outputs[0]
    model.graph.outputs.append(scores)
    assert not AttentionScalePass()(model).modified


@pytest.mark.parametrize("mask", [True, False])
def test_the_keys_are_transposed_once_and_change_nothing(mask: bool, feeds: dict[str, Any], tmp_path: Path) -> None:
    model = attention_model(mask=mask)
    before = run(model, tmp_path / "before.onnx", feeds)
    assert KeyTransposePass()(model).modified
    RemoveUnusedNodesPass()(model)
    assert [node.op_type for node in model.graph if node.op_type in ("Shape", "Slice", "Concat", "Reshape")] == []
    assert [list(n.attributes["perm"].as_ints()) for n in model.graph if n.op_type == "Transpose"] == [[0, 2, 3, 1]]
    np.testing.assert_array_equal(run(model, tmp_path / "after.onnx", feeds), before)


def test_a_plain_transpose_is_not_a_sandwich() -> None:
    assert not KeyTransposePass()(attention_model(sandwich=False)).modified


@pytest.mark.parametrize("name", COMPONENTS)
def test_no_exported_attention_is_scaled_late_or_transposed_by_reshape(name: str, tiny_bundle: Path) -> None:
    model = ir.load(tiny_bundle / name / "model.onnx")
    assert any(node.op_type == "Softmax" for node in model.graph)
    assert scales_after_matmul(model) == []
    assert not KeyTransposePass()(model).modified
    assert not any(node.op_type == "IsNaN" for node in model.graph)


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("file", ["model.onnx", "model.fp16.onnx"])
def test_graphs_are_valid_and_say_nothing_about_their_making(name: str, file: str, tiny_bundle: Path) -> None:
    path = tiny_bundle / name / file
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path)
    assert not proto.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
    assert not any(value.metadata_props or value.doc_string for value in proto.graph.value_info)
    content = path.read_bytes()
    for word in (b"site-packages", b'.py"', b"torch.nn", os.getcwd().encode()):
        assert word not in content
    names = {d.dim_param for v in proto.graph.value_info for d in v.type.tensor_type.shape.dim if d.dim_param}
    spec = OnnxSession(path).spec
    clean = {size for tensor in (*spec.inputs, *spec.outputs) for size in tensor.shape if isinstance(size, str)}
    assert names <= clean | {n for n in names if n.startswith("unk__")}


def test_the_same_weights_give_the_same_bytes_in_another_process(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from latentrt.export.checkpoint import open_checkpoint\n"
        "from latentrt.export.graph_builder import components_of\n"
        "from latentrt.export.graph_files import save_onnx\n"
        "from latentrt.export.networks import open_network\n"
        "from latentrt.export.to_onnx import to_onnx\n"
        "parts = open_checkpoint(pathlib.Path(sys.argv[1])).parts\n"
        "networks = {name: open_network(part) for name, part in parts.items()}\n"
        "save_onnx(to_onnx(components_of(networks)['text_encoder']), pathlib.Path(sys.argv[2]))\n"
    )
    again = tiny_bundle.parent / "again.onnx"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tiny_checkpoint), str(again)], check=True, env=environment)
    assert again.read_bytes() == (tiny_bundle / "text_encoder/model.onnx").read_bytes()


def test_a_graph_traced_without_weights_is_that_of_the_module_with_its_weights(
    tiny_loaded: Any, tiny_bundle: Path, tmp_path: Path
) -> None:
    """torch.onnx's own export of the module as it runs, weights inside, optimized by itself alone."""
    component = unet_component(tiny_loaded.unet)
    dynamic = {
        tensor.name: {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in component.spec.inputs
    }
    wanted_path = tmp_path / "whole.onnx"
    with libraries_quiet(), torch.no_grad():
        traced = torch.export.export(
            component.module, (), kwargs=dict(component.example_inputs), dynamic_shapes=dynamic, strict=False
        )
        program = torch.onnx.export(traced, dynamo=True, input_names=list(dynamic), verbose=False)
    assert program is not None
    program.save(wanted_path)
    rng = np.random.default_rng(0)
    feeds = {
        "sample": rng.standard_normal((3, 4, 6, 10), np.float32),
        "timestep": np.array([981, 1, 500], np.float32),
        "encoder_hidden_states": rng.standard_normal((3, 77, 32), np.float32),
    }
    (wanted,) = outputs_of(wanted_path, feeds).values()
    found = outputs_of(tiny_bundle / "unet/model.onnx", feeds)["out_sample"]
    assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)


class Broken(nn.Module):
    """Takes a decision on the data, which no tracer can follow."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample * 2 if sample.sum() > 0 else sample


class Fixed(nn.Module):
    """Returns another shape than its contract says."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return sample.mean(0, keepdim=True)


@pytest.mark.parametrize(("module", "said"), [(Broken(), "torch.onnx"), (Fixed(), "expected shape")])
def test_what_cannot_be_exported_is_an_export_error_with_its_name(module: nn.Module, said: str) -> None:
    tensor = TensorSpec("sample", "float32", ("batch", 4))
    out = TensorSpec("out_sample", "float32", ("batch", 4))
    spec = ModelSpec("unet", inputs=(tensor,), outputs=(out,))
    with pytest.raises(ExportError, match=f"unet.*{said}"):
        to_onnx(Component(module=module, example_inputs={"sample": torch.ones(3, 4)}, spec=spec))


def test_an_opset_that_is_not_tested_is_a_usage_error() -> None:
    assert checked_opset(None) in OPSETS
    for opset in (17, 23, 0):
        with pytest.raises(UsageError, match=f"got {opset}"):
            checked_opset(opset)
