"""What is calibrated: one network of a bundle, its fp32 graph with LoRAs in its weights, and the same in PyTorch.

The graph of `latentrt export` in fp32 holds every parameter under its name, so the PyTorch network is made from the
graph's own weights and its config. No checkpoint is needed, and the two cannot be of different models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import nn

from latentrt.export.checkpoint_parts import Part
from latentrt.export.lazy_weight import lazy_tensor
from latentrt.export.lora import fused_weight
from latentrt.export.networks import Network, fitted_network, unfilled_module
from latentrt.export.static_shapes import input_dimensions
from latentrt.export.unet import UNet
from latentrt.export.vae import VaeDecoder
from latentrt.export.weights import Weight, changed
from latentrt.runtime.bundle import Bundle, open_bundle, pipeline_files
from latentrt.runtime.errors import ArtifactError, CalibrationError, UsageError
from latentrt.runtime.graph_weights import GraphWeight, GraphWeights
from latentrt.runtime.lora_delta import fits
from latentrt.runtime.lora_store import ActiveLora, Wanted, open_loras
from latentrt.runtime.lora_weights import lora_notes
from latentrt.runtime.model_facts import read_facts

from .layers import Layer, graph_layers

PRECISION = "fp32"
# Tokens of a chunk of text.
TEXT_LENGTH = 77


@dataclass(frozen=True)
class _Kind:
    """How a component's network is made: its class in diffusers, what a run calls, and what the graph was traced from.

    Attributes:
        part: of a checkpoint, as `Part.name`.
        model_class: if the config names none.
        taken: the module whose weights the graph holds, from the whole network.
        wrapper: from that module to one that takes the graph's inputs by name.
    """

    part: str
    model_class: str
    taken: Callable[[nn.Module], nn.Module]
    wrapper: Callable[[nn.Module], nn.Module]


_KINDS = {
    "unet": _Kind("unet", "UNet2DConditionModel", lambda unet: unet, UNet),
    "vae_decoder": _Kind("vae", "AutoencoderKL", VaeDecoder, lambda decoder: decoder),
}


@dataclass(frozen=True, eq=False)
class Source:
    """A network to calibrate. Make one with `open_source`.

    Attributes:
        bundle: that holds it.
        component: unet or vae_decoder.
        graph: the .onnx file in fp32.
        config: of the network.
        network: in PyTorch, weights by the module's names, LoRAs folded in; diffusers' U-Net, or the exporter's
            `VaeDecoder`. Weights are read from the graph when they are wanted.
        files: SHA-256 of what the graph consists of, by path in the bundle, the graph first.
        loras: in its weights, in the order in which they are folded in.
    """

    bundle: Bundle
    component: str
    graph: Path
    config: Mapping[str, Any]
    network: Network
    files: Mapping[str, str]
    loras: tuple[ActiveLora, ...]

    @property
    def wrapper(self) -> nn.Module:
        """The network's module as a function of the graph's inputs by name; it shares the network's parameters."""
        return _KINDS[self.component].wrapper(self.network.module).eval()

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Of the graph, their costs for the picture that the checkpoint was trained at."""
        return self.layers_at()

    def layers_at(self, *, width: int | None = None, height: int | None = None) -> tuple[Layer, ...]:
        """The layers of the graph, with their costs for a picture.

        Args:
            width: in pixels; default what the checkpoint was trained at.
            height: likewise.

        Raises:
            CalibrationError: the graph has none.
        """
        model, facts = ir.load(self.graph), read_facts(self.bundle)
        sizes = {
            "batch": 1,
            "latent_height": (height or facts.default_size) // facts.vae_factor,
            "latent_width": (width or facts.default_size) // facts.vae_factor,
            "sequence_length": TEXT_LENGTH,
        }
        return graph_layers(model, {name: sizes[name] for name in input_dimensions(model)})

    def key(self) -> dict[str, Any]:
        """What a stage's key has to hold of the network, for `manifest.key_of`."""
        return {"component": self.component, "graph": dict(self.files), "loras": lora_notes(self.loras)}


def open_source(bundle_path: str | Path, *, component: str = "unet", loras: Wanted = (), verify: bool = True) -> Source:
    """Open a network of a bundle for calibration. Its weights are not read.

    Args:
        bundle_path: of a bundle that `latentrt export` wrote, with the graph in fp32.
        component: unet or vae_decoder.
        loras: of the bundle, by name, with scales or each with its own.
        verify: compare the graph's and the LoRAs' SHA-256 with the manifest; sizes are always compared.

    Raises:
        UsageError: no such component or LoRA, or the bundle lacks the graph in fp32.
        ArtifactError: a file is missing, damaged or changed, or a LoRA was added for another model.
        ConfigError: the config is not supported.
        CalibrationError: the bundle has no manifest, or the graph does not hold the weights of its network.
    """
    if component not in _KINDS:
        raise UsageError(f"component: expected {' or '.join(_KINDS)}, got {component!r}.")
    bundle = open_bundle(Path(bundle_path))
    if bundle.manifest is None:
        raise CalibrationError(
            f"{bundle.path}: expected a bundle with a manifest, got a folder of optimum's, whose graphs have other "
            "names for their weights. Make one with: latentrt export CHECKPOINT -o BUNDLE"
        )
    graph = bundle.graph(component, PRECISION)
    artifact = bundle.manifest.artifact(component, PRECISION)
    assert artifact is not None
    if verify:
        bundle.check(pipeline_files(bundle, PRECISION, [component]))
    active = open_loras(bundle, loras, verify=verify)
    config = bundle.config(f"{component}/config.json")
    kind = _KINDS[component]
    part = Part(
        name=kind.part,
        origin=graph,
        config=config,
        model_class=str(config.get("_class_name", kind.model_class)),
        weights=_weights(graph, component, active),
        files={},
    )
    module = kind.taken(unfilled_module(part))
    names = sorted(artifact.files, key=lambda name: name != artifact.path)
    return Source(
        bundle=bundle,
        component=component,
        graph=graph,
        config=config,
        network=_network(module, part),
        files={name: bundle.manifest.files[name].sha256 for name in names},
        loras=active,
    )


def load_model(source: Source) -> ir.Model:
    """The graph of a source, for passes; LoRAs are in its weights. Weights are read when they are wanted.

    Raises:
        ArtifactError: the graph is damaged.
    """
    model = ir.load(source.graph)
    held = GraphWeights.open(source.graph)
    touched = {name for active in source.loras for name in active.lora.deltas.get(source.component, {})}
    for parameter in sorted(touched):
        weight = held.by_parameter[parameter]
        initializer = model.graph.initializers[weight.name]
        initializer.const_value = lazy_tensor(_laid(held, weight, source.network.weights[parameter]), weight.name)
    return model


def _laid(held: GraphWeights, weight: GraphWeight, values: Weight) -> Weight:
    """A network's weight as the graph has it."""
    dims = held.graph.tensors[weight.name].dims
    return Weight(dims, values.dtype, lambda: held.laid(weight, values.read()))


def _weights(graph: Path, component: str, loras: Sequence[ActiveLora]) -> dict[str, Weight]:
    """A graph's weights by the names and in the layout of its network, LoRAs folded in."""
    held = GraphWeights.open(graph)

    def reader(weight: GraphWeight) -> Weight:
        return Weight(weight.shape, np.dtype(np.float32), lambda: held.read(weight))

    found = {parameter: reader(weight) for parameter, weight in held.by_parameter.items()}
    for active in loras:
        for parameter, delta in active.lora.deltas.get(component, {}).items():
            if parameter not in found or not fits(delta, found[parameter].shape):
                raise ArtifactError(
                    f"{graph}: expected the weight {parameter} {delta.shape} that LoRA {active.lora.name} was added "
                    "for, found none. The graph was exported from another model since: remove the LoRA from the "
                    "bundle and add it again."
                )
            found[parameter] = fused_weight(found[parameter], delta, active.scale)
    return found


def _network(module: nn.Module, part: Part) -> Network:
    """The module with the graph's weights; those that the graph lays out for its operators have the module's shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    weights = {name: _unpadded(weight, shapes.get(name, weight.shape)) for name, weight in part.weights.items()}
    try:
        return fitted_network(module, replace(part, weights=weights))
    except ArtifactError as err:
        raise CalibrationError(
            f"{err} A graph that joins or splits weights cannot be calibrated: export the checkpoint again in fp32, "
            "as `latentrt export` does by default."
        ) from err


def _unpadded(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """A norm's weight (c, 1), as the graph has it, in its own shape (c,)."""
    if weight.shape != shape and [size for size in weight.shape if size != 1] == [size for size in shape if size != 1]:
        return changed(weight, lambda values: values.reshape(shape), shape)
    return weight
