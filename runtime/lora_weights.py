"""What LoRAs make of a graph's weights: for ONNX Runtime in the place of initializers, for engines by refit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import ArtifactError
from .graph_weights import GraphWeight, GraphWeights
from .lora_delta import fits, fused_values
from .lora_store import ActiveLora
from .prompt_keys import CACHED, PROMPT
from .specs import Array

# Graphs of a network that have other names: together the first two hold what the whole U-Net does.
_GRAPHS_OF = {PROMPT: "unet", CACHED: "unet", "unet_control": "unet"}
_PARTIAL = (PROMPT, CACHED)
# More wait for the memory alone.
_THREADS = 8


def network_of(component: str) -> str:
    """The network that a component's graph was made from: `unet` for all graphs of the U-Net."""
    return _GRAPHS_OF.get(component, component)


def networks_changed(loras: Iterable[ActiveLora]) -> set[str]:
    """The networks that LoRAs change; one at scale 0 too, because a DoRA then still changes norms."""
    return {network for active in loras for network in active.lora.deltas}


def lora_weights(
    loras: Sequence[ActiveLora], graph: Path, component: str, *, also: Iterable[ActiveLora] = ()
) -> dict[str, Array]:
    """The weights of a graph that LoRAs change, by initializer, as the graph has them.

    They are folded in one after the other, in float32, from the graph's own weights, and rounded once.

    Args:
        graph: the .onnx file.
        component: that it is of.
        also: LoRAs whose weights are wanted too, as they are without them: to take them out again.

    Raises:
        ArtifactError: the graph is damaged, or a LoRA was added for other weights.
        UsageError: a weight becomes too large for the graph's type.
    """
    network = network_of(component)
    deltas = [(active, active.lora.deltas.get(network, {})) for active in loras]
    touched = [parameter for _, own in deltas for parameter in own]
    touched += [parameter for active in also for parameter in active.lora.deltas.get(network, {})]
    if not touched:
        return {}
    weights = GraphWeights.open(graph)
    targets = []
    for parameter in dict.fromkeys(touched):
        weight = weights.by_parameter.get(parameter)
        if weight is not None:
            targets.append(weight)
        elif component not in _PARTIAL:
            raise ArtifactError(_misfit(graph, loras, f"no weight {parameter}"))

    def changed(weight: GraphWeight) -> Array:
        values = weights.read(weight)
        for active, own in deltas:
            delta = own.get(weight.parameter)
            if delta is None:
                continue
            if not fits(delta, weight.shape):
                wrong = f"{weight.parameter} of {weight.shape} instead of {delta.shape}"
                raise ArtifactError(_misfit(graph, [active], wrong))
            values = fused_values(values, delta, active.scale)
        return weights.laid(weight, values)

    # NumPy leaves Python's lock to others while it works on an array.
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _THREADS)) as pool:
        return dict(zip((weight.name for weight in targets), pool.map(changed, targets), strict=True))


def _misfit(graph: Path, loras: Sequence[ActiveLora], found: str) -> str:
    names = ", ".join(active.lora.name for active in loras)
    return (
        f"{graph}: expected the weights that LoRA {names} was added for, found {found}. The graph was exported from "
        "another model since: remove the LoRA from the bundle and add it again."
    )


def lora_notes(loras: Iterable[ActiveLora]) -> list[dict[str, str | float]]:
    """LoRAs as a picture's record has them, in their order: name, scale and SHA-256 of the trainer's file."""
    return [
        {"name": active.lora.name, "scale": active.scale, "sha256": active.lora.source["sha256"]} for active in loras
    ]
