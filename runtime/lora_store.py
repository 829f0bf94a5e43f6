"""LoRAs that a bundle holds, as `loras/<name>.safetensors`: factors by the names of the weights that they change.

A file of a trainer is mapped to the bundle's weights once, when it is added, and kept as factors: what they make of a
weight is computed when it is loaded, at any scale. Tensors are named `<network>/<weight>/<role>`; what is no tensor
stands in the metadata, under `latentrt`, as JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import Bundle
from .errors import ArtifactError, UsageError
from .lora_delta import Delta, Factor
from .manifest import Manifest, check_files
from .onnx_file import mapped
from .safetensors import FloatTensor, open_safetensors, safetensors_bytes
from .specs import Array

FOLDER = "loras"
_SUFFIX = ".safetensors"
_VERSION = 1
_NAME = re.compile(r"[\w][\w .+-]{0,99}")
_MAGNITUDE = "magnitude"

# Names of a bundle's LoRAs; or names with scales, None for the one that it was added with.
Wanted = Mapping[str, float | None] | Iterable[str]


@dataclass(frozen=True, eq=False)
class StoredLora:
    """A LoRA of a bundle.

    Attributes:
        scale: by default; 1 is the strength that it was trained at.
        source: `file` and `sha256` of what it was added from.
        deltas: network (unet, text_encoder, text_encoder_2) -> weight, such as `conv_in.weight` -> change.
    """

    name: str
    scale: float
    source: Mapping[str, str]
    deltas: Mapping[str, Mapping[str, Delta]]


def checked_name(name: str) -> str:
    """A name that a LoRA may have.

    Raises:
        UsageError: it could not be a file's, or would be read as a name and a scale.
    """
    if not _NAME.fullmatch(name) or name != name.strip():
        raise UsageError(
            f"name: expected letters, digits, spaces, '.', '_', '+' and '-', at most 100, got {name!r}. "
            "Give another one with --name."
        )
    return name


def checked_scale(name: str, scale: float) -> float:
    """A scale that a LoRA may have.

    Raises:
        UsageError: it is not finite.
    """
    if not math.isfinite(scale):
        raise UsageError(f"{name}: expected a finite scale, got {scale}. 0.5 to 1 are usual.")
    return scale


def lora_path(name: str) -> str:
    """Where a bundle holds a LoRA, relative to it."""
    return f"{FOLDER}/{name}{_SUFFIX}"


def held_loras(manifest: Manifest | None) -> list[str]:
    """The names of a bundle's LoRAs."""
    files = () if manifest is None else manifest.files
    prefix = f"{FOLDER}/"
    return sorted(
        file.removeprefix(prefix).removesuffix(_SUFFIX)
        for file in files
        if file.startswith(prefix) and file.endswith(_SUFFIX)
    )


def lora_bytes(lora: StoredLora) -> bytes:
    """The file of a LoRA. Factors stay float16 where they are, all others become float32."""
    tensors: dict[str, Array] = {}
    changes: dict[str, dict[str, Any]] = {}
    for network, deltas in lora.deltas.items():
        for weight, delta in deltas.items():
            factors = dict(delta.factors) | ({} if delta.magnitude is None else {_MAGNITUDE: delta.magnitude})
            for role, factor in factors.items():
                values = np.asarray(factor.read())
                tensors[f"{network}/{weight}/{role}"] = values.astype(
                    values.dtype if values.dtype == np.float16 else np.float32, copy=False
                )
            changes.setdefault(network, {})[weight] = {
                "alpha": delta.alpha,
                "rank_stabilized": delta.rank_stabilized,
                "by_input": delta.by_input,
            }
    note = {"version": _VERSION, "scale": lora.scale, "source": dict(lora.source), "changes": changes}
    return safetensors_bytes(tensors, {"latentrt": json.dumps(note, sort_keys=True)})


def read_stored_lora(path: Path, name: str) -> StoredLora:
    """Read a LoRA of a bundle; its factors are read when they are wanted.

    Raises:
        ArtifactError: it is missing, damaged, or of a newer latentrt.
    """
    try:
        file = open_safetensors(path, mapped(path))
        note = json.loads(file.metadata["latentrt"])
        if note["version"] > _VERSION:
            raise ArtifactError(
                f"{path}: expected version {_VERSION} or older, got {note['version']}. It was added by a newer "
                "latentrt: upgrade this one."
            )
        return StoredLora(name, float(note["scale"]), note["source"], _deltas(file.tensors, note["changes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise ArtifactError(
            f"{path}: expected a LoRA that latentrt lora add wrote, got {err!r}. Remove it and add it again."
        ) from err


def _deltas(tensors: Mapping[str, FloatTensor], changes: Mapping[str, Any]) -> dict[str, dict[str, Delta]]:
    factors: dict[tuple[str, str], dict[str, Factor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        network, weight, role = key.split("/")
        factors[network, weight][role] = tensor
    deltas: dict[str, dict[str, Delta]] = {}
    for network, weights in changes.items():
        deltas[network] = {}
        for weight, settings in weights.items():
            own = factors[network, weight]
            magnitude = own.pop(_MAGNITUDE, None)
            deltas[network][weight] = Delta(own, magnitude=magnitude, keys=(weight,), **settings)
    return deltas


@dataclass(frozen=True, eq=False)
class ActiveLora:
    """A LoRA at work, at its scale."""

    lora: StoredLora
    scale: float


def open_loras(bundle: Bundle, wanted: Wanted, *, verify: bool = True) -> tuple[ActiveLora, ...]:
    """LoRAs of a bundle, in the order in which they are folded in.

    Args:
        verify: compare their SHA-256 with the manifest; sizes are always compared.

    Raises:
        UsageError: the bundle holds none of that name, or a scale is not finite.
        ArtifactError: a file is missing, damaged or changed.
    """
    scales = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(wanted)
    manifest = bundle.manifest
    held = held_loras(manifest)
    opened = []
    for name, scale in scales.items():
        if manifest is None or name not in held:
            raise UsageError(
                f"{bundle.path}: expected a LoRA of the bundle, got {name!r}, found {', '.join(held) or 'none'}. "
                f"Add it: latentrt lora add {bundle.path} FILE.safetensors --name {name}"
            )
        check_files(bundle.path, manifest, [lora_path(name)], hashes=verify)
        stored = read_stored_lora(bundle.path / lora_path(name), name)
        opened.append(ActiveLora(stored, checked_scale(name, stored.scale if scale is None else scale)))
    return tuple(opened)
