"""Folding a LoRA into the weights of a checkpoint, lazily: each weight is changed when it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.lora_delta import Delta, fits, fused_values

from .checkpoint_parts import Part
from .ldm_names import unet_names
from .lora_family import family_of
from .lora_file import Lora, listed
from .lora_names import flat
from .unet_structure import diffusers_structure
from .weights import Weight, Weights

_FLOAT = np.dtype(np.float32)


def fused(parts: Mapping[str, Part], lora: Lora, *, scale: float = 1.0) -> dict[str, Part]:
    """A checkpoint's networks with a LoRA folded in; several are folded in one after the other.

    The changed weights are float32, whatever they were in the file: they are rounded once, to the precision of the
    graph, however many LoRAs there are.

    Args:
        scale: 1 for the LoRA as it was trained; any finite number.

    Raises:
        ArtifactError: the LoRA changes something that the networks do not have, or that is of another shape there: it
            was made for another model.
        UsageError: the scale is not finite.
    """
    if not math.isfinite(scale):
        raise UsageError(f"{lora.path.name}: expected a finite scale, got {scale}.")
    targets = targets_of(parts, lora)
    return {
        name: _changed(part, targets[name], lora, scale) if name in targets else part for name, part in parts.items()
    }


def targets_of(parts: Mapping[str, Part], lora: Lora) -> dict[str, dict[str, Delta]]:
    """What a LoRA changes in a checkpoint: part -> name of the weight -> change.

    Raises:
        ArtifactError: a change fits no weight; names the first ten and the model that the LoRA seems to be for.
    """
    targets: dict[str, dict[str, Delta]] = {}
    problems = []
    for component, deltas in lora.deltas.items():
        part = parts.get(component)
        names = {} if part is None else _names(part)
        found = targets.setdefault(component, {})
        for module, delta in deltas.items():
            name = names.get(module)
            if part is None or name is None:
                problems.append(delta.keys[0])
            elif not fits(delta, part.weights[name].shape):
                problems.append(f"{delta.keys[0]} for {delta.shape} instead of {part.weights[name].shape}")
            elif name in found:
                problems.append(f"{delta.keys[0]} beside {found[name].keys[0]}")
            else:
                found[name] = delta
    if problems:
        keys = [key for deltas in lora.deltas.values() for delta in deltas.values() for key in delta.keys]
        family = family_of(keys, lora.deltas, lora.metadata)
        raise ArtifactError(
            f"{lora.path}: expected changes of weights that this checkpoint has, got {len(problems)} that it has "
            f"not or not of that shape: {listed(problems)}. "
            f"{f'The LoRA seems to be for {family}: use' if family else 'Use'} one that was made for this model."
        )
    return targets


def _names(part: Part) -> dict[str, str]:
    """The names that a LoRA may have for a part's weights, each with the weight's own."""
    original = unet_names(diffusers_structure(part.weights, part.origin)) if part.name == "unet" else {}
    names = {}
    for name in part.weights:
        for alias in {name, original.get(name, name)}:
            module, _, tensor = alias.rpartition(".")
            names[f"{flat(module)}.{tensor}"] = name
    return names


def _changed(part: Part, deltas: Mapping[str, Delta], lora: Lora, scale: float) -> Part:
    weights: Weights = {
        name: fused_weight(weight, deltas[name], scale) if name in deltas else weight
        for name, weight in part.weights.items()
    }
    note = {"kind": "lora", "file": lora.path.name, "sha256": lora.sha256, "scale": scale, "modules": len(deltas)}
    return replace(part, weights=weights, changes=(*part.changes, note))


def fused_weight(weight: Weight, delta: Delta, scale: float) -> Weight:
    """A weight with a change folded in when it is read, in float32."""
    return Weight(weight.shape, _FLOAT, lambda: fused_values(weight.read(), delta, scale))
