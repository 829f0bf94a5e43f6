"""What quantized layers are wrong by on average, taken back by their biases.

Quantized weights answer to the mean of their input by another number than the weights did, the same for every picture:
Nagel et al. 2019, Data-free quantization through weight equalization and bias correction (arXiv 1906.04721).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass, PassResult

from latentrt.export.graph_matching import consumer
from latentrt.export.graph_values import is_weight
from latentrt.export.lazy_weight import derived
from latentrt.export.weights import Weight
from latentrt.runtime.errors import CalibrationError

from .layer_quant import LayerQuant
from .layers import Layer
from .number_formats import quantized, weight_scales
from .smoothing_sites import readers_of
from .statistics import InputStatistics, Statistics

Correction = NDArray[np.float32]
_NAMED = 10


def biases_of(model: ir.Model) -> dict[str, str]:
    """The layers that have a bias, and the initializer that it is, by their weights' names.

    The bias of a Conv is its third input, that of a MatMul an Add that alone reads its output. Projections to
    queries, keys and values have none in Stable Diffusion.
    """
    found = {}
    for nodes in readers_of(model.graph).values():
        for node in nodes:
            weight, bias = node.inputs[1], _bias(node)
            assert weight is not None
            if bias is not None and is_weight(bias) and len(bias.uses()) == 1:
                found[str(weight.name)] = str(bias.name)
    return found


def _bias(node: ir.Node) -> ir.Value | None:
    if node.op_type != "MatMul":
        return node.inputs[2] if len(node.inputs) > 2 else None
    add, weight = consumer(node.outputs[0], "Add"), node.inputs[1]
    if add is None or weight is None or weight.shape is None:
        return None
    other = next((value for value in add.inputs if value is not node.outputs[0]), None)
    outputs = weight.shape.numpy()[-1]
    return other if other is not None and other.shape is not None and list(other.shape) == [outputs] else None


def choose_corrections(
    layers: Sequence[Layer],
    statistics: Statistics,
    weights: Mapping[str, Weight],
    quants: Mapping[str, LayerQuant],
    *,
    bin_weights: Sequence[float] | None = None,
) -> dict[str, Correction]:
    """What to add to the outputs of layers: E[W x] - E[W' x / v] by output channel, W' the quantized W v.

    Of the two roundings this is the weights' own. It needs no more of the input than its mean, which is exact. Where a
    convolution reads padding the mean is that of the inside. The input's own part is left out: estimated from sampled
    rows, it made the mean error of up- and downsamplers larger on the shapes model, and the prediction no better.

    Args:
        layers: to correct, those with a bias; `biases_of` names them.
        statistics: of the network that they are of.
        weights: by the names of the layers, as PyTorch has them, (outputs, inputs, …).
        quants: of the layers, by name.
        bin_weights: what each timestep bin counts; all the same if left out.

    Returns:
        (outputs,) by layer.

    Raises:
        CalibrationError: a layer has no statistics.
    """
    counts = np.ones(statistics.bins) if bin_weights is None else np.asarray(bin_weights, np.float64)
    corrections = {}
    for layer in layers:
        seen = statistics.inputs.get(layer.group)
        if not seen:
            raise CalibrationError(
                f"{layer.group}: expected statistics of its input, found none. They are of another graph: collect "
                "them again."
            )
        corrections[layer.name] = weight_correction(weights[layer.name].read(), _mean(seen, counts), quants[layer.name])
    return corrections


def weight_correction(weight: NDArray[np.floating], mean: NDArray[np.floating], quant: LayerQuant) -> Correction:
    """The mean error (outputs,) of a layer's quantized weights, to be added.

    Args:
        weight: (outputs, inputs, …).
        mean: (inputs,) of the input.
        quant: of the layer.
    """
    vector = np.ones(weight.shape[1], np.float32) if quant.vector is None else quant.vector
    multiplied = weight * vector.reshape(1, -1, *(1,) * (weight.ndim - 2))
    steps = weight_scales(multiplied, 0, quant.kind)
    shape = (-1, *(1,) * (weight.ndim - 1)) if steps.ndim else ()
    restored = quantized(multiplied, steps, 0, quant.kind).astype(np.float64) * steps.astype(np.float64).reshape(shape)
    lost = (multiplied.astype(np.float64) - restored).reshape(*weight.shape[:2], -1).sum(2)
    return np.asarray(lost @ (mean / vector), np.float32)


def _mean(seen: Mapping[int, InputStatistics], bin_weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """(channels,) over the timesteps that were seen."""
    total = sum(bin_weights[index] for index in seen)
    return np.asarray(sum(bin_weights[index] / total * each.mean for index, each in seen.items()), np.float64)


class BiasCorrectionPass(InPlacePass):
    """Add corrections to the biases of layers; comes before `SmoothPass`, which may divide a bias.

    Args:
        corrections: (outputs,) by the layer's weight.

    Raises:
        CalibrationError: a layer has no bias, or a correction is of another length or not finite.
    """

    def __init__(self, corrections: Mapping[str, Correction]) -> None:
        super().__init__()
        self.corrections = corrections

    def call(self, model: ir.Model) -> PassResult:
        """Change the biases; `modified` says whether there was one to change."""
        graph, biases = model.graph, biases_of(model)
        if unknown := sorted(self.corrections.keys() - biases.keys()):
            raise CalibrationError(
                f"{graph.name}: expected corrections of layers with a bias, got {', '.join(unknown[:_NAMED])}"
                f"{' …' if len(unknown) > _NAMED else ''}. The plan is of another graph: calibrate again."
            )
        for name, correction in self.corrections.items():
            tensor = graph.initializers[biases[name]].const_value
            assert tensor is not None
            if correction.shape != tuple(tensor.shape.numpy()) or not np.isfinite(correction).all():
                raise CalibrationError(
                    f"{name}: expected a correction of {tensor.shape.numpy()[0]} finite numbers, got shape "
                    f"{correction.shape}. The plan is of another graph: calibrate again."
                )
            graph.initializers[biases[name]].const_value = derived(
                [tensor],
                lambda bias, added=correction: (bias + added).astype(bias.dtype),
                shape=tensor.shape.numpy(),
                dtype=tensor.dtype,
                name=biases[name],
            )
        return PassResult(model, modified=bool(self.corrections))
