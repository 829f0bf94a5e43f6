"""Small graphs in the exporter's form, and ONNX Runtime's CUDA operators in NumPy, written from their documentation."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from small_graphs import model_of

GENERATOR = np.random.default_rng(4)
MICROSOFT = "com.microsoft"


def floats(*shape: int) -> Any:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


def attention(*, mask: bool = False, packed: bool = False, late_scale: bool = False) -> ir.Model:
    """Four heads of eight; self-attention if packed or masked, otherwise of a text."""
    source = "x" if packed or mask else "text"
    width = 32 if packed or mask else 16
    project = (
        "qkv = MatMul(x, w)  q, k, v = Split <axis = -1, num_outputs = 3> (qkv)"
        if packed
        else f"q = MatMul(x, wq)  k = MatMul({source}, wk)  v = MatMul({source}, wv)"
    )
    scale = (
        "raw = MatMul(qh, kt)  scores = Mul(raw, both)"
        if late_scale
        else "qs = Mul(qh, root)  ks = Mul(kt, root)  scores = MatMul(qs, ks)"
    )
    masked = "seen = Add(scores, mask)" if mask else "seen = Identity(scores)"
    text = f"""unet (float[b, 6, 32] x, float[b, 5, 16] text) => (float[b, 6, 32] y) {{
        {project}
        q4 = Reshape(q, heads)  k4 = Reshape(k, heads)  v4 = Reshape(v, heads)
        qh = Transpose <perm = [0, 2, 1, 3]> (q4)
        kt = Transpose <perm = [0, 2, 3, 1]> (k4)
        vh = Transpose <perm = [0, 2, 1, 3]> (v4)
        {scale}
        {masked}
        p = Softmax <axis = -1> (seen)
        o4 = MatMul(p, vh)
        oh = Transpose <perm = [0, 2, 1, 3]> (o4)
        y = Reshape(oh, flat)
    }}"""
    weights = {
        "heads": ints(0, -1, 4, 8),
        "flat": ints(0, -1, 32),
        **(
            {"w": floats(32, 96)}
            if packed
            else {"wq": floats(32, 32), "wk": floats(width, 32), "wv": floats(width, 32)}
        ),
        **({"both": np.float32(0.3)} if late_scale else {"root": np.float32(0.6)}),
        **({"mask": np.triu(np.full((1, 1, 6, 6), -1e4, np.float32), 1)} if mask else {}),
    }
    if not mask:
        text = text.replace("seen = Identity(scores)", "").replace("(seen)", "(scores)")
    return model_of(text, weights)


NORM = """
        {out}_g = Reshape({x}, groups)
        {out}_i = InstanceNormalization <epsilon = 1e-5> ({out}_g, ones, zeros)
        {out}_s = Shape({x})
        {out}_r = Reshape({out}_i, {out}_s)
        {out}_m = Mul({out}_r, gamma)
        {out} = Add({out}_m, beta)"""
SILU = """
        {out}_sigmoid = Sigmoid({x})
        {out} = Mul({x}, {out}_sigmoid)"""


def resnet() -> ir.Model:
    """A residual block with its timestep, a skip connection, upsampling, and what the attention around it reads."""
    text = f"""unet (float[b, 8, h, w] sample, float[b, 8] time) => (float[b, 4, i, j] y, float[b, m, 8] tokens) {{
        c0 = Conv <pads = [1, 1, 1, 1]> (sample, w0, b0)
        {NORM.format(x="c0", out="n1")} {SILU.format(x="n1", out="a1")}
        c1 = Conv <pads = [1, 1, 1, 1]> (a1, w1, b1)
        t4 = Unsqueeze(time, last_axes)
        h1 = Add(c1, t4)
        {NORM.format(x="h1", out="n2")} {SILU.format(x="n2", out="a2")}
        c2 = Conv <pads = [1, 1, 1, 1]> (a2, w2, b2)
        h2 = Add(c0, c2)
        {NORM.format(x="h2", out="n3")}
        p = Conv(n3, w3, b3)
        q = Transpose <perm = [0, 2, 3, 1]> (p)
        tokens = Reshape(q, flat)
        joined = Concat <axis = 1> (h2, c0)
        size = Shape <start = 2> (h2)
        twice = Mul(size, two)
        channels = Shape <start = 0, end = 2> (joined)
        sizes = Concat <axis = 0> (channels, twice)
        up = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
            (joined, , , sizes)
        y = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (up, w4)
    }}"""
    weights = {
        "groups": ints(0, 2, -1),
        "ones": np.ones(2, np.float32),
        "zeros": np.zeros(2, np.float32),
        "gamma": floats(8, 1, 1),
        "beta": floats(8, 1, 1),
        "last_axes": ints(2, 3),
        "flat": ints(0, -1, 8),
        "two": ints(2),
        **{f"w{index}": floats(8, 8, 3, 3) / 8 for index in range(3)},
        **{f"b{index}": floats(8) for index in range(4)},
        "w3": floats(8, 8, 1, 1) / 3,
        "w4": floats(4, 16, 3, 3) / 8,
    }
    return model_of(text, weights)


def native_norm() -> ir.Model:
    """Group norm as one operator, then an upsampling by constant scales."""
    text = """<ir_version: 10, opset_import: ["" : 21]>
    vae (float[b, 8, h, w] x) => (float[b, 8, i, j] y) {
        normed = GroupNormalization <num_groups = 2, epsilon = 1e-5> (x, gamma, beta)
        gate = Sigmoid(normed)
        active = Mul(normed, gate)
        up = Resize <mode = "nearest"> (active, , scales)
        y = Conv <pads = [1, 1, 1, 1]> (up, w)
    }"""
    scales = np.array([1, 1, 2, 3], np.float32)
    return model_of(text, {"gamma": floats(8), "beta": floats(8), "scales": scales, "w": floats(8, 8, 3, 3)})


def geglu(width: int) -> ir.Model:
    text = f"""unet (float[b, n, 4] x) => (float[b, n, {width}] y) {{
        wide = MatMul(x, w)
        biased = Add(wide, bias)
        a, gate = Split <axis = -1, num_outputs = 2> (biased)
        open = Gelu(gate)
        y = Mul(a, open)
    }}"""
    return model_of(text, {"w": floats(4, 2 * width), "bias": floats(2 * width)})


def residual_norm(*, summed: bool) -> ir.Model:
    """A projection with bias, its residual, the layer norm of the sum, and perhaps a reader of the sum before it."""
    before, end = ("early = Neg(total)", "y = Sub(normed, early)") if summed else ("", "y = Identity(normed)")
    text = f"""unet (float[b, n, 16] x, float[b, n, 16] skip) => (float[b, n, 16] y) {{
        projected = MatMul(x, w)
        biased = Add(projected, bias)
        total = Add(biased, skip)
        {before}
        normed = LayerNormalization <axis = -1, epsilon = 1e-5> (total, gamma, beta)
        {end}
    }}"""
    return model_of(text, {"w": floats(16, 16), "bias": floats(16), "gamma": floats(16), "beta": floats(16)})


class NhwcConv(OpRun):
    """Convolution of (b, h, w, c) by (out, height, width, in)."""

    op_domain = MICROSOFT

    def _run(self, x, w, bias=None, **attributes):  # type: ignore[no-untyped-def]
        top, left, bottom, right = attributes.get("pads") or (0, 0, 0, 0)
        down, across = attributes.get("strides") or (1, 1)
        padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[1:3], axis=(1, 2))[:, ::down, ::across]
        result = np.einsum("bhwcij,oijc->bhwo", windows.astype(np.float64), w.astype(np.float64))
        return ((result + (0 if bias is None else bias)).astype(x.dtype),)


def _group_norm(x: Any, gamma: Any, beta: Any, attributes: Any) -> Any:
    assert attributes["channels_last"] == 1
    rows, height, width, _ = x.shape
    grouped = x.astype(np.float64).reshape(rows, height * width, attributes["groups"], -1)
    mean, var = grouped.mean(axis=(1, 3), keepdims=True), grouped.var(axis=(1, 3), keepdims=True)
    y = ((grouped - mean) / np.sqrt(var + attributes["epsilon"])).reshape(x.shape) * gamma + beta
    return (y / (1 + np.exp(-y)) if attributes["activation"] else y).astype(x.dtype)


class GroupNorm(OpRun):
    op_domain = MICROSOFT

    def _run(self, x, gamma, beta, **attributes):  # type: ignore[no-untyped-def]
        return (_group_norm(x, gamma, beta, attributes),)


class SkipGroupNorm(OpRun):
    op_domain = MICROSOFT

    def _run(self, x, gamma, beta, skip, **attributes):  # type: ignore[no-untyped-def]
        total = x + skip
        return _group_norm(total, gamma, beta, attributes), total


class BiasSplitGelu(OpRun):
    op_domain = MICROSOFT

    def _run(self, x, bias):  # type: ignore[no-untyped-def]
        from scipy.special import erf

        left, right = np.split((x + bias).astype(np.float64), 2, axis=-1)
        return ((left * right * 0.5 * (1 + erf(right / np.sqrt(2)))).astype(x.dtype),)


class QuickGelu(OpRun):
    op_domain = MICROSOFT

    def _run(self, x, alpha=None):  # type: ignore[no-untyped-def]
        return ((x / (1 + np.exp(-alpha * x))).astype(x.dtype),)


def run_in_numpy(model: ir.Model, feeds: dict[str, Any]) -> dict[str, Any]:
    """The outputs of a graph of CUDA operators, by onnx's reference evaluator and the classes above."""
    operators = [NhwcConv, GroupNorm, SkipGroupNorm, BiasSplitGelu, QuickGelu]
    names = [str(value.name) for value in model.graph.outputs]
    evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=operators)
    return dict(zip(names, evaluator.run(names, feeds), strict=True))
