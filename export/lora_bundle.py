"""LoRAs of a bundle: a trainer's file mapped to the weights of its graphs, once, to be swapped at run time."""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from latentrt.runtime.bundle import Bundle, open_bundle
from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.graph_weights import GraphWeights
from latentrt.runtime.lora_delta import fits
from latentrt.runtime.lora_store import (
    StoredLora,
    checked_name,
    checked_scale,
    held_loras,
    lora_bytes,
    lora_path,
    open_loras,
)
from latentrt.runtime.lora_weights import network_of
from latentrt.runtime.manifest import Artifact, Manifest, check_files, write_scratch

from .checkpoint_parts import Part
from .lora import targets_of
from .lora_file import Lora, listed, read_lora
from .staging import commit
from .weights import Weight

# What trainers change if they are not told otherwise: attention and feed-forward layers of the U-Net with the
# projections around them, and those of the text encoders.
_USUAL = re.compile(
    r"(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|attentions\.\d+\.proj_(in|out)"
    r"|self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight"
)
# Of `qkv_packing.packed_name`.
_PACKED = re.compile(r"\.(to_q?kv|q?kv_proj)\.(weight|bias)$")


@dataclass(frozen=True)
class HeldLora:
    """A LoRA of a bundle, for people.

    Attributes:
        scale: by default.
        source: `file` and `sha256` of what it was added from.
        changes: how many weights it changes, by network.
        methods: LoRA, LoHa, LoKr or full, with DoRA where it has magnitudes.
        size: of its file, in bytes.
    """

    name: str
    scale: float
    source: Mapping[str, str]
    changes: Mapping[str, int]
    methods: tuple[str, ...]
    size: int


def add_lora(path: Path, file: Path, *, name: str | None = None, scale: float = 1.0, force: bool = False) -> HeldLora:
    """Put a LoRA into a bundle.

    It is held to every graph of the networks that it changes, in all precisions. No graph is changed.

    Args:
        path: of the bundle.
        file: of a trainer, see `read_lora`.
        name: to draw with; default the file's.
        scale: to draw with by default; 1 is the strength that it was trained at.
        force: take the place of a LoRA of that name.

    Raises:
        UsageError: the name is taken or cannot be one, or the scale is not finite.
        ArtifactError: the file is missing, damaged, a pickle, or made for another model; or a graph holds a weight that
            it changes in a form that cannot be replaced. The bundle is as it was.
    """
    bundle, manifest = _opened(path)
    name = checked_name(file.stem if name is None else name)
    checked_scale(name, scale)
    _check_free(path, manifest, name, force=force)
    lora = read_lora(file)
    graphs = _graphs(bundle, manifest, lora)
    parts = {network: _part(network, paths[0][1]) for network, paths in graphs.items()}
    targets = targets_of(parts, lora)
    for network, deltas in targets.items():
        _check_graphs(graphs[network], StoredLora(name, scale, {}, {network: deltas}))
    stored = StoredLora(name, scale, {"file": file.name, "sha256": lora.sha256}, targets)
    final = lora_path(name)
    (path / final).parent.mkdir(exist_ok=True)
    scratch, record = write_scratch(path / final, lora_bytes(stored))
    try:

        def change(before: Manifest | None) -> Manifest:
            if before is None or before.artifacts != manifest.artifacts:
                raise ArtifactError(f"{path}: it was exported anew meanwhile. Run the same command again.")
            _check_free(path, before, name, force=force)
            return before

        commit(path, {final: (scratch, record)}, change)
    finally:
        scratch.unlink(missing_ok=True)
    return _described(stored, record.size)


def list_loras(path: Path) -> list[HeldLora]:
    """A bundle's LoRAs, by name.

    Raises:
        ArtifactError: a file is missing, damaged or changed.
    """
    bundle, manifest = _opened(path)
    opened = open_loras(bundle, held_loras(manifest))
    return [_described(active.lora, manifest.files[lora_path(active.lora.name)].size) for active in opened]


def remove_lora(path: Path, name: str) -> None:
    """Take a LoRA out of a bundle.

    Raises:
        UsageError: the bundle holds none of that name; names those that it does.
    """
    _opened(path)

    def change(before: Manifest | None) -> Manifest:
        held = held_loras(before)
        if before is None or name not in held:
            raise UsageError(f"{path}: expected a LoRA of the bundle, got {name!r}, found {', '.join(held) or 'none'}.")
        files = {file: record for file, record in before.files.items() if file != lora_path(name)}
        return dataclasses.replace(before, files=files)

    commit(path, {}, change)


def lora_targets(bundle: Bundle, component: str, precision: str) -> tuple[str, ...]:
    """The weights that an engine has to be able to take anew for LoRAs, by the names of the graph's initializers.

    Those that the bundle's LoRAs change; where it has none yet, those that trainers change usually. An engine built for
    a few weights keeps its other fusions.

    Raises:
        UsageError: the bundle lacks the component in that precision.
        ArtifactError: its graph, or a LoRA, is damaged.
    """
    weights = GraphWeights.open(bundle.graph(component, precision)).by_parameter
    held = held_loras(bundle.manifest)
    network = network_of(component)
    changed = {parameter for active in open_loras(bundle, held) for parameter in active.lora.deltas.get(network, ())}
    return tuple(
        weight.name
        for parameter, weight in weights.items()
        if (parameter in changed if held else _USUAL.search(parameter) is not None)
    )


def _opened(path: Path) -> tuple[Bundle, Manifest]:
    bundle = open_bundle(path)
    if bundle.manifest is None:
        raise UsageError(f"{path}: expected a latentrt bundle, got a folder without a manifest. Run: latentrt export")
    return bundle, bundle.manifest


def _check_free(path: Path, manifest: Manifest, name: str, *, force: bool) -> None:
    if not force and name in held_loras(manifest):
        raise UsageError(
            f"{path}: expected a name that is free, got {name!r}. Choose another with --name, or put it in its place "
            "with --force."
        )


def _graphs(bundle: Bundle, manifest: Manifest, lora: Lora) -> dict[str, list[tuple[Artifact, Path]]]:
    """All graphs of the networks that a LoRA changes, the network's own first; their files are checked."""
    graphs: dict[str, list[tuple[Artifact, Path]]] = defaultdict(list)
    for artifact in sorted(manifest.artifacts, key=lambda a: (a.component != network_of(a.component), bool(a.target))):
        network = network_of(artifact.component)
        if network in lora.deltas:
            check_files(bundle.path, manifest, artifact.files, hashes=False)
            graphs[network].append((artifact, bundle.path / artifact.path))
    return dict(graphs)


def _part(network: str, graph: Path) -> Part:
    """A network as the graph holds it.

    Raises:
        ArtifactError: the graph holds several weights in one.
    """
    opened = GraphWeights.open(graph)
    if packed := [parameter for parameter in opened.by_parameter if _PACKED.search(parameter)]:
        raise ArtifactError(
            f"{graph}: expected each weight by itself, found queries, keys and values in one: {listed(packed)}. "
            "Export the checkpoint without packing, or with the LoRA folded in: latentrt export CHECKPOINT --lora FILE"
        )
    weights = {
        parameter: Weight(weight.shape, np.dtype(np.float32), partial(opened.read, weight))
        for parameter, weight in opened.by_parameter.items()
    }
    return Part(name=network, origin=graph, config={}, model_class="", weights=weights, files={})


def _check_graphs(graphs: Iterable[tuple[Artifact, Path]], lora: StoredLora) -> None:
    """Hold a LoRA's weights to all graphs of a network. Of a U-Net in two graphs, either has to hold each weight."""
    shares: dict[tuple[str, str], set[str]] = defaultdict(set)
    for artifact, path in graphs:
        weights = GraphWeights.open(path).by_parameter
        whole = artifact.component in (network_of(artifact.component), "unet_control")
        found = shares["" if not whole else artifact.path, artifact.precision]
        found |= {
            parameter
            for deltas in lora.deltas.values()
            for parameter, delta in deltas.items()
            if parameter in weights and fits(delta, weights[parameter].shape)
        }
    for (graph, precision), found in shares.items():
        missing = [name for deltas in lora.deltas.values() for name in deltas if name not in found]
        if missing:
            raise ArtifactError(
                f"{graph or 'the U-Net in two graphs'} ({precision}): expected each weight that {lora.name} changes by "
                f"itself, found {len(missing)} folded into others or not at all: {listed(missing)}. "
                "Export the checkpoint again, or with the LoRA folded in: latentrt export CHECKPOINT --lora FILE"
            )


def _described(lora: StoredLora, size: int) -> HeldLora:
    methods = {
        delta.method if delta.magnitude is None else f"{delta.method} with DoRA"
        for deltas in lora.deltas.values()
        for delta in deltas.values()
    }
    changes = {network: len(deltas) for network, deltas in lora.deltas.items()}
    return HeldLora(lora.name, lora.scale, lora.source, changes, tuple(sorted(methods)), size)
