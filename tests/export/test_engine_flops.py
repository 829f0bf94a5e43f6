from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engine_bundle import unet_graph
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from latentrt.export.engine_flops import layer_flops
from latentrt.export.engine_readout import Layer, read_layers
from latentrt.runtime.trt_log import shared_logger

trt: Any = pytest.importorskip("tensorrt_rtx", reason="pip install 'latentrt[tensorrt-rtx]'")
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def layers_of(path: Path, model: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Layer]:
    onnx.save(model, path)
    builder = trt.Builder(shared_logger(trt))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, shared_logger(trt))
    assert parser.parse_from_file(str(path))
    return {layer.name: layer for layer in read_layers(trt, network, shapes)}


def test_a_networks_layers_at_given_sizes(tmp_path: Path) -> None:
    shapes = {"sample": (3, 4, 8, 16), "timestep": (3,), "encoder_hidden_states": (3, 77, 64)}
    assert layers_of(tmp_path / "unet.onnx", unet_graph(), shapes) == {
        # 3 rows of 8 x 16 pixels, 8 outputs of 4 channels under 3 x 3
        "conv_in": Layer("conv_in", "convolution", "Half", 8 * 4 * 9, 2 * 3 * 8 * 16 * 8 * 4 * 9),
        "conv_out": Layer("conv_out", "convolution", "Half", 4 * 8 * 9, 2 * 3 * 8 * 16 * 4 * 8 * 9),
        "to_k": Layer("to_k", "matrix_multiply", "Half", 64 * 8, 2 * 3 * 77 * 64 * 8),
    }


def test_strides_groups_transposes_and_sums_by_hand(tmp_path: Path) -> None:
    """Each layer's count is that of its definition; groups see only their own channels."""
    node, rng = helper.make_node, np.random.default_rng(0)

    def weight(name: str, *shape: int) -> Any:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    nodes = [
        node("Conv", ["x", "w"], ["c"], name="grouped", pads=[1] * 4, strides=[2, 2], group=4),
        node("ConvTranspose", ["x", "u"], ["d"], name="upwards", strides=[2, 2]),
        node("MatMul", ["q", "k"], ["scores"], name="scores"),
        node("Gemm", ["r", "g"], ["e"], name="gemm", transA=1, transB=1),
        node("Einsum", ["q", "k"], ["s"], name="sums", equation="bhqd,bhdk->bhqk"),
    ]
    info = helper.make_tensor_value_info
    inputs = {"x": (2, 8, 16, 16), "q": (2, 5, 7, 64), "k": (2, 5, 64, 11), "r": (64, 3)}
    graph = helper.make_graph(
        nodes,
        "g",
        [info(name, FLOAT, shape) for name, shape in inputs.items()],
        [info(name, FLOAT, None) for name in ("c", "d", "scores", "e", "s")],
        [weight("w", 12, 2, 3, 3), weight("u", 8, 6, 2, 2), weight("g", 10, 64)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    found = layers_of(tmp_path / "g.onnx", model, inputs)
    assert {name: (layer.weights, layer.flops) for name, layer in found.items()} == {
        "grouped": (12 * 2 * 9, 2 * (2 * 12 * 8 * 8) * 2 * 9),
        "upwards": (8 * 6 * 4, 2 * (2 * 8 * 16 * 16) * 6 * 4),
        "scores": (0, 2 * 2 * 5 * 7 * 11 * 64),
        "gemm": (10 * 64, 2 * 3 * 10 * 64),
        "sums": (0, 2 * 2 * 5 * 7 * 11 * 64),
    }
    assert {layer.precision for layer in found.values()} == {"Float"}


def test_a_layer_is_int8_only_where_both_its_operands_are(tmp_path: Path) -> None:
    """A convolution with quantized input and weights, one with its input alone, a product with its weights alone."""
    node = helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "one", "zero"], ["x_q"]),
        node("DequantizeLinear", ["x_q", "one", "zero"], ["x_d"]),
        node("DequantizeLinear", ["w", "one", "zero"], ["w_d"]),
        node("Conv", ["x_d", "w_d"], ["c"], name="both"),
        node("DequantizeLinear", ["v", "one", "zero"], ["v_d"]),
        node("MatMul", ["c", "v_d"], ["y"], name="weights_only"),
        node("Conv", ["x_d", "u"], ["z"], name="input_only"),
    ]
    weights: dict[str, NDArray[Any]] = {
        "one": np.ones((), np.float16),
        "zero": np.zeros((), np.int8),
        "w": np.ones((8, 4, 1, 1), np.int8),
        "v": np.ones((16, 5), np.int8),
        "u": np.ones((2, 4, 1, 1), np.float16),
    }
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", HALF, (1, 4, 16, 16))],
        [info("y", HALF, None), info("z", HALF, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    found = layers_of(tmp_path / "g.onnx", model, {"x": (1, 4, 16, 16)})
    assert {name: (layer.precision, layer.weights) for name, layer in found.items()} == {
        "both": ("Int8", 32),
        "weights_only": ("Int8w", 80),
        "input_only": ("Half", 8),
    }


def test_what_does_not_multiply_matrices_counts_nothing() -> None:
    class Softmax:
        class type:  # noqa: N801 # as TensorRT has it
            name = "SOFTMAX"

    assert layer_flops(None, Softmax) == 0
