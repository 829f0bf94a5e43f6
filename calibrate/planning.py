"""From statistics to a plan: smoothing, scales, corrections and the noise of every layer; then a choice of layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from latentrt.runtime.errors import CalibrationError, UsageError
from latentrt.runtime.lora_weights import lora_notes

from .bias_correction import biases_of, choose_corrections
from .calls import Call
from .layer_costs import Costs
from .layer_quant import Kind, LayerQuant, precision_of
from .layers import LEAST_CHANNELS, Layer, layer_weights
from .plan import LayerPlan, Plan
from .scales import DEFAULT_PERCENT, Method, check_method, choose_scales
from .sensitivity import one_at_a_time, sensitivities
from .smoothing import choose_smoothing
from .smoothing_sites import smoothing_sites
from .solver import Item, items_of
from .source import Source, load_model
from .statistics import Statistics

# Why a layer is quantized or not, for people.
QUANTIZED = "within the budget"
TOO_NOISY = "too much noise for what it saves"
NO_GAIN = "saves nothing"


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How numbers are chosen.

    Attributes:
        kind: what layers are quantized to.
        weight_only: leave inputs as they are.
        method: of the scales.
        percent: of the method percentile.
        smooth: divide channels where that loses less.
        correct: take the mean error of the weights off the biases; no gain was measured.
        exact: measure each layer's noise by itself instead of all from one backward pass.
        seed: of the probes.
    """

    kind: Kind = "int8"
    weight_only: bool = False
    method: Method = "output-error"
    percent: float = DEFAULT_PERCENT
    smooth: bool = True
    correct: bool = False
    exact: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what numbers are chosen by.

        Raises:
            UsageError: no such method for the kind, or a percentage out of its range.
        """
        check_method(self.method, self.percent, self.kind)

    @property
    def precision(self) -> str:
        """What a bundle calls the result."""
        return precision_of(self.kind, weight_only=self.weight_only)

    @property
    def needs_statistics(self) -> bool:
        """Whether anything is chosen by what the layers read."""
        return self.correct or not self.weight_only


def full_plan(
    source: Source,
    layers: tuple[Layer, ...],
    statistics: Statistics | None,
    costs: Costs,
    options: PlanOptions,
    *,
    made: Mapping[str, Any],
) -> Plan:
    """The plan that quantizes all that can be; noises are not in it yet.

    Args:
        source: the network.
        layers: of its graph, with costs for the size that is drawn.
        statistics: of its inputs; None where the options need none.
        costs: of the layers.
        options: how numbers are chosen.
        made: for the record.

    Raises:
        CalibrationError: statistics or graph do not fit the network, or a scale is beyond float16.
    """
    if statistics is None and options.needs_statistics:
        raise CalibrationError(f"{source.component}: expected statistics of what its layers read, got none.")
    candidates = [layer for layer in layers if layer.quantizable]
    weights = layer_weights(layers, source.wrapper, source.network)
    vectors: Mapping[str, NDArray[np.float32]] = {}
    scales: Mapping[str, float] = {}
    corrections: Mapping[str, NDArray[np.float32]] = {}
    model = load_model(source)
    if statistics is not None and not options.weight_only:
        if options.smooth:
            sites = smoothing_sites(model, layers)
            vectors = choose_smoothing(candidates, sites, statistics, weights, kind=options.kind)
        scales = choose_scales(
            candidates,
            statistics,
            weights,
            method=options.method,
            percent=options.percent,
            vectors=vectors,
            kind=options.kind,
        )
    quants = {
        layer.name: LayerQuant(scales.get(layer.name), vectors.get(layer.group), kind=options.kind)
        for layer in candidates
    }
    if statistics is not None and options.correct:
        biased = biases_of(model)
        biased_layers = [layer for layer in candidates if layer.name in biased]
        corrections = choose_corrections(biased_layers, statistics, weights, quants)
    return Plan(
        component=source.component,
        kind=options.kind,
        graph=source.files,
        loras=tuple(lora_notes(source.loras)),
        layers=tuple(_layer_plan(layer, quants, costs) for layer in layers),
        vectors=vectors,
        corrections=corrections,
        made=made,
    )


def _layer_plan(layer: Layer, quants: Mapping[str, LayerQuant], costs: Costs) -> LayerPlan:
    quant = quants.get(layer.name)
    return LayerPlan(
        name=layer.name,
        group=layer.group,
        kind=layer.kind,
        quantized=quant is not None,
        reason=QUANTIZED if quant else _why_not(layer),
        scale=quant.scale if quant else None,
        noise=None,
        gain=costs.gains[layer.name],
        macs=layer.share,
    )


def _why_not(layer: Layer) -> str:
    """Of a layer that no kernel quantizes."""
    if min(layer.inputs, layer.outputs) < LEAST_CHANNELS:
        return f"fewer than {LEAST_CHANNELS} channels"
    return "one vector a picture: nothing to gain"


def with_noises(
    plan: Plan, network: nn.Module, calls: Iterable[Call], options: PlanOptions, *, device: str = "cpu"
) -> Plan:
    """The same plan with the noise that each of its layers adds to the guided prediction.

    Args:
        network: `Source.wrapper` of its source, with all weights at hand on `device`.
        calls: of it.
        options: that it was made with.

    Raises:
        CalibrationError: there is no call, or a noise is not finite.
    """
    quants = plan.quants()
    if options.exact:
        found = one_at_a_time(network, quants, calls, device=device)
    else:
        found = sensitivities(network, quants, calls, device=device, seed=options.seed)
    noises = found.shares()
    layers = tuple(dataclasses.replace(layer, noise=noises.get(layer.name)) for layer in plan.layers)
    return dataclasses.replace(plan, layers=layers)


def plan_items(plan: Plan, layers: Iterable[Layer]) -> tuple[Item, ...]:
    """What there is to choose from in a plan with noises.

    Raises:
        CalibrationError: a noise is not finite.
    """
    noises = {layer.name: layer.noise for layer in plan.layers if layer.noise is not None}
    gains = {layer.name: layer.gain for layer in plan.layers}
    return items_of(tuple(layers), noises, gains)


def selected(plan: Plan, chosen: Collection[str], *, made: Mapping[str, Any] | None = None) -> Plan:
    """A plan with only some of its layers quantized.

    Args:
        plan: that quantizes all that can be.
        chosen: names of the layers to quantize, of those that the plan does.
        made: what to add to its record.

    Raises:
        UsageError: a name is of no layer that can be quantized.
    """
    possible = {layer.name for layer in plan.layers if layer.quantized}
    if unknown := sorted(set(chosen) - possible):
        raise UsageError(f"layers: expected some of the {len(possible)} that can be quantized, got {unknown[0]}.")
    layers = tuple(
        layer
        if layer.name not in possible or layer.name in chosen
        else dataclasses.replace(layer, quantized=False, reason=TOO_NOISY if layer.gain > 0 else NO_GAIN)
        for layer in plan.layers
    )
    return dataclasses.replace(plan, layers=layers, made={**plan.made, **(made or {})})


def quantized_share(plan: Plan) -> float:
    """Of the multiplications of all layers, the share of those that are quantized."""
    return sum(layer.macs for layer in plan.layers if layer.quantized)
