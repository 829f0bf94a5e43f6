"""What quantizing a layer saves: its time on the user's GPU where it was measured, its multiplications where not."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import CalibrationError, UsageError

from .layers import Layer

MACS, WEIGHTS = "MACs", "weights"
_NAMED = 5


@dataclass(frozen=True)
class Costs:
    """What quantizing layers saves.

    Attributes:
        gains: by layer, as a share of the cost of all of them; negative where quantizing makes a layer slower.
        basis: what the cost is, for people: MACs, weights, or the file of the times.
    """

    gains: dict[str, float]
    basis: str


def layer_costs(layers: Sequence[Layer], times: Path | None = None, *, precision: str = "int8") -> Costs:
    """The gain of every layer.

    Without times it is the layer's share of the multiplications, which is right where kernels are limited by
    arithmetic and all gain the same; of int8w, which reads less and computes as before, its share of the weights.

    Args:
        layers: of the graph.
        times: a JSON file, {layer: {"fp16": seconds, "int8": seconds}}, of all layers that can be quantized.
        precision: of the quantized layers.

    Raises:
        UsageError: the file cannot be read.
        CalibrationError: it lacks a layer, or a time is no positive number.
    """
    if times is None and precision == "int8w":
        counts = {layer.name: layer.inputs * layer.outputs * layer.taps for layer in layers}
        return Costs({name: count / sum(counts.values()) for name, count in counts.items()}, WEIGHTS)
    if times is None:
        return Costs({layer.name: layer.share for layer in layers}, MACS)
    try:
        content = json.loads(times.read_bytes())
    except (OSError, ValueError) as err:
        raise UsageError(f"{times}: expected a JSON file of layer times, got {err}.") from err
    wanted = [layer.name for layer in layers if layer.quantizable]
    missing = [name for name in wanted if not isinstance(content, dict) or name not in content]
    if missing:
        raise CalibrationError(
            f"{times}: expected times of all {len(wanted)} layers that can be quantized, got none of "
            f"{', '.join(missing[:_NAMED])}{' …' if len(missing) > _NAMED else ''}. Measure the graph that is "
            "calibrated."
        )
    halves = {name: _seconds(times, name, content[name], "fp16") for name in wanted}
    total = math.fsum(halves.values())
    gains = {layer.name: 0.0 for layer in layers}
    gains |= {name: (half - _seconds(times, name, content[name], precision)) / total for name, half in halves.items()}
    return Costs(gains, str(times))


def _seconds(path: Path, name: str, entry: Any, precision: str) -> float:
    value = entry.get(precision) if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise CalibrationError(f"{path}: expected seconds in {precision} for {name}, got {value!r}.")
    return float(value)
