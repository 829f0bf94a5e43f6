"""The two graphs of a plan: float32-typed for ONNX Runtime, float16-typed for TensorRT, with the same integers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from latentrt.export.activation_range import recorded_runs
from latentrt.export.cast_cleanup import CastCleanupPass
from latentrt.export.graph_files import save_onnx, weight_bytes
from latentrt.export.graph_values import is_weight
from latentrt.export.half_builder import LARGE_BYTES
from latentrt.export.half_precision import HALF_MAX, HalfPrecisionPass
from latentrt.export.overflow import module_of
from latentrt.export.parity import BOUNDS, Comparison, compare
from latentrt.export.resources import release_memory
from latentrt.runtime.errors import CalibrationError
from latentrt.runtime.lora_weights import lora_weights
from latentrt.runtime.session import OnnxSession
from latentrt.runtime.specs import Array, ModelSpec

from .bias_correction import BiasCorrectionPass
from .plan import Plan
from .quantize_pass import QuantizePass
from .smooth_pass import SmoothPass
from .source import Source, load_model

Feeds = Mapping[str, Array]
# Rows, and tokens of a text. Latents are a multiple of what a U-Net halves them by.
_PROBE_SIZES, _PROBE_LATENTS = {"batch": 2, "sequence_length": 77}, 16
# Of a quantized tensor, by what it is stored as: the largest absolute value over its scale.
_MOST_STEPS = {ir.DataType.INT8: 128, ir.DataType.FLOAT8E4M3FN: 448}


@dataclass(frozen=True)
class WrittenGraph:
    """A graph in its files, itself first, and figures of it by case."""

    files: tuple[Path, ...]
    parity: dict[str, Any]


def quantized_model(source: Source, plan: Plan) -> ir.Model:
    """The float32-typed graph of a plan. Weights are read and rounded when they are wanted.

    Raises:
        CalibrationError: the plan does not fit the graph.
    """
    model = load_model(source)
    BiasCorrectionPass({name: plan.corrections[name] for name in plan.quants() if name in plan.corrections})(model)
    SmoothPass({group: plan.vectors[group] for group in _quantized_groups(plan) if group in plan.vectors})(model)
    QuantizePass(plan.quants())(model)
    return model


def _quantized_groups(plan: Plan) -> dict[str, None]:
    return dict.fromkeys(layer.group for layer in plan.layers if layer.quantized)


def to_half(model: ir.Model, keep: Sequence[str]) -> None:
    """Give a quantized float32-typed graph float16 types; its integers and scales stay what they are.

    Args:
        keep: tensors of the fp32 graph that stay in float32, of a network that float16 does not hold.
    """
    HalfPrecisionPass(keep={*keep, *_wide(model)})(model)
    CastCleanupPass()(model)


def _wide(model: ir.Model) -> set[str]:
    """What DequantizeLinear makes of tensors that float16 cannot hold, and of the weights that they meet."""
    found: set[str] = set()
    for node in model.graph:
        stored, scale = node.inputs[:2] if node.op_type == "DequantizeLinear" else (None, None)
        if stored is None or stored.dtype is None or scale is None or scale.const_value is None or is_weight(stored):
            continue
        if _MOST_STEPS[stored.dtype] * float(scale.const_value.numpy()) > HALF_MAX:
            values = (node.outputs[0], *(reader.inputs[1] for reader, _ in node.outputs[0].uses()))
            found |= {str(value.name) for value in values if value is not None}
    return found


def write_graphs(
    source: Source,
    plan: Plan,
    paths: Sequence[Path],
    *,
    cases: Mapping[str, Feeds] | None = None,
    keep: Sequence[str] = (),
) -> tuple[WrittenGraph, WrittenGraph]:
    """Write both graphs of a plan and run them.

    Args:
        paths: of the float32-typed and the float16-typed graph.
        cases: inputs, by a name for the record; noise by default.
        keep: as for `to_half`.

    Returns:
        Both graphs. Figures are against the fp32 graph; the second has `typed` too, against the first.

    Raises:
        CalibrationError: the plan does not fit the graph, an output is not finite or a tensor beyond float16, or the
            float16-typed graph is farther from the float32-typed one than quantization explains.
    """
    model = quantized_model(source, plan)
    full_files = save_onnx(model, paths[0])
    to_half(model, keep)
    half_files = save_onnx(model, paths[1])
    if weight_bytes(model) > LARGE_BYTES:
        release_memory()
    weights = lora_weights(source.loras, source.graph, source.component)
    reference = OnnxSession(source.graph, optimize=False, weights=weights)
    cases = cases or {"noise": probe_feeds(reference.spec)}
    wanted = answers_of(reference, cases)
    full = answers_of(OnnxSession(full_files[0], optimize=False), cases)
    name = f"{source.component} {plan.precision}"
    parity = figures_against(wanted, full, name=f"{name}, float32-typed")
    # That the graph runs as it is, and what it computes where every operator rounds, as on a GPU.
    OnnxSession(half_files[0], optimize=False)(next(iter(cases.values())))
    runs, ranges = recorded_runs(half_files[0], cases.values(), rounding=True)
    _check_ranges(model, name, ranges)
    half = dict(zip(cases, runs, strict=True))
    typed = figures_against(full, half, name=f"{name}, float16-typed")
    # A value next to a step's edge may be rounded otherwise in float16. At the worst, the noises of the two graphs have
    # nothing to do with each other: their squares add.
    bound = BOUNDS["fp16"] + math.sqrt(2) * parity["worst_relative_l2"]
    if not typed["worst_relative_l2"] <= bound:
        raise CalibrationError(
            f"{name}: expected the float16-typed graph within relative L2 {bound:.3g} of the float32-typed one, got "
            f"{typed['worst_relative_l2']:.3g}. float16 does not hold this network: export it with --precision fp16, "
            "which finds what has to stay float32."
        )
    return WrittenGraph(full_files, parity), WrittenGraph(
        half_files, {**figures_against(wanted, half, name=name), "typed": typed["worst_relative_l2"]}
    )


def probe_feeds(spec: ModelSpec) -> dict[str, Array]:
    """Noise for a network's inputs: two rows of a small picture, at an early and a late timestep."""
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = tuple(
            size if isinstance(size, int) else _PROBE_SIZES.get(size, _PROBE_LATENTS) for size in tensor.shape
        )
        feeds[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
    if "timestep" in feeds:
        feeds["timestep"] = np.array([1, 900]).astype(feeds["timestep"].dtype)
    return feeds


def answers_of(session: OnnxSession, cases: Mapping[str, Feeds]) -> dict[str, Mapping[str, Array]]:
    """What a graph makes of each case."""
    return {name: session(feeds) for name, feeds in cases.items()}


def figures_against(
    wanted: Mapping[str, Mapping[str, Array]], found: Mapping[str, Mapping[str, Array]], *, name: str
) -> dict[str, Any]:
    """Figures of each case's worst output, and `worst_relative_l2` over all.

    Raises:
        CalibrationError: an output is not finite.
    """
    figures: dict[str, Any] = {}
    for case, outputs in wanted.items():
        comparisons = {key: compare(value, found[case][key]) for key, value in outputs.items()}
        broken = next((key for key, comparison in comparisons.items() if not comparison.finite), None)
        if broken is not None:
            raise CalibrationError(
                f"{name}: expected finite numbers in {broken}, got NaN or infinity in case '{case}'."
            )
        figures[case] = max(comparisons.values(), key=_distance).figures()
    return {**figures, "worst_relative_l2": max(each["relative_l2"] for each in figures.values())}


def _distance(comparison: Comparison) -> float:
    return comparison.relative_l2


def _check_ranges(model: ir.Model, name: str, ranges: Mapping[str, float]) -> None:
    """Have the float16 tensors of a graph be within its range; QuantizeLinear would make a number of infinity.

    Args:
        ranges: of `recorded_runs`.
    """
    half = {value.name for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT16}
    first = next((tensor for tensor, largest in ranges.items() if tensor in half and not largest <= HALF_MAX), None)
    if first is not None:
        raise CalibrationError(
            f"{name}: expected tensors within float16's {HALF_MAX:g}, got {ranges[first]:g} first in {first} "
            f"({module_of(model, first)}). Export with --precision fp16 first, which finds what has to stay in float32."
        )
