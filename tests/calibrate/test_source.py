from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from linked_bundles import edit_graph, linked
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from latentrt.calibrate.layers import layer_modules, layer_weights
from latentrt.calibrate.source import Source, load_model, open_source
from latentrt.export.lora_bundle import add_lora
from latentrt.export.networks import weights_at_hand
from latentrt.runtime.errors import ArtifactError, CalibrationError, UsageError
from latentrt.runtime.lora_weights import lora_weights
from latentrt.runtime.manifest import FileRecord, key_of, load_manifest, save_manifest

Floats = NDArray[np.float32]
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
QUERY, CONVOLUTION = f"{ATTENTION}.to_q", "down_blocks.1.resnets.0.conv1"


@pytest.fixture(scope="module")
def factors() -> dict[str, Floats]:
    """A LoRA of a linear layer and of a convolution, by peft's names."""
    rng = np.random.default_rng(5)
    shapes = {QUERY: ((3, 64), (64, 3)), CONVOLUTION: ((3, 64, 3, 3), (128, 3, 1, 1))}
    found = {}
    for module, (down, up) in shapes.items():
        found[f"unet.{module}.lora_A.weight"] = rng.standard_normal(down).astype(np.float32)
        found[f"unet.{module}.lora_B.weight"] = 0.05 * rng.standard_normal(up).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def bundle(shapes_bundle: Path, factors: Mapping[str, Floats], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes bundle with that LoRA."""
    folder = tmp_path_factory.mktemp("source")
    copy = linked(shapes_bundle, folder / "shapes.bundle")
    save_file(dict(factors), folder / "style.safetensors")
    add_lora(copy, folder / "style.safetensors", scale=0.5)
    return copy


def answers(source: Source, model: bytes) -> tuple[Floats, Floats]:
    """What the PyTorch network and a graph make of the same random inputs."""
    session = ort.InferenceSession(model)
    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "latent_height": 10, "latent_width": 12, "sequence_length": 77}
    feeds = {
        tensor.name: rng.standard_normal([sizes.get(size, size) for size in tensor.shape]).astype(np.float32)
        for tensor in session.get_inputs()
    }
    if "timestep" in feeds:
        feeds["timestep"] = np.array([3, 951], np.float32)
    with weights_at_hand(source.network), torch.inference_mode():
        ours = source.wrapper(**{name: torch.from_numpy(values) for name, values in feeds.items()}).numpy()
    return ours, session.run(None, feeds)[0]


@pytest.mark.parametrize("component", ["unet", "vae_decoder"])
def test_the_network_is_the_graph(bundle: Path, component: str) -> None:
    source = open_source(bundle, component=component)
    ours, graph = answers(source, (bundle / component / "model.onnx").read_bytes())
    assert np.linalg.norm(ours - graph) <= 1e-5 * np.linalg.norm(graph)


def test_its_weights_are_the_checkpoint_s(bundle: Path, shapes_checkpoint: Path) -> None:
    held = load_file(shapes_checkpoint / "unet" / "diffusion_pytorch_model.safetensors")
    weights = open_source(bundle).network.weights
    assert weights.keys() == held.keys()
    for name, values in held.items():
        np.testing.assert_array_equal(weights[name].read(), values.astype(np.float32), err_msg=name)


@pytest.mark.parametrize(("scale", "used"), [(None, 0.5), (-2.0, -2.0)])
def test_loras_are_in_the_network_and_in_the_graph(
    bundle: Path, factors: Mapping[str, Floats], scale: float | None, used: float
) -> None:
    plain, source = open_source(bundle), open_source(bundle, loras={"style": scale})
    weights = source.network.weights
    for module in (QUERY, CONVOLUTION):
        down, up = (factors[f"unet.{module}.lora_{role}.weight"].astype(np.float64) for role in "AB")
        change = (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(weights[f"{module}.weight"].shape)
        expected = plain.network.weights[f"{module}.weight"].read() + used * change
        np.testing.assert_allclose(weights[f"{module}.weight"].read(), expected, rtol=1e-5, atol=1e-6)
    model, before = load_model(source), load_model(plain)
    ours, graph = answers(source, ir.to_proto(model).SerializeToString())
    assert np.linalg.norm(ours - graph) <= 1e-5 * np.linalg.norm(graph)
    # As the runtime folds them in, bit for bit; and nothing else is changed.
    runtime = lora_weights(source.loras, source.graph, "unet")
    assert len(runtime) == 2
    for name, initializer in before.graph.initializers.items():
        own, changed = initializer.const_value, model.graph.initializers[name].const_value
        assert own is not None
        assert changed is not None
        np.testing.assert_array_equal(changed.numpy(), runtime.get(name, own.numpy()), err_msg=name)


def test_layers_have_modules_weights_and_costs(bundle: Path) -> None:
    source = open_source(bundle)
    assert {*layer_modules(source.layers, source.wrapper)} == {layer.name for layer in source.layers}
    weights = layer_weights(source.layers, source.wrapper, source.network)
    for layer in source.layers:
        assert weights[layer.name].shape[:2] == (layer.outputs, layer.inputs)
    # A convolution costs as many times more as there are more pixels; a vector's layer as much as before.
    larger = {layer.name: layer.macs for layer in source.layers_at(width=256, height=384)}
    costs = {layer.name: layer.macs for layer in source.layers}
    assert larger[f"unet.{CONVOLUTION}.weight"] == 6 * costs[f"unet.{CONVOLUTION}.weight"]
    assert larger["unet.time_embedding.linear_1.weight"] == costs["unet.time_embedding.linear_1.weight"]


def test_the_key_tells_sources_apart(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    assert open_source(bundle).key()["graph"] == {"unet/model.onnx": manifest.files["unet/model.onnx"].sha256}
    choices: list[dict[str, Any]] = [
        {},
        {"component": "vae_decoder"},
        {"loras": ["style"]},
        {"loras": {"style": 0.7}},
    ]
    assert len({key_of(open_source(bundle, **choice).key()) for choice in choices}) == len(choices)
    assert open_source(bundle, loras=["style"]).key() == open_source(bundle, loras={"style": 0.5}).key()


def test_a_weight_that_the_graph_lacks(bundle: Path, tmp_path: Path) -> None:
    copy = linked(bundle, tmp_path / "joined.bundle")

    def join(model: onnx.ModelProto) -> None:
        for item in model.graph.initializer:
            item.name = item.name.replace(f"unet.{QUERY}.weight", "qkv")
        for node in model.graph.node:
            node.input[:] = [name.replace(f"unet.{QUERY}.weight", "qkv") for name in node.input]

    edit_graph(copy, join)
    with pytest.raises(CalibrationError, match=rf"1 missing: {QUERY}\.weight .*export the checkpoint again in fp32"):
        open_source(copy)
    with pytest.raises(ArtifactError, match=rf"expected the weight {QUERY}\.weight .* LoRA style was added"):
        open_source(copy, loras=["style"])


def test_a_bundle_without_the_graph_in_fp32(bundle: Path, tmp_path: Path) -> None:
    copy = linked(bundle, tmp_path / "half.bundle")
    manifest = load_manifest(copy)
    (copy / "manifest.json").unlink()
    artifacts = tuple(artifact for artifact in manifest.artifacts if artifact.precision != "fp32")
    save_manifest(copy, dataclasses.replace(manifest, artifacts=artifacts))
    with pytest.raises(
        UsageError, match=r"expected unet in fp32, found \['fp16'\].*latentrt export .* --precision fp32"
    ):
        open_source(copy)


def test_a_folder_of_optimum(bundle: Path, tmp_path: Path) -> None:
    copy = linked(bundle, tmp_path / "optimum")
    (copy / "manifest.json").unlink()
    with pytest.raises(CalibrationError, match="expected a bundle with a manifest"):
        open_source(copy)


def test_a_graph_that_is_not_the_manifest_s(bundle: Path, tmp_path: Path) -> None:
    copy = linked(bundle, tmp_path / "changed.bundle")
    manifest = load_manifest(copy)
    record = manifest.files["unet/model.onnx"]
    (copy / "manifest.json").unlink()
    other = FileRecord(sha256="0" * 64, size=record.size)
    save_manifest(copy, dataclasses.replace(manifest, files={**manifest.files, "unet/model.onnx": other}))
    with pytest.raises(ArtifactError, match="expected SHA-256 0000"):
        open_source(copy)
    assert open_source(copy, verify=False).files["unet/model.onnx"] == "0" * 64


@pytest.mark.parametrize(
    ("choice", "said"),
    [({"component": "text_encoder"}, "component: expected unet or vae_decoder"), ({"loras": ["none"]}, "got 'none'")],
)
def test_what_there_is_not(bundle: Path, choice: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_source(bundle, **choice)
