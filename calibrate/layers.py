"""The weighted layers of a network: in its graph, and the modules of the same weights in PyTorch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import nn

from latentrt.export.graph_values import is_weight
from latentrt.export.networks import Network
from latentrt.export.static_shapes import static_graph
from latentrt.export.weights import Weight, as_float32
from latentrt.runtime.errors import CalibrationError

from .quantize_pass import CHANNEL_AXIS

# Fewer channels than this on either side, and TensorRT has no int8 kernel that is worth its conversions.
LEAST_CHANNELS = 16
OTHER = "other"
# What a layer is, by the end of its name; the same in all U-Nets and decoders of Stable Diffusion, pruned or not.
_KINDS = tuple(
    (kind, re.compile(rf"(^|\.){pattern}\.weight$"))
    for kind, pattern in (
        ("conv_in", r"conv_in"),
        ("conv_out", r"conv_out"),
        ("time_embedding", r"time_embedding\.(linear_1|linear_2|cond_proj)"),
        ("add_embedding", r"add_embedding\.linear_[12]"),
        ("time_emb_proj", r"time_emb_proj"),
        ("resnet.conv1", r"resnets\.\d+\.conv1"),
        ("resnet.conv2", r"resnets\.\d+\.conv2"),
        ("conv_shortcut", r"conv_shortcut"),
        ("downsampler", r"downsamplers\.\d+\.conv"),
        ("upsampler", r"upsamplers\.\d+\.conv"),
        ("proj_in", r"proj_in"),
        ("proj_out", r"proj_out"),
        *((f"{attention}.to_{x}", rf"{attention}\.to_{x}") for attention in ("attn1", "attn2") for x in "qkv"),
        ("attn1.to_out", r"attn1\.to_out\.0"),
        ("attn2.to_out", r"attn2\.to_out\.0"),
        ("ff.net.0", r"ff\.net\.0\.proj"),
        ("ff.net.2", r"ff\.net\.2"),
        *((f"attention.to_{x}", rf"attentions\.\d+\.to_{x}") for x in "qkv"),
        ("attention.to_out", r"attentions\.\d+\.to_out\.0"),
        ("post_quant_conv", r"post_quant_conv"),
    )
)
_NAMED = 10


@dataclass(frozen=True)
class Layer:
    """One weighted operator.

    Attributes:
        name: of its weight, in the graph and in the PyTorch module that the graph was traced from.
        operator: Conv, MatMul, or Gemm; the last has vectors for inputs, the time embedding's, and stays as it is.
        kind: what it is in a U-Net or a decoder, such as resnet.conv1, attn1.to_q or ff.net.2.
        input: the tensor that it reads, by its name in the graph.
        group: the first layer that reads this tensor. All that do share its scale.
        inputs: channels.
        outputs: channels.
        taps: positions of the input that an output position reads, 9 of a 3 x 3 convolution.
        macs: multiplications and additions for one row.
        share: of the macs of all layers.
    """

    name: str
    operator: str
    kind: str
    input: str
    group: str
    inputs: int
    outputs: int
    taps: int
    macs: int
    share: float

    @property
    def quantizable(self) -> bool:
        """Whether int8 kernels can compute it."""
        return self.operator in CHANNEL_AXIS and min(self.inputs, self.outputs) >= LEAST_CHANNELS


def kind_of(name: str) -> str:
    """What a layer is, by the name of its weight; OTHER for one that no family of ours has."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), OTHER)


def graph_layers(model: ir.Model, sizes: Mapping[str, int]) -> tuple[Layer, ...]:
    """The weighted layers of a graph, in its order.

    Args:
        sizes: of every dimension that the graph's inputs name, for the macs; batch is 1.

    Raises:
        CalibrationError: there is none.
        UsageError: a size is missing or is of no dimension.
    """
    nodes = _weighted(model.graph)
    if not nodes:
        raise CalibrationError(
            f"{model.graph.name}: expected Conv and MatMul nodes with weights, found none. Take the graph that "
            "`latentrt export` wrote in fp32."
        )
    sized = _weighted(static_graph(model, sizes).graph)
    macs = {
        name: math.prod(_shape(sized[name].outputs[0])) * math.prod(_torch_shape(nodes[name])[1:]) for name in nodes
    }
    total = sum(macs.values())
    first: dict[str, str] = {}
    layers = []
    for name, node in nodes.items():
        tensor = str(node.inputs[0].name) if node.inputs[0] is not None else ""
        shape = _torch_shape(node)
        layers.append(
            Layer(
                name=name,
                operator=node.op_type,
                kind=kind_of(name),
                input=tensor,
                group=first.setdefault(tensor, name),
                inputs=shape[1],
                outputs=shape[0],
                taps=math.prod(shape[2:]),
                macs=macs[name],
                share=macs[name] / total,
            )
        )
    return tuple(layers)


def layer_modules(layers: Sequence[Layer], wrapper: nn.Module) -> dict[str, nn.Module]:
    """The modules of a network by the names of the layers that they are in its graph.

    The match is one to one and exact: a graph's weights have the names of the module that it was traced from.

    Args:
        wrapper: that module, such as the exporter's `UNet` or `VaeDecoder`, its parameters on whatever device.

    Raises:
        CalibrationError: a layer has no module, a module no layer, or the two differ in shape.
    """
    modules = {
        f"{path}.weight": module
        for path, module in wrapper.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }
    known = {layer.name: layer for layer in layers}
    problems = {
        "without a module": sorted(known.keys() - modules.keys()),
        "missing in the graph": sorted(modules.keys() - known.keys()),
        "of another shape": sorted(
            name for name in known.keys() & modules.keys() if not _agree(known[name], tuple(modules[name].weight.shape))
        ),
    }
    if any(problems.values()):
        found = "; ".join(f"{len(names)} {what}: {_listed(names)}" for what, names in problems.items() if names)
        raise CalibrationError(
            f"{type(wrapper).__name__}: expected the layers of the graph to be the {len(modules)} of the PyTorch "
            f"model, got {found}. The graph and the checkpoint differ: export the checkpoint again."
        )
    return {name: modules[name] for name in known}


def layer_weights(layers: Sequence[Layer], wrapper: nn.Module, network: Network) -> dict[str, Weight]:
    """The weights of layers by their names, float32, laid out as PyTorch has them: (outputs, inputs, …).

    Args:
        wrapper: that the graph was traced from.
        network: whose module the wrapper holds, or is.

    Raises:
        CalibrationError: as `layer_modules`.
    """
    paths = {module: path for path, module in network.module.named_modules()}
    return {
        name: as_float32(network.weights[f"{paths[module]}.weight"])
        for name, module in layer_modules(layers, wrapper).items()
    }


def groups(layers: Sequence[Layer]) -> dict[str, tuple[Layer, ...]]:
    """Layers that read one tensor, such as q, k and v, by the name of the first."""
    found: dict[str, tuple[Layer, ...]] = {}
    for layer in layers:
        found[layer.group] = (*found.get(layer.group, ()), layer)
    return found


def _weighted(graph: ir.Graph) -> dict[str, ir.Node]:
    """The operators with a weight, by its name."""
    found = {}
    for node in graph:
        if node.domain == "" and node.op_type in (*CHANNEL_AXIS, "Gemm"):
            weight = node.inputs[1]
            if weight is not None and is_weight(weight):
                found[str(weight.name)] = node
    return found


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    assert value is not None
    assert value.shape is not None
    return tuple(value.shape.numpy())


def _torch_shape(node: ir.Node) -> tuple[int, ...]:
    """The shape of a weight as PyTorch has it: outputs first."""
    shape = _shape(node.inputs[1])
    outputs_first = node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1)
    return shape if outputs_first else shape[::-1]


def _agree(layer: Layer, shape: tuple[int, ...]) -> bool:
    return (layer.outputs, layer.inputs, layer.taps) == (*shape[:2], math.prod(shape[2:]))


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:_NAMED])}{' …' if len(names) > _NAMED else ''}"
