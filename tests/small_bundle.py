"""A bundle of one small network, written without an export, as calibration reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from small_graphs import model_of

from latentrt.calibrate.layers import Layer, graph_layers
from latentrt.calibrate.plan import LayerPlan, Plan
from latentrt.calibrate.source import Source
from latentrt.export.graph_files import save_onnx
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.manifest import Artifact, FileRecord, Manifest, key_of, record_of, save_manifest

NETWORK = """
    unet (float[batch,16,latent_height,latent_width] sample, float[batch] timestep,
          float[batch,sequence_length,32] encoder_hidden_states)
        => (float[batch,16,latent_height,latent_width] out_sample) {
        hidden = Conv<pads=[1,1,1,1]>(sample, conv1.weight, conv1.bias)
        gate = Sigmoid(hidden)
        active = Mul(hidden, gate)
        joined = Concat<axis=1>(active, sample)
        shortcut = Conv(joined, conv_shortcut.weight)
        third = Conv<pads=[1,1,1,1]>(active, conv2.weight, conv2.bias)
        picture = Add(shortcut, third)
        k = MatMul(encoder_hidden_states, to_k.weight)
        v = MatMul(encoder_hidden_states, to_v.weight)
        kv = Mul(k, v)
        text = ReduceMean<keepdims=0>(kv, tokens)
        rows = Reshape(text, square)
        when = Reshape(timestep, column)
        late = Mul(when, slow)
        both = Add(rows, late)
        out_sample = Add(picture, both)
    }
"""
SIZES = {"batch": 1, "latent_height": 16, "latent_width": 16, "sequence_length": 77}
# What a convolution and a matrix product read, and their largest values on noise, roughly.
_LARGEST = {
    "conv1.weight": 4.5,
    "conv_shortcut.weight": 6.0,
    "conv2.weight": 5.0,
    "to_k.weight": 4.5,
    "to_v.weight": 4.5,
}


def weights(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    return {
        "conv1.weight": normal(24, 16, 3, 3),
        "conv1.bias": normal(24),
        "conv2.weight": normal(16, 24, 3, 3),
        "conv2.bias": normal(16),
        "conv_shortcut.weight": normal(16, 40, 1, 1),
        "to_k.weight": normal(32, 16) / 2,
        "to_v.weight": normal(32, 16) / 2,
        "tokens": np.array([1], np.int64),
        "square": np.array([-1, 16, 1, 1], np.int64),
        "column": np.array([-1, 1, 1, 1], np.int64),
        "slow": np.array(1e-3, np.float32),
    }


def network(values: Mapping[str, Any] | None = None) -> ir.Model:
    """The fp32 graph; names of weights have dots, which the text form does not take."""
    held = dict(weights() if values is None else values)
    model = model_of(
        NETWORK.replace(".weight", "_weight").replace(".bias", "_bias"), {_flat(n): w for n, w in held.items()}
    )
    for name in held:
        value = model.graph.initializers.pop(_flat(name))
        value.name = name
        value.const_value = ir.tensor(held[name], name=name)
        model.graph.register_initializer(value)
    return model


def _flat(name: str) -> str:
    return name.replace(".", "_")


def write_bundle(folder: Path, values: Mapping[str, Any] | None = None) -> Path:
    """The network in fp32, with an engine's record and a graph of another component beside it."""
    save_onnx(network(values), folder / "unet/model.onnx")
    (folder / "unet/config.json").write_text("{}")
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder/model.onnx").write_bytes(b"another graph")
    artifacts = tuple(artifact(component) for component in ("text_encoder", "unet"))
    names = ("unet/config.json", "unet/model.onnx", "text_encoder/model.onnx")
    save_manifest(
        folder,
        Manifest(
            name="small",
            pipeline_class="StableDiffusionPipeline",
            latentrt_version="0",
            files={name: record_of(folder / name) for name in names},
            artifacts=artifacts,
        ),
    )
    return folder


def artifact(component: str, precision: str = "fp32", **changes: Any) -> Artifact:
    path = f"{component}/model.onnx" if precision == "fp32" else f"{component}/model.{precision}.onnx"
    made = Artifact(component, precision, path, (path,), 20, key_of({}), {}, {}, 100)
    return replace(made, **changes)


def with_file(manifest: Manifest, folder: Path, name: str, content: bytes) -> Manifest:
    """The manifest with one more file, which is written too."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    records: dict[str, FileRecord] = {**manifest.files, name: record_of(folder / name)}
    return replace(manifest, files=records)


@dataclass(frozen=True, eq=False)
class SmallSource(Source):
    """The network of such a bundle. It is no diffusers U-Net, so there is none in PyTorch."""

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        return graph_layers(ir.load(self.graph), SIZES)


def small_source(folder: Path) -> SmallSource:
    bundle = open_bundle(folder)
    assert bundle.manifest is not None
    name = "unet/model.onnx"
    network: Any = None
    return SmallSource(bundle, "unet", folder / name, {}, network, {name: bundle.manifest.files[name].sha256}, ())


def small_plan(source: Source, kind: Any = "int8", **changes: Any) -> Plan:
    """All layers quantized, the branches of the shortcut each with a number."""
    largest = {"int8": 127, "fp8": 448}[kind]
    vector = np.repeat([0.9, 1.2], [24, 16]).astype(np.float32)
    plan = Plan(
        component="unet",
        kind=kind,
        graph=dict(source.files),
        loras=(),
        layers=tuple(
            LayerPlan(
                layer.name, layer.group, layer.kind, True, "cheap", _LARGEST[layer.name] / largest, 1e-5, 0.2, 0.2
            )
            for layer in source.layers
        ),
        vectors={"conv_shortcut.weight": vector},
        corrections={"conv2.weight": np.linspace(-0.01, 0.01, 16, dtype=np.float32)},
        made={"by": "hand"},
    )
    return replace(plan, **changes)
