"""A bundle of graphs small enough that a real engine of one builds in a fraction of a second.

The graphs have the names, types and dynamic sizes of the component contracts: half inside, float32 outside.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from latentrt.export import engine_making
from latentrt.export.engine_builder import BuiltEngine, build_engine
from latentrt.export.engine_config import EngineConfig
from latentrt.runtime.manifest import Artifact, Manifest, key_of, record_of, save_manifest

_BUILT: dict[str, BuiltEngine] = {}
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def _weights(name: str, *shape: int, dtype: Any = np.float16, seed: int = 0) -> Any:
    values = np.random.default_rng([seed, len(name), *shape]).standard_normal(shape) * 0.1
    return numpy_helper.from_array(values.astype(dtype), name)


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any]) -> Any:
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def unet_graph(*, inner: int = HALF, mixed: bool = False, seed: int = 0) -> Any:
    """Two convolutions and a matrix product of the text; `mixed` leaves one Add with a half and a float input."""
    dtype = np.float16 if inner == HALF else np.float32
    node = helper.make_node
    nodes = [
        node("Cast", ["sample"], ["x"], to=inner),
        node("Cast", ["encoder_hidden_states"], ["text"], to=FLOAT if mixed else inner),
        node("Conv", ["x", "conv_in.weight"], ["h"], name="conv_in", pads=[1] * 4),
        node("MatMul", ["text", "to_k.weight"], ["k"], name="to_k"),
        node("ReduceMean", ["k", "text_axis"], ["k_mean"], keepdims=0),
        node("Unsqueeze", ["k_mean", "image_axes"], ["k_map"]),
        node("Add", ["h", "k_map"], ["h_k"], name="add_text"),
        node("Sigmoid", ["h_k"], ["gate"]),
        node("Conv", ["gate", "conv_out.weight"], ["out"], name="conv_out", pads=[1] * 4),
        node("Cast", ["timestep"], ["t"], to=inner),
        node("Unsqueeze", ["t", "row_axes"], ["t_map"]),
        node("Mul", ["out", "t_map"], ["out_t"], name="scale_by_time"),
        node("Cast", ["out_t"], ["out_sample"], to=FLOAT),
    ]
    info = helper.make_tensor_value_info
    inputs = [
        info("sample", FLOAT, ["b", 4, "h", "w"]),
        info("timestep", FLOAT, ["b"]),
        info("encoder_hidden_states", FLOAT, ["b", "n", 64]),
    ]
    weights = [
        _weights("conv_in.weight", 8, 4, 3, 3, dtype=dtype, seed=seed),
        _weights("conv_out.weight", 4, 8, 3, 3, dtype=dtype, seed=seed),
        _weights("to_k.weight", 64, 8, dtype=np.float32 if mixed else dtype, seed=seed),
        numpy_helper.from_array(np.array([1]), "text_axis"),
        numpy_helper.from_array(np.array([2, 3]), "image_axes"),
        numpy_helper.from_array(np.array([1, 2, 3]), "row_axes"),
    ]
    return _model(nodes, inputs, [info("out_sample", FLOAT, ["b", 4, "h", "w"])], weights)


def decoder_graph() -> Any:
    """A convolution to 3 x 64 channels that are then laid out as 8 x 8 pixels each."""
    nodes = [
        helper.make_node("Cast", ["latent_sample"], ["z"], to=HALF),
        helper.make_node("Conv", ["z", "weight"], ["blocks"], name="conv", pads=[1] * 4),
        helper.make_node("DepthToSpace", ["blocks"], ["pixels"], blocksize=8),
        helper.make_node("Cast", ["pixels"], ["sample"], to=FLOAT),
    ]
    inputs = [helper.make_tensor_value_info("latent_sample", FLOAT, ["b", 4, "h", "w"])]
    outputs = [helper.make_tensor_value_info("sample", FLOAT, ["b", 3, "8*h", "8*w"])]
    return _model(nodes, inputs, outputs, [_weights("weight", 192, 4, 3, 3)])


def text_graph() -> Any:
    """An embedding and a matrix product."""
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "projection"], ["y"], name="projection"),
        helper.make_node("Cast", ["y"], ["last_hidden_state"], to=FLOAT),
    ]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "n"])]
    outputs = [helper.make_tensor_value_info("last_hidden_state", FLOAT, ["b", "n", 64])]
    return _model(nodes, inputs, outputs, [_weights("embedding", 100, 16), _weights("projection", 16, 64)])


def put_graph(bundle: Path, component: str, precision: str, model: Any, manifest: Manifest) -> Manifest:
    """Save a graph into a bundle and return the manifest with it."""
    path = f"{component}/model.{precision}.onnx"
    (bundle / component).mkdir(exist_ok=True)
    onnx.save(model, bundle / path)
    record = record_of(bundle / path)
    inputs = {"sha": record.sha256}
    artifact = Artifact(component, precision, path, (path,), 20, key_of(inputs), inputs, {}, 0)
    others = tuple(a for a in manifest.artifacts if (a.component, a.precision) != (component, precision))
    return dataclasses.replace(manifest, files={**manifest.files, path: record}, artifacts=(*others, artifact))


def make_bundle(folder: Path, unet: Any | None = None) -> Path:
    """A bundle with a text encoder, a U-Net and a VAE decoder in fp16; VAE factor 8, native size 64."""
    folder.mkdir(parents=True)
    manifest = Manifest(name="tiny", pipeline_class="StableDiffusionPipeline", latentrt_version="0")
    manifest = put_graph(folder, "text_encoder", "fp16", text_graph(), manifest)
    manifest = put_graph(folder, "unet", "fp16", unet_graph() if unet is None else unet, manifest)
    manifest = put_graph(folder, "vae_decoder", "fp16", decoder_graph(), manifest)
    configs = {"unet/config.json": {"sample_size": 8}, "vae_decoder/config.json": {"block_out_channels": [8, 8, 8, 8]}}
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content))
        manifest = dataclasses.replace(manifest, files={**manifest.files, name: record_of(folder / name)})
    save_manifest(folder, manifest)
    return folder


def build_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine of a component that was built first be the result of every later build, whatever the config.

    For tests of where engines go, not of what is in them.
    """

    def build(trt: Any, graph: Path, config: EngineConfig, **kwargs: Any) -> BuiltEngine:
        if config.component not in _BUILT:
            _BUILT[config.component] = build_engine(trt, graph, config, **kwargs)
        return dataclasses.replace(_BUILT[config.component], config=config)

    monkeypatch.setattr(engine_making, "build_engine", build)
