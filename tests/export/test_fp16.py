from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny import COMPONENTS

from latentrt.export.activation_range import activation_ranges
from latentrt.export.fp16 import HALF_TINY, Float16Pass, cast_count, check_overflow, float32_island, half_of
from latentrt.export.graph_builder import build_fp16
from latentrt.export.half_rounding import HalfRoundingPass
from latentrt.export.parity import Case
from latentrt.runtime.errors import ExportError
from latentrt.runtime.manifest import load_manifest
from latentrt.runtime.session import OnnxSession


def growing_model(path: Path) -> Path:
    """Squares its input twice: 20 -> 400 -> 160 000, then brings it back into range."""
    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    growing (float[b,3] sample) => (float[b,3] out_sample)
    <float small = {0.00001}>
    {
        doubled = Add(sample, sample)
        squared = Mul(doubled, doubled)
        fourth = Mul(squared, squared)
        out_sample = Mul(fourth, small)
    }
    """
    onnx.save(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)), path)
    return path


def test_ranges_are_the_maxima_of_every_tensor_over_all_runs(tmp_path: Path) -> None:
    path = growing_model(tmp_path / "model.onnx")
    feeds = [{"sample": np.array([[-10, 2, 3]], np.float32)}, {"sample": np.array([[1, 2, 3]], np.float32)}]
    ranges = activation_ranges(path, feeds)
    assert list(ranges) == ["doubled", "squared", "fourth", "out_sample"]
    assert list(ranges.values()) == pytest.approx([20, 400, 160_000, 1.6])
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_ranges_agree_with_pytorch_on_a_whole_component(tiny_bundle: Path, tiny_cases: Any, tiny_loaded: Any) -> None:
    seen: list[float] = []
    hook = tiny_loaded.vae.decoder.conv_in.register_forward_hook(lambda m, i, o: seen.append(float(o.abs().max())))
    import torch

    feeds = tiny_cases["vae_decoder"][0].feeds
    with torch.no_grad():
        tiny_loaded.vae.decode(torch.from_numpy(feeds["latent_sample"]))
    hook.remove()
    path = tiny_bundle / "vae_decoder/model.onnx"
    conv_in = [node for node in ir.load(path).graph if node.op_type == "Conv"][1].outputs[0].name
    assert activation_ranges(path, [feeds])[str(conv_in)] == pytest.approx(seen[0], rel=1e-5)


def test_a_nan_in_a_run_is_not_forgotten(tmp_path: Path) -> None:
    path = growing_model(tmp_path / "model.onnx")
    nan = np.full((1, 3), np.nan, np.float32)
    ranges = activation_ranges(path, [{"sample": nan}, {"sample": np.ones((1, 3), np.float32)}])
    with pytest.raises(ExportError, match="nan"):
        check_overflow(ir.load(path), ranges, name="unet")


def test_the_first_tensor_that_overflows_is_named_with_its_value(tmp_path: Path) -> None:
    path = growing_model(tmp_path / "model.onnx")
    feeds = {"sample": np.array([[10, 2, 3]], np.float32)}
    case = Case("real", feeds, OnnxSession(path)(feeds))
    with pytest.raises(ExportError) as caught:
        build_fp16("unet", path, tmp_path / "model.fp16.onnx", [case])
    for word in ("unet fp16", "1.6e+05 first in fourth", "squared 400"):
        assert word in str(caught.value)
    assert not (tmp_path / "model.fp16.onnx").exists()


def test_nearest_to_overflow_are_the_three_largest_in_range(tmp_path: Path) -> None:
    path = growing_model(tmp_path / "model.onnx")
    feeds = {"sample": np.array([[7, 2, 3]], np.float32)}
    figures = build_fp16("unet", path, tmp_path / "half.onnx", [Case("real", feeds, OnnxSession(path)(feeds))])
    assert [item["tensor"] for item in figures["nearest_overflow"]] == ["fourth", "squared", "doubled"]
    assert [item["max_abs"] for item in figures["nearest_overflow"]] == pytest.approx([38416, 196, 14])


def test_weights_are_rounded_with_the_edges_of_the_range_handled() -> None:
    lowest = np.finfo(np.float32).min
    given = np.array([1 / 3, -1e-12, 1e-12, 0.0, 65504, lowest, -np.inf], np.float32)
    found = half_of(given, name="w")
    assert found.dtype == np.float16
    np.testing.assert_array_equal(
        found, np.array([1 / 3, -HALF_TINY, HALF_TINY, 0, 65504, -65504, -np.inf], np.float16)
    )
    assert given[5] == lowest


@pytest.mark.parametrize("value", [65536.0, -1e6])
def test_a_weight_beyond_the_range_is_an_error_that_names_it(value: float) -> None:
    with pytest.raises(ExportError, match=r"conv_in\.weight"):
        half_of(np.array([1.0, value], np.float32), name="conv_in.weight")


def test_rounding_after_every_operator_is_float16_arithmetic(tmp_path: Path) -> None:
    sample = np.random.default_rng(0).uniform(-5, 5, (4, 3)).astype(np.float32)
    model = ir.load(growing_model(tmp_path / "model.onnx"))
    HalfRoundingPass()(model)
    ir.save(model, tmp_path / "rounded.onnx")
    found = OnnxSession(tmp_path / "rounded.onnx")({"sample": sample})["out_sample"]
    half = sample.astype(np.float16)
    half = (half + half) * (half + half)
    np.testing.assert_array_equal(found, (half * half * np.float16(1e-5)).astype(np.float32))


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_recorded_error_is_that_of_float16_not_of_float32_chains(name: str, tiny_bundle: Path) -> None:
    artifact = load_manifest(tiny_bundle).artifact(name, "fp16")
    assert artifact is not None
    # Rounding nothing but the result costs 2.8e-4.
    assert 2.8e-4 < artifact.parity["worst_relative_l2"] <= 1e-2


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
    assert all(node in float32_island(half) for node in sines)
    assert all(value is not None and value.dtype == ir.DataType.FLOAT for node in sines for value in node.inputs)
    rest = [n for n in half.graph if n.op_type in ("Conv", "MatMul", "Gemm", "Softmax", "LayerNormalization")]
    assert all(node.outputs[0].dtype == ir.DataType.FLOAT16 for node in rest)


def test_the_angles_matter(tiny_bundle: Path, tiny_cases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the island, the U-Net at neighbouring large timesteps would see the same angle."""
    from latentrt.export import fp16

    feeds = dict(next(case.feeds for case in tiny_cases["unet"] if case.name == "one row"))
    feeds["timestep"] = np.array([980.75], np.float32)
    wanted = np.asarray(OnnxSession(tiny_bundle / "unet/model.onnx")(feeds)["out_sample"], np.float32)

    def error(path: Path) -> float:
        found = np.asarray(OnnxSession(path)(feeds)["out_sample"], np.float32)
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    with_island = error(tiny_bundle / "unet/model.fp16.onnx")
    monkeypatch.setattr(fp16, "float32_island", lambda model: set())
    model = ir.load(tiny_bundle / "unet/model.onnx")
    Float16Pass()(model)
    ir.save(model, tmp_path / "model.onnx")
    assert with_island <= 2e-3
    assert error(tmp_path / "model.onnx") > 2 * with_island
