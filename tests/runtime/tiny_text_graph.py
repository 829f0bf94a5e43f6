"""A text encoder of one addition, as an ONNX file: enough of CLIP's to see which rows of its table were read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH, TOKENS, LENGTH = 6, 50, 8


def write_encoder(
    path: Path,
    *,
    dtype: Any = np.float32,
    tokens: int = TOKENS,
    name: str = "text_model.embeddings.token_embedding.weight",
    argmax: bool = True,
    external: bool = False,
    length: int = LENGTH,
    width: int = WIDTH,
) -> np.ndarray[Any, Any]:
    """A text encoder of one addition, which pools like CLIP; returns its table."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((tokens, width)).astype(dtype)
    positions = rng.standard_normal((200, width)).astype(dtype)  # more rows than the table
    at = numpy_helper.from_array(np.arange(length, dtype=np.int64), "at")
    eos = numpy_helper.from_array(np.array(tokens - 1), "eos")
    nodes = [
        helper.make_node("Gather", [name, "input_ids"], ["embedded"]),
        helper.make_node("Gather", ["positions", "at"], ["placed"]),
        helper.make_node("Add", ["embedded", "placed"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["last_hidden_state"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["input_ids"], ["ids32"], to=TensorProto.INT32),
        helper.make_node("Equal", ["input_ids", "eos"], ["is_eos"]),
        helper.make_node("Cast", ["is_eos"], ["eos32"], to=TensorProto.INT32),
        helper.make_node("ArgMax", ["ids32" if argmax else "eos32"], ["where"], axis=-1, keepdims=1),
        helper.make_node("GatherND", ["last_hidden_state", "where"], ["text_embeds"], batch_dims=1),
        *(helper.make_node("Identity", ["last_hidden_state"], [f"hidden_states.{n}"]) for n in range(2)),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", length])],
        [
            helper.make_tensor_value_info("text_embeds", TensorProto.FLOAT, ["b", width]),
            *(
                helper.make_tensor_value_info(output, TensorProto.FLOAT, ["b", length, width])
                for output in ("last_hidden_state", "hidden_states.0", "hidden_states.1")
            ),
        ],
        [numpy_helper.from_array(positions, "positions"), numpy_helper.from_array(table, name), at, eos],
        value_info=[
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(table.dtype), list(table.shape)),
            helper.make_tensor_value_info("embedded", helper.np_dtype_to_tensor_dtype(table.dtype), None),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    if external:
        onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    else:
        onnx.save(model, path)
    return table
