from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from small_graphs import model_of

from latentrt.export.activation_range import activation_ranges, recorded_runs
from latentrt.export.graph_files import save_onnx
from latentrt.export.half_builder import BuiltGraph, build_half
from latentrt.export.half_precision import HALF_MAX, HalfPrecisionPass
from latentrt.export.overflow import HEADROOM, mixed_keep, module_of, nearest_overflow
from latentrt.export.parity import BOUNDS, Case, compare
from latentrt.runtime.errors import ExportError
from latentrt.runtime.session import OnnxSession


def growing_model(path: Path) -> Path:
    """Doubles its input and squares it twice: 10 -> 20 -> 400 -> 160 000, then brings it back into range."""
    text = """
        growing (float[b,3] sample) => (float[b,3] out_sample) {
            doubled = MatMul(sample, twice)
            squared = Mul(doubled, doubled)
            fourth = Mul(squared, squared)
            normed = Mul(fourth, small)
            out_sample = MatMul(normed, once)
        }
    """
    eye = np.eye(3, dtype=np.float32)
    ir.save(model_of(text, {"twice": 2 * eye, "small": np.array(1e-5, np.float32), "once": 1.1 * eye}), path)
    return path


def built(path: Path, cases: list[Case], precision: str = "fp16") -> BuiltGraph:
    return build_half(
        "unet",
        lambda: ir.load(path),
        lambda name: path.with_name(f"model.{name}.onnx"),
        cases,
        precision=precision,
        save=lambda model, path, precision: save_onnx(model, path),
    )


def test_ranges_are_the_maxima_of_every_tensor_over_all_runs(tmp_path: Path) -> None:
    path = growing_model(tmp_path / "model.onnx")
    feeds = [{"sample": np.array([[-10, 2, 3]], np.float32)}, {"sample": np.array([[1, 2, 3]], np.float32)}]
    ranges = activation_ranges(path, feeds)
    assert list(ranges) == ["doubled", "squared", "fourth", "normed", "out_sample"]
    assert list(ranges.values()) == pytest.approx([20, 400, 160_000, 1.6, 1.76])
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_ranges_agree_with_pytorch_on_a_whole_component(tiny_bundle: Path, tiny_cases: Any, tiny_loaded: Any) -> None:
    seen: list[float] = []
    hook = tiny_loaded.vae.decoder.conv_in.register_forward_hook(lambda m, i, o: seen.append(float(o.abs().max())))
    feeds = tiny_cases["vae_decoder"][0].feeds
    with torch.no_grad():
        tiny_loaded.vae.decode(torch.from_numpy(feeds["latent_sample"]))
    hook.remove()
    path = tiny_bundle / "vae_decoder/model.onnx"
    conv_in = [node for node in ir.load(path).graph if node.op_type == "Conv"][1].outputs[0].name
    assert activation_ranges(path, [feeds])[str(conv_in)] == pytest.approx(seen[0], rel=1e-5)


def test_rounded_runs_answer_as_the_graph_and_say_what_was_too_large(tmp_path: Path) -> None:
    path = growing_model(tmp_path / "model.onnx")
    model = ir.load(path)
    HalfPrecisionPass()(model)
    ir.save(model, tmp_path / "half.onnx")
    feeds = [{"sample": np.array([[5, 2, 3]], np.float32)}, {"sample": np.array([[20, 2, 3]], np.float32)}]
    answers, ranges = recorded_runs(tmp_path / "half.onnx", feeds, rounding=True)
    small, once = np.float16(1e-5), np.float16(1.1)
    doubled = np.array([10, 4, 6], np.float16)
    fourth = (doubled * doubled) ** np.float16(2)
    wanted = np.float32(np.float16(np.float32(np.float16(np.float32(fourth) * small)) * np.float32(once)))
    assert [list(answer) for answer in answers] == [["out_sample"], ["out_sample"]]
    np.testing.assert_array_equal(answers[0]["out_sample"][0], wanted)
    assert np.isinf(answers[1]["out_sample"][0, 0])
    assert ranges["fourth"] == pytest.approx(40**4)
    assert not [name for name in ranges if "rounded" in name]


def test_a_nan_in_a_run_is_not_forgotten(tmp_path: Path) -> None:
    path = growing_model(tmp_path / "model.onnx")
    nan = np.full((1, 3), np.nan, np.float32)
    ranges = activation_ranges(path, [{"sample": nan}, {"sample": np.ones((1, 3), np.float32)}])
    with pytest.raises(ExportError, match="growing: expected finite activations in fp32, got nan first in doubled"):
        mixed_keep(ir.load(path), ranges)


def test_what_float32_does_not_hold_either_is_an_error(tmp_path: Path) -> None:
    model = ir.load(growing_model(tmp_path / "model.onnx"))
    with pytest.raises(ExportError, match="got inf first in squared"):
        nearest_overflow(model, {"doubled": 1e30, "squared": np.inf, "fourth": np.nan})


def test_what_comes_within_the_headroom_is_kept(tmp_path: Path) -> None:
    path = growing_model(tmp_path / "model.onnx")
    model = ir.load(path)
    limit = HALF_MAX / HEADROOM
    ranges = {"doubled": 1.0, "squared": limit, "fourth": np.nextafter(limit, np.inf), "out_sample": 2.0}
    assert mixed_keep(model, ranges) == {"fourth"}
    assert mixed_keep(model, ranges, headroom=1.0) == frozenset()
    assert mixed_keep(model, ranges | {"squared": 1e9}, headroom=1.0) == {"squared"}


def test_the_report_names_tensor_share_and_module(tmp_path: Path) -> None:
    path = growing_model(tmp_path / "model.onnx")
    ranges = activation_ranges(path, [{"sample": np.array([[7, 2, 3]], np.float32)}])
    found = nearest_overflow(ir.load(path), ranges, count=2)
    assert [(item["tensor"], item["module"]) for item in found] == [("fourth", "unknown"), ("squared", "unknown")]
    assert [item["max_abs"] for item in found] == pytest.approx([38416, 196])
    assert [item["share"] for item in found] == pytest.approx([38416 / 65504, 196 / 65504])


def test_a_tensor_belongs_to_the_module_of_the_nearest_parameter(tiny_bundle: Path) -> None:
    model = ir.load(tiny_bundle / "vae_decoder/model.onnx")
    last = next(node for node in reversed(list(model.graph)) if node.op_type == "Conv")
    normed = next(node for node in reversed(list(model.graph)) if node.op_type == "InstanceNormalization")
    assert module_of(model, str(last.outputs[0].name)).endswith("decoder.conv_out")
    # A norm's affine weights are not its own: it stands behind the last block's second convolution.
    assert "up_blocks.3" in module_of(model, str(normed.outputs[0].name))


def test_an_fp16_graph_that_would_overflow_is_made_mixed(tmp_path: Path) -> None:
    path = growing_model(tmp_path / "model.onnx")
    feeds = {"sample": np.array([[10, 2, 3]], np.float32)}
    cases = [Case("real", feeds, OnnxSession(path)(feeds))]
    found = built(path, cases)
    assert found.precision == "mixed"
    assert found.files == (tmp_path / "model.mixed.onnx",)
    assert found.parity["kept"] == ["fourth"]
    assert found.parity["nearest_overflow"][0]["max_abs"] == pytest.approx(160_000, rel=1e-3)
    assert found.parity["worst_relative_l2"] < 2e-3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.mixed.onnx", "model.onnx"]


@pytest.mark.parametrize(("precision", "ran"), [("fp16", True), ("bf16", False), ("mixed", True)])
def test_what_fits_is_made_as_asked(precision: str, ran: bool, tmp_path: Path) -> None:
    path = growing_model(tmp_path / "model.onnx")
    feeds = {"sample": np.array([[5, 2, 3]], np.float32)}
    found = built(path, [Case("real", feeds, OnnxSession(path)(feeds))], precision)
    assert (found.precision, found.parity["ran"]) == (precision, ran)
    assert found.files == (tmp_path / f"model.{precision}.onnx",)
    assert found.parity["worst_relative_l2"] > 0
    assert found.parity.get("kept") == ([] if precision == "mixed" else None)


# A convolution of each whose output becomes a hundred thousand times as large, as in SDXL's VAE; the norm behind it
# takes the size away. The U-Net's is also kept for the way up.
LOUD = {
    "vae_decoder": "decoder.up_blocks.0.resnets.0.conv2.weight",
    "unet": "down_blocks.1.resnets.0.conv2.weight",
}


@pytest.mark.parametrize("component", LOUD)
def test_a_network_beyond_float16_is_right_in_mixed_and_broken_in_fp16(
    component: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    model, path = ir.load(tiny_bundle / component / "model.onnx"), tmp_path / "model.onnx"
    loud = next(value for name, value in model.graph.initializers.items() if name.endswith(LOUD[component]))
    assert loud.const_value is not None
    loud.const_value = ir.tensor(1e5 * loud.const_value.numpy(), name=loud.name)
    ir.save(model, path)
    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "sequence": 77, "text_length": 77}
    feeds = {
        str(value.name): rng.standard_normal(
            [size if isinstance(size, int) else sizes.get(str(size), 8) for size in value.shape or ()]
        ).astype(np.float32)
        for value in model.graph.inputs
    }
    case = Case("real", feeds, OnnxSession(path)(feeds))
    found = built(path, [case])
    assert found.precision == "mixed"
    assert found.parity["nearest_overflow"][0]["max_abs"] > HALF_MAX
    assert found.parity["worst_relative_l2"] <= BOUNDS["mixed"]
    mixed = ir.load(found.files[0])
    half = [v for node in mixed.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT16]
    full = [v for node in mixed.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT]
    assert len(half) > 4 * len(full)
    assert found.files[0].stat().st_size < 0.75 * path.stat().st_size

    plain = ir.load(path)
    HalfPrecisionPass()(plain)
    ir.save(plain, tmp_path / "plain.onnx")
    name = next(iter(case.expected))
    rounded, _ = recorded_runs(tmp_path / "plain.onnx", [feeds], rounding=True)
    broken = compare(case.expected[name], rounded[0][name])
    assert not broken.finite
    assert not broken.within(BOUNDS["fp16"])
