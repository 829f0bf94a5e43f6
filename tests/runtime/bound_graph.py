"""A U-Net of a few operators for tests of bindings: dtypes that need a cast, several outputs, every axis dynamic."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from latentrt.runtime.specs import Array, ModelSpec, TensorSpec

_GRAPH = """<ir_version: 10, opset_import: ["" : 20]>
unet (float[b, c, h, w] sample, float[b] timestep, float16[b, t, d] text, float scale)
  => (float[b, c, h, w] out_sample, uint8[b] rounded)
<int64[4] ahead = {-1, 1, 1, 1}, int64[2] axes = {1, 2}>
{
    mean = ReduceMean <keepdims = 0> (text, axes)
    whole = Cast <to = 1> (mean)
    told = Mul (whole, timestep)
    scaled = Mul (told, scale)
    rounded = Cast <to = 2> (scaled)
    rows = Reshape (scaled, ahead)
    out_sample = Mul (sample, rows)
}"""

SPEC = ModelSpec(
    "unet",
    (
        TensorSpec("sample", "float32", ("b", "c", "h", "w")),
        TensorSpec("timestep", "float32", ("b",)),
        TensorSpec("text", "float16", ("b", "t", "d")),
        TensorSpec("scale", "float32", ()),
    ),
    (TensorSpec("out_sample", "float32", ("b", "c", "h", "w")), TensorSpec("rounded", "uint8", ("b",))),
)


def graph_bytes() -> bytes:
    """The model."""
    return bytes(onnx.parser.parse_model(_GRAPH).SerializeToString())


def plain_session() -> Any:
    """ONNX Runtime's own session for it, on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(graph_bytes(), providers=["CPUExecutionProvider"])


def feeds_of(seed: int, *, rows: int = 2, side: int = 4) -> dict[str, Array]:
    """Inputs, all writeable; the text is float32, as the runtime has it."""
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((rows, 4, side, side)).astype(np.float32),
        "timestep": np.full(rows, float(seed % 7 + 1), np.float32),
        "text": rng.uniform(1, 9, (rows, 6, 3)).astype(np.float32),
        "scale": np.array(1.5, np.float32),
    }


def expected(session: Any, feeds: dict[str, Array]) -> dict[str, Array]:
    """What ONNX Runtime gives without any binding."""
    names = [tensor.name for tensor in SPEC.outputs]
    values = session.run(names, {**feeds, "text": feeds["text"].astype(np.float16)})
    return {name: np.array(value) for name, value in zip(names, values, strict=True)}
