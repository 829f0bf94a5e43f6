"""Engines whose files leave out what the graph holds: found, left out, and the same bytes again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engine_bundle import make_bundle, unet_graph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from latentrt.export.build_options import BuildOptions
from latentrt.export.engine_builder import build_engine
from latentrt.export.engine_config import EngineConfig
from latentrt.export.engine_jobs import build_engines
from latentrt.export.engine_thinning import thin_engine
from latentrt.runtime.engine_sidecar import ShapeProfile, read_sidecar
from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.machine import Machine, probe_machine
from latentrt.runtime.manifest import load_manifest, sha256_of
from latentrt.runtime.thin_engine import MAGIC, Piece, is_thin, restore_engine

Weights = Mapping[str, NDArray[Any]]

RNG = np.random.default_rng(5)
KERNELS = RNG.integers(0, 255, 4096).astype(np.uint8).tobytes()
SCALE = 0.3799
WEIGHTS: Weights = {
    "conv": RNG.standard_normal((16, 8, 3, 3)).astype(np.float16),
    "linear": RNG.standard_normal((32, 64)).astype(np.float16),
    "gated": RNG.standard_normal((16, 96)).astype(np.float16),
    "query": RNG.standard_normal((32, 32)).astype(np.float16),
    "bias": RNG.standard_normal(512).astype(np.float32),
    "scale": np.array(SCALE, np.float16),
}


def save_graph(path: Path, weights: Weights) -> Path:
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["c"], pads=[1] * 4),
        helper.make_node("Mul", ["c", "scale"], ["y"]),
    ]
    info = helper.make_tensor_value_info
    tensors = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    half = TensorProto.FLOAT16
    graph = helper.make_graph(nodes, "g", [info("x", half, [1, 8, 4, 4])], [info("y", half, [1, 16, 4, 4])], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return save_graph(tmp_path / "model.onnx", WEIGHTS)


def header_of(thin: bytes) -> dict[str, Any]:
    end = 16 + int.from_bytes(thin[8:16], "little")
    header: dict[str, Any] = json.loads(thin[16:end])
    return header


def found(engine: bytes, graph: Path) -> list[tuple[str, str, bool, int, int]]:
    """What was left out: name, layout, whether scaled, which slice; the engine has to come back byte for byte."""
    thin = thin_engine(memoryview(engine), graph)
    assert bytes(restore_engine(memoryview(thin), graph)) == engine
    pieces = [Piece(*fields) for fields in header_of(thin)["pieces"]]
    return [(piece.name, piece.layout, piece.scale is not None, piece.part, piece.position) for piece in pieces]


def channels_last(values: NDArray[Any]) -> bytes:
    return np.moveaxis(values, 1, -1).tobytes()


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (WEIGHTS["conv"].tobytes(), ("conv", "plain", False, 0)),
        (channels_last(WEIGHTS["conv"]), ("conv", "channels_last", False, 0)),
        (WEIGHTS["linear"].tobytes(), ("linear", "plain", False, 0)),
        (WEIGHTS["linear"].T.tobytes(), ("linear", "transposed", False, 0)),
        (WEIGHTS["bias"].tobytes(), ("bias", "plain", False, 0)),
        ((WEIGHTS["query"] * np.float16(SCALE)).tobytes(), ("query", "plain", True, 0)),
        ((WEIGHTS["query"] * np.float16(SCALE)).T.tobytes(), ("query", "transposed", True, 0)),
        (WEIGHTS["gated"][:, 48:].tobytes(), ("gated", "plain", False, 1)),
    ],
)
def test_a_weight_is_found_in_every_form_that_engines_hold_it_in(
    graph: Path, stored: bytes, expected: tuple[Any, ...]
) -> None:
    assert found(KERNELS + stored + KERNELS[:100], graph) == [(*expected, len(KERNELS))]


def test_weights_side_by_side_and_twice_are_found_and_little_is_kept(graph: Path) -> None:
    """Rows of a joined matrix lie apart; a second profile may hold a copy."""
    joined = np.concatenate([WEIGHTS["linear"], WEIGHTS["query"]], axis=1)
    engine = KERNELS + joined.tobytes() + channels_last(WEIGHTS["conv"]) * 2 + b"end"
    after = len(KERNELS) + joined.nbytes
    assert sorted(found(engine, graph)) == [
        ("conv", "channels_last", False, 0, after),
        ("conv", "channels_last", False, 0, after + WEIGHTS["conv"].nbytes),
        ("linear", "plain", False, 0, len(KERNELS)),
        ("query", "plain", False, 0, len(KERNELS) + 128),
    ]
    kept = header_of(thin_engine(memoryview(engine), graph))["kept"]
    assert kept == [[0, len(KERNELS)], [len(engine) - 3, 3]]


def test_a_weight_with_one_other_bit_or_at_an_odd_place_is_kept(graph: Path) -> None:
    changed = bytearray(WEIGHTS["linear"].tobytes())
    changed[-1] ^= 1
    assert found(KERNELS + bytes(changed), graph) == [("linear", "plain", False, 0, len(KERNELS))]  # its left half
    changed[40] ^= 1
    assert found(KERNELS + bytes(changed), graph) == []
    assert found(KERNELS + b"odd" + WEIGHTS["linear"].tobytes(), graph) == []
    shifted = KERNELS + b"even" + WEIGHTS["linear"].tobytes()
    assert found(shifted, graph) == [("linear", "plain", False, 0, len(KERNELS) + 4)]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["linear", "conv", "bias", "junk", "zeros"]), max_size=6), st.binary(max_size=40))
def test_whatever_an_engine_holds_comes_back(graph: Path, parts: list[str], tail: bytes) -> None:
    engine = b"".join(
        KERNELS[:64] if p == "junk" else bytes(640) if p == "zeros" else WEIGHTS[p].tobytes() for p in parts
    )
    thin = thin_engine(memoryview(engine + tail), graph)
    assert is_thin(memoryview(thin))
    assert bytes(restore_engine(memoryview(thin), graph)) == engine + tail


def test_another_graph_is_noticed(graph: Path, tmp_path: Path) -> None:
    thin = memoryview(thin_engine(memoryview(KERNELS + WEIGHTS["linear"].tobytes()), graph))
    other = save_graph(tmp_path / "other.onnx", {**WEIGHTS, "linear": WEIGHTS["linear"] + np.float16(1)})
    with pytest.raises(ArtifactError, match=r"other\.onnx: expected the weights that the engine was built from"):
        restore_engine(thin, other)
    without = save_graph(tmp_path / "without.onnx", {n: w for n, w in WEIGHTS.items() if n != "linear"})
    with pytest.raises(ArtifactError, match="linear"):
        restore_engine(thin, without)


def edited(thin: bytes, **changes: Any) -> memoryview:
    header = json.dumps({**header_of(thin), **changes}).encode()
    start = 16 + int.from_bytes(thin[8:16], "little")
    return memoryview(MAGIC + len(header).to_bytes(8, "little") + header + thin[start:])


@pytest.mark.parametrize(
    "changes",
    [
        {"bytes": 10},
        {"bytes": "many"},
        {"kept": [[0, 99999]]},
        {"pieces": [["linear", "plain", None, 0, 1, 8000, 128]]},
        {"pieces": [["linear", "plain", None, 0, 1, -16, 128]]},
        {"pieces": [["linear", "plain", None, 0, 1, 0, 4]]},
        {"pieces": [["linear", "plain", None, 0, 0, 0, 128]]},
        {"pieces": [["linear"]]},
        {"sha256": "0"},
    ],
)
def test_an_edited_file_is_refused_and_writes_nowhere_else(graph: Path, changes: dict[str, Any]) -> None:
    thin = thin_engine(memoryview(KERNELS + WEIGHTS["linear"].tobytes()), graph)
    with pytest.raises(ArtifactError):
        restore_engine(edited(thin, **changes), graph)


@pytest.mark.parametrize("length", [8, 12, 40, -1])
def test_a_truncated_file_is_refused(graph: Path, length: int) -> None:
    thin = thin_engine(memoryview(KERNELS), graph)
    with pytest.raises(ArtifactError, match="build BUNDLE --strip"):
        restore_engine(memoryview(thin[:length]), graph)


def wide_graph() -> Any:
    """The tiny U-Net with 128 features, so that its weights are worth leaving out."""
    model = unet_graph()
    for tensor in model.graph.initializer:
        shapes = {"conv_in.weight": (128, 4, 3, 3), "conv_out.weight": (4, 128, 3, 3), "to_k.weight": (64, 128)}
        if tensor.name in shapes:
            values = RNG.standard_normal(shapes[tensor.name]).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


def test_a_real_engine_comes_back_and_its_weights_are_all_left_out(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install 'latentrt[tensorrt-rtx]'")
    onnx.save(wide_graph(), tmp_path / "model.onnx")
    shapes = {"sample": (2, 4, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 77, 64)}
    profile = {name: ShapeProfile(*[shape] * 3) for name, shape in shapes.items()}
    plan = build_engine(trt, tmp_path / "model.onnx", EngineConfig("unet", "fp16", (profile,), ("sm89",))).plan
    left_out = found(bytes(plan), tmp_path / "model.onnx")
    assert {name for name, *_ in left_out} == {"conv_in.weight", "conv_out.weight", "to_k.weight"}


def test_a_bundle_keeps_the_thin_file_and_says_so(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'latentrt[tensorrt-rtx]'")
    machine = Machine(packages=probe_machine().packages, why_no_gpu="none is wanted", platform="linux_x86_64")
    bundle = make_bundle(tmp_path / "bundle", unet=wide_graph())
    options = BuildOptions(target="sm89", components=("unet",), size="64", cache="off", strip=True)
    (result,) = build_engines(bundle, options, machine=machine)
    assert (result.sidecar.thin, result.sidecar.stripped) == (True, False)
    (record,) = load_manifest(bundle).engines
    assert read_sidecar(bundle / record.sidecar) == result.sidecar
    content = (bundle / result.path).read_bytes()
    assert (result.sidecar.engine_bytes, result.sidecar.engine_sha256) == (
        len(content),
        sha256_of(bundle / result.path),
    )
    engine = restore_engine(memoryview(content), bundle / "unet/model.fp16.onnx")
    assert len(content) < len(engine) / 4
    (again,) = build_engines(bundle, options, machine=machine)
    assert not again.built
