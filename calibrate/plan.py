"""The plan of a calibration: which layers are quantized, with which numbers, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layer_quant import Kind, LayerQuant, precision_of


@dataclass(frozen=True)
class LayerPlan:
    """One layer.

    Attributes:
        name: of its weight in the graph.
        group: first layer that reads the same tensor; all of a group that are quantized share scale and vector.
        kind: what it is in the network, such as attn1.to_q.
        quantized: whether it is.
        reason: why or why not, for people.
        scale: of its input; None where it cannot be quantized, or where only its weights are.
        noise: it would add to the guided prediction if it were quantized, as a share of that one's power; None
            if that was not measured.
        gain: what is won by quantizing it, as a share of the cost of all layers.
        macs: its share of the multiplications of all layers.
    """

    name: str
    group: str
    kind: str
    quantized: bool
    reason: str
    scale: float | None
    noise: float | None
    gain: float
    macs: float


@dataclass(frozen=True, eq=False)
class Plan:
    """All layers of a network.

    Attributes:
        component: unet or vae_decoder.
        kind: what layers are quantized to.
        graph: SHA-256 by file of the fp32 graph that it is for, the graph first.
        loras: that are in its weights, as `lora_notes` has them.
        layers: in the graph's order.
        vectors: (channels,) by group, of the smoothing.
        corrections: (outputs,) by layer, to be added to biases.
        made: how it was made: options, keys of the stages before, budget, predictions; for people and for the report.
    """

    component: str
    kind: Kind
    graph: Mapping[str, str]
    loras: Sequence[Mapping[str, Any]]
    layers: tuple[LayerPlan, ...]
    vectors: Mapping[str, NDArray[np.float32]]
    corrections: Mapping[str, NDArray[np.float32]]
    made: Mapping[str, Any]

    @property
    def precision(self) -> str:
        """What a bundle calls the network: `kind`, or int8w where weights alone are quantized."""
        scales = [layer.scale for layer in self.layers if layer.quantized]
        return precision_of(self.kind, weight_only=bool(scales) and all(scale is None for scale in scales))

    def quants(self) -> dict[str, LayerQuant]:
        """What is quantized, by layer."""
        return {
            layer.name: LayerQuant(
                scale=layer.scale,
                vector=self.vectors.get(layer.group),
                correction=self.corrections.get(layer.name),
                kind=self.kind,
            )
            for layer in self.layers
            if layer.quantized
        }
