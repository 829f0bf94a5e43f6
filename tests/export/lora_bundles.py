"""A bundle of hand-made graphs whose weights have the names that exports give them: a U-Net and a text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from engine_bundle import put_graph
from onnx import TensorProto, helper, numpy_helper

from latentrt.runtime.manifest import Manifest, save_manifest

WIDTH, TEXT = 8, 12
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
QUERY, KEY = f"{BLOCK}.attn1.to_q.weight", f"{BLOCK}.attn2.to_k.weight"
PROJECTION = "encoder.layers.0.self_attn.q_proj.weight"
# In PyTorch's layout.
UNET = {
    "conv_in.weight": (WIDTH, 4, 3, 3),
    "conv_in.bias": (WIDTH,),
    "down_blocks.0.resnets.0.conv2.weight": (WIDTH, WIDTH, 1, 1),
    "down_blocks.0.resnets.0.conv2.bias": (WIDTH,),
    QUERY: (WIDTH, WIDTH),
    KEY: (WIDTH, TEXT),
}


def network(dtype: Any = np.float32) -> dict[str, np.ndarray[Any, Any]]:
    """The U-Net's weights as PyTorch has them."""
    rng = np.random.default_rng(3)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in UNET.items()}


def unet_graph(dtype: Any = np.float32, *, without: str = "", instead: str = "folded") -> Any:
    """A few layers that read every weight.

    Args:
        without: a weight whose name the graph has lost.
        instead: the name that it has.
    """
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = helper.make_node
    nodes = [
        node("Cast", ["sample"], ["x"], to=kind),
        node("Cast", ["encoder_hidden_states"], ["text"], to=kind),
        node("Conv", ["x", "unet.conv_in.weight", "unet.conv_in.bias"], ["h"], pads=[1] * 4),
        node(
            "Conv",
            ["h", "unet.down_blocks.0.resnets.0.conv2.weight", "unet.down_blocks.0.resnets.0.conv2.bias"],
            ["h2"],
        ),
        node("MatMul", ["text", f"unet.{KEY}"], ["k"]),
        node("MatMul", ["k", f"unet.{QUERY}"], ["q"]),
        node("ReduceMean", ["q", "tokens"], ["mean"], keepdims=0),
        node("Unsqueeze", ["mean", "pixels"], ["map"]),
        node("Add", ["h2", "map"], ["y"]),
        node("Cast", ["y"], ["out_sample"], to=TensorProto.FLOAT),
    ]
    weights = [
        numpy_helper.from_array(np.ascontiguousarray(values.T if values.ndim == 2 else values), f"unet.{name}")
        for name, values in network(dtype).items()
    ]
    for weight in weights:
        weight.name = weight.name.replace(f"unet.{without}", instead) if without else weight.name
    for item in nodes if without else ():
        names = [instead if name == f"unet.{without}" else name for name in item.input]
        del item.input[:]
        item.input.extend(names)
    constants = [
        numpy_helper.from_array(np.array([1]), "tokens"),
        numpy_helper.from_array(np.array([2, 3]), "pixels"),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "unet",
        [
            info("sample", TensorProto.FLOAT, ["b", 4, "h", "w"]),
            info("encoder_hidden_states", TensorProto.FLOAT, ["b", "n", TEXT]),
        ],
        [info("out_sample", TensorProto.FLOAT, ["b", WIDTH, "h", "w"])],
        [*weights, *constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def text_graph(dtype: Any = np.float32) -> Any:
    """An embedding and a projection."""
    rng = np.random.default_rng(4)
    nodes = [
        helper.make_node("Gather", ["text_encoder.embeddings.token_embedding.weight", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", f"text_encoder.{PROJECTION}"], ["y"]),
        helper.make_node("Cast", ["y"], ["last_hidden_state"], to=TensorProto.FLOAT),
    ]
    weights = [
        numpy_helper.from_array(rng.standard_normal((40, WIDTH)).astype(dtype), nodes[0].input[0]),
        numpy_helper.from_array(rng.standard_normal((WIDTH, TEXT)).astype(dtype), nodes[1].input[1]),
    ]
    graph = helper.make_graph(
        nodes,
        "text_encoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "n"])],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["b", "n", TEXT])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def make_bundle(folder: Path, *, precisions: tuple[str, ...] = ("fp32", "fp16")) -> Path:
    """A bundle of both graphs in some precisions."""
    folder.mkdir(parents=True)
    manifest = Manifest(name="tiny", pipeline_class="StableDiffusionPipeline", latentrt_version="0")
    for precision in precisions:
        dtype = np.float16 if precision == "fp16" else np.float32
        manifest = put_graph(folder, "text_encoder", precision, text_graph(dtype), manifest)
        manifest = put_graph(folder, "unet", precision, unet_graph(dtype), manifest)
    save_manifest(folder, manifest)
    return folder
