from __future__ import annotations

import errno
import os
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from small_bundle import artifact, network, small_plan, small_source, weights, with_file, write_bundle

from latentrt.calibrate.apply import apply_plan, plan_path
from latentrt.calibrate.placement import check_placement
from latentrt.calibrate.plan_file import load_plan, plan_key
from latentrt.calibrate.quantized_artifacts import put_in
from latentrt.calibrate.quantized_graphs import probe_feeds
from latentrt.export.graph_files import save_onnx
from latentrt.runtime.errors import ArtifactError, CalibrationError, UsageError
from latentrt.runtime.manifest import EngineRecord, Manifest, check_files, load_manifest, update_manifest
from latentrt.runtime.session import OnnxSession

HALF, FULL = "unet/model.int8.onnx", "unet/model.int8.cpu.onnx"
PLAN_FILES = ("unet/int8.plan.json", "unet/int8.plan.safetensors")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "small.bundle").mkdir()
    return write_bundle(tmp_path / "small.bundle")


@pytest.fixture(scope="module")
def quantized_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with `small_plan` applied. Tests copy it."""
    folder = write_bundle(tmp_path_factory.mktemp("quantized"))
    apply_plan(small_source(folder), small_plan(small_source(folder)))
    return folder


@pytest.fixture
def quantized(quantized_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized_once, tmp_path / "quantized.bundle"))


def answer(session: OnnxSession, feeds: Any) -> Any:
    return session(feeds)["out_sample"]


def whole(bundle: Path) -> Manifest:
    """The manifest, after a look at every file that it names; nothing else lies about."""
    manifest = load_manifest(bundle)
    check_files(bundle, manifest, manifest.files)
    held = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert held - {"manifest.json", ".lock"} <= manifest.files.keys()
    return manifest


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_both_graphs_hold_the_same_integers(bundle: Path, kind: Any) -> None:
    source = small_source(bundle)
    plan = small_plan(source, kind, **({"vectors": {}} if kind == "fp8" else {}))
    before = OnnxSession(source.graph)
    applied = apply_plan(source, plan)
    assert applied.reason == "new"
    assert (applied.full.path, applied.half.path) == (f"unet/model.{kind}.cpu.onnx", f"unet/model.{kind}.onnx")
    assert [(a.precision, a.target) for a in (applied.full, applied.half)] == [(kind, "cpu"), (kind, "")]
    full, half = (ir.load(bundle / path) for path in (applied.full.path, applied.half.path))
    stored = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}[kind]
    integers = [name for name, value in full.graph.initializers.items() if value.dtype == stored]
    # Five weights, and a zero point of each pair: four tensors, one of them joined of two branches in int8.
    assert len(integers) == 5 + {"int8": 6, "fp8": 4}[kind]
    scales = [name for name in full.graph.initializers if name.endswith(".scale")]
    assert len(scales) == len(integers)
    for name in (*integers, *scales):
        ours, theirs = (model.graph.initializers[name].const_value for model in (full, half))
        assert ours is not None
        assert theirs is not None
        np.testing.assert_array_equal(ours.numpy().astype(np.float64), theirs.numpy().astype(np.float64), err_msg=name)
    assert {full.graph.initializers[name].dtype for name in scales} == {ir.DataType.FLOAT}
    assert {half.graph.initializers[name].dtype for name in scales} == {ir.DataType.FLOAT16}
    # The figures are what somebody else measures.
    feeds = probe_feeds(before.spec)
    wanted, found = (answer(session, feeds) for session in (before, OnnxSession(bundle / applied.full.path)))
    distance = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert applied.full.parity["worst_relative_l2"] == pytest.approx(distance, rel=0.02)
    assert 1e-3 < distance < 0.1
    assert applied.half.parity["typed"] < distance
    placed = check_placement(half, {"batch": 1, "latent_height": 16, "latent_width": 16, "sequence_length": 77})
    assert not placed.problems
    assert not placed.warnings
    assert placed.macs == 1.0
    manifest = whole(bundle)
    assert {f"unet/{kind}.plan.json", f"unet/{kind}.plan.safetensors"} <= manifest.files.keys()
    assert plan_key(load_plan(applied.plan)) == plan_key(plan)
    assert [a.component for a in manifest.artifacts] == ["text_encoder", "unet", "unet", "unet"]
    assert applied.half.inputs["made_from"] == {"unet/model.onnx": manifest.files["unet/model.onnx"].sha256}


def test_weights_alone_make_a_precision_of_their_own(bundle: Path) -> None:
    source = small_source(bundle)
    plan = small_plan(source)
    bare = replace(plan, layers=tuple(replace(layer, scale=None) for layer in plan.layers), vectors={}, corrections={})
    apply_plan(source, plan)
    applied = apply_plan(source, bare)
    assert (applied.full.precision, applied.full.path) == ("int8w", "unet/model.int8w.cpu.onnx")
    assert applied.plan.name == "int8w.plan.json"
    # The network with its weights rounded by hand.
    values = weights()
    for name, weight in values.items():
        if name.endswith("weight"):
            columns = weight if weight.ndim == 2 else weight.reshape(len(weight), -1).T
            steps = np.abs(columns).max(0) / 127
            halves = steps.astype(np.float16)
            steps = np.where(halves < steps, np.nextafter(halves, np.float16(1)), halves).astype(np.float32)
            rounded = np.rint(columns / steps) * steps
            values[name] = rounded if weight.ndim == 2 else rounded.T.reshape(weight.shape)
    save_onnx(network(values), bundle.parent / "rounded.onnx")
    paths = (bundle.parent / "rounded.onnx", bundle / applied.full.path)
    # Left to itself, ONNX Runtime's kernel for products with int8 weights rounds what it multiplies them with.
    wanted, found = (OnnxSession(path) for path in paths)
    feeds = probe_feeds(wanted.spec)
    np.testing.assert_allclose(answer(found, feeds), answer(wanted, feeds), atol=1e-5)
    assert "QuantizeLinear" not in {node.op_type for node in ir.load(bundle / applied.half.path).graph}
    # What is quantized in inputs too stays beside it.
    manifest = whole(bundle)
    assert [(a.precision, a.target) for a in manifest.artifacts if a.component == "unet" and a.precision != "fp32"] == [
        ("int8", "cpu"),
        ("int8", ""),
        ("int8w", "cpu"),
        ("int8w", ""),
    ]


def test_a_correction_is_added_and_smoothing_changes_nothing_else(bundle: Path) -> None:
    """And a layer that is not quantized keeps its vector to itself."""
    source = small_source(bundle)
    plan = small_plan(source)
    layers = tuple(replace(layer, quantized=layer.name == "conv2.weight") for layer in plan.layers)
    apply_plan(source, replace(plan, layers=layers))
    corrected = answer(OnnxSession(bundle / FULL), feeds := probe_feeds(OnnxSession(source.graph).spec))
    apply_plan(source, replace(plan, layers=layers, corrections={}))
    plain = answer(OnnxSession(bundle / FULL), feeds)
    wanted = np.broadcast_to(plan.corrections["conv2.weight"].reshape(1, 16, 1, 1), plain.shape)
    np.testing.assert_allclose(corrected - plain, wanted, atol=1e-5)
    # Nothing of a layer that is not quantized is left in the graph.
    names = ir.load(bundle / FULL).graph.initializers.keys()
    assert {"conv1.weight", "conv_shortcut.weight", "to_k.weight"} <= names
    assert not [name for name in names if "factors" in name]


def test_what_is_up_to_date_stays_and_what_is_not_says_why(quantized: Path) -> None:
    bundle, source, plan = quantized, small_source(quantized), small_plan(small_source(quantized))
    before = (bundle / "manifest.json").read_bytes()
    assert apply_plan(source, plan).reason == ""
    assert (bundle / "manifest.json").read_bytes() == before
    layers = (replace(plan.layers[0], quantized=False), *plan.layers[1:])
    assert apply_plan(source, replace(plan, layers=layers)).reason == "changed: plan"
    assert load_plan(bundle / plan_path("unet", "int8")).layers == layers
    with (bundle / HALF).open("r+b") as file:
        file.write(b"damaged")
    assert "The file was changed after it was made" in apply_plan(source, replace(plan, layers=layers)).reason
    with (bundle / PLAN_FILES[0]).open("a") as file:
        file.write(" ")
    assert "int8.plan.json: expected" in apply_plan(source, replace(plan, layers=layers)).reason
    assert apply_plan(source, plan, force=True).reason == "forced"
    whole(bundle)


def test_engines_of_another_graph_go_and_those_of_this_one_stay(quantized: Path) -> None:
    bundle, source, plan = quantized, small_source(quantized), small_plan(small_source(quantized))

    def add_engines(manifest: Manifest) -> Manifest:
        engines = []
        for precision in ("fp16", "int8"):
            path, sidecar = f"unet/engines/{precision}.engine", f"unet/engines/{precision}.json"
            manifest = with_file(with_file(manifest, bundle, path, b"engine"), bundle, sidecar, b"{}")
            engines.append(EngineRecord("unet", precision, path, sidecar, precision, "tensorrt_rtx", ("sm89",)))
        return replace(manifest, engines=tuple(engines))

    update_manifest(bundle, add_engines)
    apply_plan(source, plan, force=True)
    assert [engine.precision for engine in whole(bundle).engines] == ["fp16", "int8"]
    apply_plan(source, replace(plan, corrections={}))
    assert [engine.precision for engine in whole(bundle).engines] == ["fp16"]
    assert not (bundle / "unet/engines/int8.engine").exists()


def test_of_two_at_once_one_wins_and_the_bundle_is_whole(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In threads: the bundle's lock is a file's, and keeps those of one process apart as it does two processes."""
    ready, put = threading.Barrier(2), put_in

    def together(*args: Any) -> Manifest:
        ready.wait(60)
        return put(*args)

    monkeypatch.setattr("latentrt.calibrate.apply.put_in", together)
    source = small_source(bundle)
    plan = small_plan(source)
    plans = (plan, replace(plan, layers=tuple(replace(layer, scale=0.07) for layer in plan.layers)))
    with ThreadPoolExecutor(2) as pool:
        for applied in pool.map(lambda each: apply_plan(source, each), plans):
            assert applied.reason == "new"
    keys = {a.inputs["plan"] for a in whole(bundle).artifacts if a.precision == "int8"}
    assert keys == {plan_key(load_plan(bundle / plan_path("unet", "int8")))}


class KilledError(BaseException):
    """What ends a process at any place."""


@pytest.mark.parametrize("survives", range(5))
def test_killed_between_any_two_files_the_bundle_is_whole(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    bundle, source, plan = quantized, small_source(quantized), small_plan(small_source(quantized))
    other = replace(plan, layers=tuple(replace(layer, scale=0.07) for layer in plan.layers))
    left, replaced = survives, os.replace

    def replace_or_die(start: Any, end: Any, **options: Any) -> None:
        nonlocal left
        # Into the bundle: what is still in the staging folder does not count.
        if ".export-" not in str(end):
            if left == 0:
                raise KilledError
            left -= 1
        replaced(start, end, **options)

    monkeypatch.setattr(os, "replace", replace_or_die)
    with pytest.raises(KilledError):
        apply_plan(source, other)
    monkeypatch.undo()
    manifest = load_manifest(bundle)
    check_files(bundle, manifest, manifest.files)
    assert {"text_encoder/model.onnx", "unet/model.onnx"} <= manifest.files.keys()
    assert apply_plan(source, other).reason != ""
    assert load_plan(bundle / plan_path("unet", "int8")).layers == other.layers
    whole(bundle)


def test_a_full_disk_leaves_the_bundle_as_it_was(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, plan = small_source(bundle), small_plan(small_source(bundle))
    before = (bundle / "manifest.json").read_bytes()

    def full(model: ir.Model, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half a gr")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("latentrt.export.graph_files._save", full)
    with pytest.raises(OSError, match="No space left"):
        apply_plan(source, plan)
    assert (bundle / "manifest.json").read_bytes() == before
    whole(bundle)
    monkeypatch.undo()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1000))
    with pytest.raises(UsageError, match=r"expected 0.0 GB of free disk for the quantized graphs, got 0.0 GB"):
        apply_plan(source, plan)


def test_a_bundle_exported_anew_meanwhile_keeps_what_it_has(bundle: Path) -> None:
    source, plan = small_source(bundle), small_plan(small_source(bundle))
    content = source.graph.read_bytes()
    update_manifest(bundle, lambda manifest: with_file(manifest, bundle, "unet/model.onnx", b"another"))
    source.graph.write_bytes(content)
    with pytest.raises(ArtifactError, match="it was exported anew meanwhile"):
        apply_plan(source, plan)
    assert not [a for a in load_manifest(bundle).artifacts if a.precision == "int8"]


Change = Callable[[Any], dict[str, Any]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: {"graph": {"unet/model.onnx": "00"}}, "got a plan for another graph"),
        (lambda plan: {"layers": plan.layers[1:]}, "got 1 missing: conv1.weight"),
        (
            lambda plan: {"layers": tuple(replace(layer, quantized=False) for layer in plan.layers)},
            "unet: expected a plan with quantized layers, got none",
        ),
        (lambda plan: {"component": "vae_decoder"}, "plan: expected one for unet, got one for vae_decoder"),
        (
            lambda plan: {"vectors": {"to_k.weight": np.ones(31, np.float32)}},
            r"to_k.weight: vector: expected shape \(32,\)",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused(bundle: Path, change: Change, message: str) -> None:
    source = small_source(bundle)
    plan = small_plan(source)
    with pytest.raises(CalibrationError, match=message):
        apply_plan(source, replace(plan, **change(plan)))
    whole(bundle)


def loud(tmp_path: Path) -> Path:
    """A bundle whose second tensor is beyond float16, as are the integers' steps behind it."""
    folder = tmp_path / "loud.bundle"
    folder.mkdir()
    held = weights()
    return write_bundle(
        folder,
        {
            **held,
            "conv1.weight": held["conv1.weight"] * 1e5,
            "conv2.weight": held["conv2.weight"] / 1e5,
            "conv_shortcut.weight": held["conv_shortcut.weight"] / 1e5,
        },
    )


def test_what_float16_does_not_hold_stays_float32_where_the_export_found_it(tmp_path: Path) -> None:
    bundle = loud(tmp_path)
    source = small_source(bundle)
    quiet = small_plan(source)
    scales = {"conv2.weight": 4e5 / 127, "conv_shortcut.weight": 5e5 / 127}
    layers = tuple(replace(layer, scale=scales.get(layer.name, layer.scale)) for layer in quiet.layers)
    plan = replace(quiet, layers=layers)
    with pytest.raises(
        CalibrationError, match=r"unet int8: expected tensors within float16's 65504, .* --precision fp16"
    ):
        apply_plan(source, plan)
    mixed = artifact("unet", "mixed", parity={"kept": ["hidden", "active", "joined"]})

    def add(manifest: Manifest) -> Manifest:
        manifest = with_file(manifest, bundle, mixed.path, b"a mixed graph")
        return replace(manifest, artifacts=(*manifest.artifacts, mixed))

    update_manifest(bundle, add)
    applied = apply_plan(source, plan)
    assert applied.half.parity["typed"] < 0.02
    half = ir.load(bundle / HALF)
    types = {str(v.name): v.dtype for node in half.graph for v in (*node.inputs, *node.outputs) if v is not None}
    assert types["hidden"] == ir.DataType.FLOAT
    # Both inputs of the convolution behind it are of one type, right from DequantizeLinear.
    (conv,) = (node for node in half.graph if node.op_type == "Conv" and "conv2.weight" in str(node.inputs[1]))
    for value in conv.inputs[:2]:
        assert value is not None
        assert value.dtype == ir.DataType.FLOAT
        maker = value.producer()
        assert maker is not None
        assert maker.op_type == "DequantizeLinear"
    assert types["k"] == ir.DataType.FLOAT16
    # A plain fp16 graph says that nothing has to stay.
    assert applied.half.inputs["float32"] == ["hidden", "active", "joined"]
    assert applied.full.inputs["float32"] == []
