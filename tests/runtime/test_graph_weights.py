"""A graph's weights by the network's names, and sessions in which some of them are others; PyTorch's layout judges."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engine_bundle import unet_graph
from onnx import TensorProto, helper, numpy_helper

from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.graph_weights import GraphWeights, stripped_weights
from latentrt.runtime.session import OnnxSession
from latentrt.runtime.specs import Array

RNG = np.random.default_rng(0)
FEEDS: dict[str, Array] = {
    "sample": RNG.standard_normal((2, 4, 8, 8)).astype(np.float32),
    "timestep": np.ones(2, np.float32),
    "encoder_hidden_states": RNG.standard_normal((2, 77, 64)).astype(np.float32),
}
STORAGES = ["inline", "external"]


def write(path: Path, model: Any, storage: str = "inline") -> Path:
    """`external` leaves weights below 600 bytes in the graph, as exports do with those below 1024."""
    if storage == "external":
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}_data", size_threshold=600)
    else:
        onnx.save(model, path)
    return path


def replaced(model: Any, weights: dict[str, Array]) -> Any:
    """The oracle: a graph that was made with these weights."""
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    return model


def new_weights(model: Any) -> dict[str, Array]:
    return {
        tensor.name: (numpy_helper.to_array(tensor) + RNG.standard_normal(tensor.dims)).astype(
            numpy_helper.to_array(tensor).dtype
        )
        for tensor in model.graph.initializer
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
    }


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("inner", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_b_base(tmp_path: Path, inner: int, storage: str, optimize: bool) -> None:
    """Every session is, bit for bit, that of a graph with these weights; the last that of the graph before."""
    path = write(tmp_path / "model.onnx", unet_graph(inner=inner), storage)
    before = OnnxSession(path, optimize=optimize)(FEEDS)["out_sample"]
    content = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for _ in "AB":
        weights = new_weights(unet_graph(inner=inner))
        oracle = write(tmp_path / "oracle.onnx", replaced(unet_graph(inner=inner), weights))
        wanted = OnnxSession(oracle, optimize=optimize)(FEEDS)["out_sample"]
        session = OnnxSession(path, optimize=optimize, weights=dict(weights))
        del weights
        gc.collect()
        found = np.asarray(session(FEEDS)["out_sample"], np.float32)
        np.testing.assert_array_equal(found, wanted)
        assert np.abs(found - np.asarray(before, np.float32)).max() > 0.1
        oracle.unlink()
    np.testing.assert_array_equal(OnnxSession(path, optimize=optimize, weights={})(FEEDS)["out_sample"], before)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == content


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "weights",
    [
        {"mid.weight": np.ones((2, 2), np.float16)},
        {"conv_in.weight": np.ones((8, 4, 3, 3), np.float32)},
        {"to_k.weight": np.ones((8, 64), np.float16)},
    ],
)
def test_weights_that_the_graph_does_not_have(tmp_path: Path, storage: str, weights: dict[str, Array]) -> None:
    path = write(tmp_path / "model.onnx", unet_graph(), storage)
    with pytest.raises(ArtifactError, match=next(iter(weights))):
        OnnxSession(path, weights=weights)


def layers_graph(dtype: int = TensorProto.FLOAT) -> Any:
    """A weight in each way that nodes read them."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "unet.linear.weight"], ["a"]),
        node("Gemm", ["x", "unet.gemm.weight", "unet.gemm.bias"], ["b"], transB=1),
        node("Gemm", ["x", "unet.gemm_as_read.weight"], ["c"]),
        node("Conv", ["p", "unet.conv.weight"], ["d"]),
        node("NhwcConv", ["p", "unet.last.weight_channels_last"], ["e"], domain="com.microsoft"),
        node("Mul", ["p", "unet.group.weight"], ["f"]),
        node("MatMul", ["unet.left.weight", "x"], ["g"]),
        node("MatMul", ["x", "unet.both.weight"], ["h"]),
        node("Add", ["x", "unet.both.weight"], ["i"]),
        node("Mul", ["x", "scale"], ["j"]),
    ]
    shapes = {
        "unet.linear.weight": (6, 6),
        "unet.gemm.weight": (6, 6),
        "unet.gemm.bias": (6,),
        "unet.gemm_as_read.weight": (6, 6),
        "unet.conv.weight": (2, 3, 1, 1),
        "unet.last.weight_channels_last": (2, 5, 4, 3),
        "unet.group.weight": (4, 1, 1),
        "unet.left.weight": (6, 6),
        "unet.both.weight": (6, 6),
        "scale": (1,),
    }
    weights = [
        helper.make_tensor(name, dtype, shape, RNG.standard_normal(shape).reshape(-1).tolist())
        for name, shape in shapes.items()
    ]
    graph = helper.make_graph(nodes, "layers", [], [], weights)
    return replaced(helper.make_model(graph), {name: RNG.standard_normal(s).astype("f") for name, s in shapes.items()})


def test_the_layout_is_told_by_the_node_that_reads_a_weight(tmp_path: Path) -> None:
    model = layers_graph()
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = GraphWeights.open(write(tmp_path / "model.onnx", model))
    wanted = {
        "linear.weight": held["unet.linear.weight"].T,
        "gemm.weight": held["unet.gemm.weight"],
        "gemm.bias": held["unet.gemm.bias"],
        "gemm_as_read.weight": held["unet.gemm_as_read.weight"].T,
        "conv.weight": held["unet.conv.weight"],
        "last.weight": held["unet.last.weight_channels_last"].transpose(0, 3, 1, 2),
        "group.weight": held["unet.group.weight"].reshape(4),
    }
    assert weights.by_parameter.keys() == wanted.keys()
    for parameter, values in wanted.items():
        weight = weights.by_parameter[parameter]
        assert weight.shape == values.shape
        np.testing.assert_array_equal(weights.read(weight), values)
        np.testing.assert_array_equal(weights.laid(weight, weights.read(weight)), held[weight.name])


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_weights_come_back_as_they_were(tmp_path: Path, dtype: int) -> None:
    values = np.array([0, 1, -1.5, 6e-8, -6e-8, 65504, 1 / 3, 3e-5], np.float32)
    node = helper.make_node("Add", ["x", "a.bias"], ["y"])
    tensor = helper.make_tensor("a.bias", dtype, [8], values.tolist())
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), "a.bias"))
    path = write(tmp_path / "model.onnx", helper.make_model(helper.make_graph([node], "g", [], [], [tensor])))
    weights = GraphWeights.open(path)
    weight = weights.by_parameter["a.bias"]
    read = weights.read(weight)
    np.testing.assert_allclose(read, values, rtol=1e-2)
    assert weights.laid(weight, read).tobytes() == tensor.raw_data
    # To nearest, ties to even, as ml_dtypes and NumPy round.
    other = np.linspace(-3, 3, 8, dtype=np.float32) * np.float32(1 + 2**-8)
    wanted = other.astype(numpy_helper.to_array(tensor).dtype)
    assert weights.laid(weight, other).tobytes() == wanted.tobytes()


def test_what_float16_does_not_hold(tmp_path: Path) -> None:
    weights = GraphWeights.open(write(tmp_path / "model.onnx", unet_graph()))
    weight = weights.by_parameter["to_k.weight"]
    # As an export does: what would become zero stays the smallest number.
    tiny = weights.laid(weight, np.full((8, 64), -1e-9, np.float32))
    np.testing.assert_array_equal(tiny, np.full((64, 8), -np.finfo(np.float16).smallest_subnormal))
    for value in (7e4, np.nan, -np.inf):
        with pytest.raises(UsageError, match=r"to_k\.weight.*65504.*Lower the scale"):
            weights.laid(weight, np.full((8, 64), value, np.float32))


@pytest.mark.parametrize("storage", STORAGES)
def test_weights_of_an_engine_by_name(tmp_path: Path, storage: str) -> None:
    path = write(tmp_path / "model.onnx", unet_graph(), storage)
    names = ["conv_out.weight", "to_k.weight"]
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in unet_graph().graph.initializer}
    found = stripped_weights(path, names)
    assert list(found) == names
    for name, values in found.items():
        np.testing.assert_array_equal(values, held[name])
    with pytest.raises(ArtifactError, match=r"found 2 of 3; x\.weight is none"):
        stripped_weights(path, [*names, "x.weight"])


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x3a\x7f")
    with pytest.raises(ArtifactError, match="damaged"):
        GraphWeights.open(tmp_path / "model.onnx")
    path = write(tmp_path / "whole.onnx", unet_graph(), "external")
    (tmp_path / "whole.onnx_data").write_bytes(bytes(10))
    with pytest.raises(ArtifactError, match="bytes of weights"):
        stripped_weights(path, ["to_k.weight"])
