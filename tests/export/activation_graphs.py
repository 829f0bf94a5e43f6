"""Graphs with the blocks of a U-Net and a VAE, small enough to build an engine of in a second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


class GraphOfBlocks:
    """Nodes one after the other; each method adds some and returns the name of the value they end in.

    Args:
        dtype: that it computes in: float16 or float32.
    """

    def __init__(self, dtype: Any = np.float16) -> None:
        self.dtype = dtype
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}

    def node(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=name, **attributes))
        return names[0]

    def constant(self, values: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.asarray(values)
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(np.full(shape, 0.01, self.dtype))

    def entry(self, value: str) -> str:
        """An input in the type that the graph computes in."""
        return self.node("Cast", value, to=HALF if self.dtype == np.float16 else FLOAT)

    def conv(self, x: str, channels: int, made: int) -> str:
        return self.node("Conv", x, self.weight(made, channels, 3, 3), pads=[1] * 4)

    def norm(self, x: str, channels: int, side: int) -> str:
        """A group norm of eight groups as the exporter writes it, and a SiLU."""
        groups = self.node("Reshape", x, self.constant(np.array([0, 8, -1, side])))
        normed = self.node("InstanceNormalization", groups, self.weight(8), self.weight(8))
        y = self.node("Reshape", normed, self.constant(np.array([0, channels, side, side])))
        y = self.node("Add", self.node("Mul", y, self.weight(channels, 1, 1)), self.weight(channels, 1, 1))
        return self.node("Mul", y, self.node("Sigmoid", y))

    def residual_block(self, x: str, channels: int, side: int) -> str:
        y = self.conv(self.norm(x, channels, side), channels, channels)
        y = self.conv(self.norm(y, channels, side), channels, channels)
        return self.node("Add", x, y)

    def upsample(self, x: str) -> str:
        scales = self.constant(np.array([1, 1, 2, 2], np.float32))
        where = "asymmetric"
        return self.node(
            "Resize", x, "", scales, mode="nearest", coordinate_transformation_mode=where, nearest_mode="floor"
        )

    def linear(self, x: str, channels: int, made: int) -> str:
        return self.node("MatMul", x, self.weight(channels, made))

    def attention(self, x: str, text: str, channels: int, heads: int, text_channels: int) -> str:
        """Scaled dot product attention of x (b, n, channels) to a text, and its residual."""
        normed = self.node("LayerNormalization", x, self.weight(channels), self.weight(channels))
        split = self.constant(np.array([0, 0, heads, channels // heads]))
        scale = self.constant(np.array((channels // heads) ** -0.25, self.dtype))

        def head(value: str, perm: Sequence[int]) -> str:
            return self.node("Transpose", self.node("Reshape", value, split), perm=perm)

        q = self.node("Mul", head(self.linear(normed, channels, channels), (0, 2, 1, 3)), scale)
        source, width = (normed, channels) if text == x else (text, text_channels)
        k = self.node("Mul", head(self.linear(source, width, channels), (0, 2, 3, 1)), scale)
        v = head(self.linear(source, width, channels), (0, 2, 1, 3))
        scores = self.node("Softmax", self.node("MatMul", q, k), axis=-1)
        joined = self.node("Transpose", self.node("MatMul", scores, v), perm=(0, 2, 1, 3))
        joined = self.node("Reshape", joined, self.constant(np.array([0, 0, channels])))
        y = self.node("Add", self.weight(channels), self.linear(joined, channels, channels))
        return self.node("Add", y, x)

    def feed_forward(self, x: str, channels: int) -> str:
        normed = self.node("LayerNormalization", x, self.weight(channels), self.weight(channels))
        both = self.node("Add", self.weight(8 * channels), self.linear(normed, channels, 8 * channels))
        first = self.node("Split", both, outputs=2, axis=-1, num_outputs=2)
        gate = self.node("Gelu", f"{first[:-2]}_1")
        y = self.linear(self.node("Mul", first, gate), 4 * channels, channels)
        return self.node("Add", self.node("Add", self.weight(channels), y), x)

    def model(self, inputs: dict[str, Sequence[int | str]], result: str, shape: Sequence[int | str]) -> onnx.ModelProto:
        """The model, whose inputs and only output are float32."""
        self.nodes.append(helper.make_node("Cast", [result], ["out"], to=FLOAT, name="out"))
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "blocks",
            [info(name, FLOAT, dims) for name, dims in inputs.items()],
            [info("out", FLOAT, shape)],
            [numpy_helper.from_array(values, name) for name, values in self.weights.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def decoder(channels: int = 64, side: int = 64) -> onnx.ModelProto:
    """The end of a VAE decoder: a residual block, twice the size, half the channels, and another."""
    g = GraphOfBlocks()
    x = g.conv(g.entry("z"), 4, channels)
    x = g.conv(g.upsample(g.residual_block(x, channels, side)), channels, channels // 2)
    x = g.residual_block(x, channels // 2, 2 * side)
    return g.model({"z": ["b", 4, side, side]}, g.conv(x, channels // 2, 4), ["b", 4, 2 * side, 2 * side])


def transformer(channels: int = 64, heads: int = 2, tokens: int = 1024, layers: int = 2) -> onnx.ModelProto:
    """Blocks of self-attention, attention to a text, and a gated feed-forward."""
    g = GraphOfBlocks()
    x, text = g.entry("x"), g.entry("text")
    x = g.linear(x, channels, channels)
    for _ in range(layers):
        x = g.attention(x, x, channels, heads, channels)
        x = g.attention(x, text, channels, heads, 32)
        x = g.feed_forward(x, channels)
    return g.model(
        {"x": ["b", tokens, channels], "text": ["b", 77, 32]}, g.linear(x, channels, channels), ["b", tokens, channels]
    )


def attention(channels: int, heads: int, tokens: int = 1024, dtype: Any = np.float16) -> onnx.ModelProto:
    """One self-attention between two linear layers."""
    g = GraphOfBlocks(dtype)
    x = g.linear(g.entry("x"), channels, channels)
    x = g.attention(x, x, channels, heads, channels)
    return g.model({"x": ["b", tokens, channels]}, g.linear(x, channels, channels), ["b", tokens, channels])
