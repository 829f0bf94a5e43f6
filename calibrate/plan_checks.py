"""What has to be so of a plan, by itself and for the graph that it is applied to; it may have been edited by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from latentrt.runtime.errors import CalibrationError

from .layer_quant import Kind
from .layers import Layer
from .plan import LayerPlan, Plan

_HALF_MAX = float(np.finfo(np.float16).max)
_NAMED = 5


def check_consistent(plan: Plan) -> None:
    """Hold a plan to what has to be so of it whatever its graph.

    Raises:
        CalibrationError: says which layer, or what of the plan, is wrong.
    """
    if plan.kind not in get_args(Kind):
        raise _wrong("plan: kind", " or ".join(get_args(Kind)), plan.kind)
    names = [layer.name for layer in plan.layers]
    if twice := {name for name in names if names.count(name) > 1}:
        raise _wrong("plan", "every layer once", f"{_listed(twice)} twice")
    for layer in plan.layers:
        _check_layer(layer)
    quantized = [layer for layer in plan.layers if layer.quantized]
    scaled = [layer for layer in quantized if layer.scale is not None]
    if scaled and len(scaled) < len(quantized):
        bare = next(layer for layer in quantized if layer.scale is None)
        raise _wrong(
            bare.name, "a scale, as the other layers that are quantized have", "none", "Set `quantized` to false."
        )
    if quantized and not scaled and plan.kind != "int8":
        raise _wrong(quantized[0].name, f"a scale: only int8 weights go without, not {plan.kind} ones", "none")
    first: dict[str, LayerPlan] = {}
    for layer in scaled:
        other = first.setdefault(layer.group, layer)
        if layer.scale != other.scale:
            raise _wrong(
                layer.name,
                f"scale {other.scale:g}, as {other.name} has, which reads the same tensor",
                f"{layer.scale:g}",
                "Give them one scale.",
            )
    for what, arrays in (("vector", plan.vectors), ("correction", plan.corrections)):
        for name, values in arrays.items():
            if not np.isfinite(values).all() or (what == "vector" and not (values > 0).all()):
                kind = "positive numbers" if what == "vector" else "finite numbers"
                raise _wrong(f"{name}: {what}", kind, "others")


def check_plan(
    plan: Plan, layers: Sequence[Layer], graph: Mapping[str, str], loras: Iterable[Mapping[str, Any]]
) -> None:
    """Hold a plan to the graph that it is to be applied to.

    Args:
        layers: of the graph.
        graph: SHA-256 of its files by path.
        loras: that are in its weights, as `lora_notes` has them.

    Raises:
        CalibrationError: the plan is for another graph or not consistent, or a layer cannot be what the plan makes of
            it.
    """
    check_consistent(plan)
    if dict(plan.graph) != dict(graph) or list(map(dict, plan.loras)) != list(map(dict, loras)):
        what = "weights with other LoRAs" if dict(plan.graph) == dict(graph) else "another graph"
        raise CalibrationError(
            f"{plan.component}: expected a plan for this graph, got a plan for {what}. "
            "The bundle was exported anew since, or the plan is another bundle's: calibrate again."
        )
    known = {layer.name: layer for layer in layers}
    planned = {layer.name for layer in plan.layers}
    for what, names in (("unknown to the graph", planned - known.keys()), ("missing", known.keys() - planned)):
        if names:
            raise CalibrationError(
                f"plan: expected the {len(known)} layers of the graph, got {len(names)} {what}: {_listed(names)}. "
                "Put back what was changed by hand, or calibrate again."
            )
    for each in plan.layers:
        layer = known[each.name]
        if each.group != layer.group:
            raise _wrong(each.name, f"group {layer.group}, whose input it reads", each.group)
        if each.quantized and not layer.quantizable:
            raise _wrong(
                each.name,
                "a Conv or MatMul of 16 channels or more on either side to quantize",
                f"a {layer.operator} from {layer.inputs} to {layer.outputs}",
                "Set its `quantized` to false.",
            )
    for what, arrays, sizes in (
        ("vector", plan.vectors, {layer.group: known[layer.group].inputs for layer in layers}),
        ("correction", plan.corrections, {layer.name: layer.outputs for layer in layers}),
    ):
        for name, values in arrays.items():
            if values.shape != (sizes.get(name),):
                raise _wrong(f"{name}: {what}", f"shape ({sizes.get(name)},)", values.shape)


def _check_layer(layer: LayerPlan) -> None:
    for text in (layer.name, layer.group, layer.kind, layer.reason):
        if not isinstance(text, str):
            raise _wrong(f"{layer.name}", "texts for name, group, kind and reason", repr(text))
    if not isinstance(layer.quantized, bool):
        raise _wrong(f"{layer.name}: quantized", "true or false", repr(layer.quantized))
    if layer.scale is not None and not (_is_number(layer.scale) and 0 < layer.scale <= _HALF_MAX):
        raise _wrong(f"{layer.name}: scale", f"a positive number up to {_HALF_MAX:g}, or null", repr(layer.scale))
    for what, value in (("noise", layer.noise), ("gain", layer.gain), ("macs", layer.macs)):
        if not (_is_number(value) or (what == "noise" and value is None)):
            raise _wrong(f"{layer.name}: {what}", "a finite number", repr(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(name: str, expected: str, got: object, remedy: str = "") -> CalibrationError:
    return CalibrationError(f"{name}: expected {expected}, got {got}. {remedy or 'Put back what was changed by hand.'}")


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return f"{', '.join(ordered[:_NAMED])}{' …' if len(ordered) > _NAMED else ''}"
