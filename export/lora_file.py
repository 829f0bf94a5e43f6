"""Reading LoRA files of all trainers: what each changes, as factors that are read when they are wanted."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.lora_delta import Delta
from latentrt.runtime.manifest import sha256_of

from .lora_family import family_of
from .lora_names import Place, other_method, place_of
from .safetensors_file import read_safetensors
from .weights import Weight

_NAMED = 10
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA file.

    Attributes:
        sha256: of the file.
        deltas: component (unet, text_encoder, text_encoder_2) -> `<module>.weight` or `.bias`, the module in the
            file's naming with underscores for dots -> the change.
        metadata: what the trainer noted.
    """

    path: Path
    sha256: str
    deltas: Mapping[str, Mapping[str, Delta]]
    metadata: Mapping[str, str]


def read_lora(path: Path) -> Lora:
    """Read what a LoRA file changes. Its values are checked once and not kept.

    Formats: kohya, LyCORIS (LoCon, LoHa, LoKr, full differences), diffusers of all releases, peft; DoRA in each.

    Raises:
        ArtifactError: the file is missing, damaged or a pickle, holds NaN or infinite values, or is no LoRA of a
            Stable Diffusion model; names the first ten keys that it was not made for.
    """
    file = read_safetensors(path)
    places = {key: place_of(key) for key in file.weights}
    if unknown := [key for key, place in places.items() if place is None]:
        kind = other_method(unknown) or "another kind"
        family = family_of(file.weights, {}, file.metadata)
        raise ArtifactError(
            f"{path}: expected the keys of a LoRA, LoHa, LoKr or DoRA, got {len(unknown)} of {kind}: "
            f"{listed(unknown)}. "
            f"{f'The file seems to be for {family}: use' if family else 'Use'} a LoRA for this model."
        )
    known = {key: place for key, place in places.items() if place is not None}
    settings = _peft_settings(path, file.metadata)
    deltas: dict[str, dict[str, Delta]] = defaultdict(dict)
    for (component, target), keys in _grouped(path, known).items():
        weights = {role: file.weights[key] for role, key in keys.items()}
        module = known[next(iter(keys.values()))].path
        deltas[component][target] = _delta(path, weights, tuple(keys.values()), settings.get(component), module)
    if not deltas:
        raise ArtifactError(f"{path}: expected a LoRA, got a file without tensors. Copy it again.")
    for weight in file.weights.values():
        weight.read()
    return Lora(path=path, sha256=sha256_of(path), deltas=dict(deltas), metadata=file.metadata)


def _grouped(path: Path, places: Mapping[str, Place]) -> dict[tuple[str, str], dict[str, str]]:
    """The keys of each change by their role; the changes by component and what they change there."""
    grouped: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for key, place in places.items():
        roles = grouped[place.component, f"{place.module}.{place.tensor}"]
        if place.role in roles:
            raise ArtifactError(
                f"{path}: expected each change once, got {roles[place.role]} and {key}. Save the LoRA in one format."
            )
        roles[place.role] = key
    return grouped


def listed(names: Iterable[str]) -> str:
    """The first ten of many names."""
    names = list(names)
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{rest}"


def _delta(
    path: Path, weights: dict[str, Weight], keys: tuple[str, ...], settings: _Settings | None, module: str
) -> Delta:
    noted = weights.pop("alpha", None)
    own = weights.pop("dora_scale", None)
    magnitude = weights.pop("magnitude", None) if own is None else own
    # Early releases of LyCORIS wrote (1, inputs, 1…), later ones (outputs, 1…).
    by_input = own is not None and len(own.shape) > 1 and own.shape[0] == 1 < own.shape[1]
    try:
        if noted is not None:
            return Delta(weights, float(noted.read().item()), False, magnitude, by_input, keys)
        if settings is not None:
            alpha = settings.alpha_of(module)
            return Delta(weights, alpha, settings.rank_stabilized, magnitude, by_input, keys)
        return Delta(weights, None, False, magnitude, by_input, keys)
    except ValueError as err:
        raise ArtifactError(f"{path}: {listed(keys)}: {err}. The file is incomplete: copy it again.") from err


@dataclass(frozen=True)
class _Settings:
    """What of peft's LoraConfig scales a change.

    Attributes:
        alphas: of modules that have their own, by the ends of their names.
    """

    alpha: float | None
    alphas: Mapping[str, float]
    rank_stabilized: bool

    def alpha_of(self, module: str) -> float | None:
        """The alpha of a module, by its name with dots."""
        ends = (own for end, own in self.alphas.items() if module == end or module.endswith(f".{end}"))
        return next(ends, self.alpha)


def _peft_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, _Settings]:
    """Settings of peft by component: diffusers notes them in the file, peft beside it, for a network without a name."""
    beside = path.parent / _PEFT_CONFIG
    try:
        if _DIFFUSERS_METADATA in metadata:
            noted = dict(json.loads(metadata[_DIFFUSERS_METADATA]))
        elif path.name == _PEFT_FILE and beside.is_file():
            config = dict(json.loads(beside.read_bytes()))
            noted = {f"{name}.{key}": value for name in ("unet", "text_encoder") for key, value in config.items()}
        else:
            return {}
        options: dict[str, dict[str, Any]] = defaultdict(dict)
        for name, value in noted.items():
            component, _, option = name.partition(".")
            options[component][option] = value
        return {component: _settings(own) for component, own in options.items()}
    except (ValueError, TypeError, AttributeError) as err:
        raise ArtifactError(f"{path}: expected the settings of peft in JSON, got {err}. Save the LoRA again.") from err


def _settings(options: Mapping[str, Any]) -> _Settings:
    alpha = options.get("lora_alpha")
    alphas = {str(end).removeprefix("^"): float(own) for end, own in (options.get("alpha_pattern") or {}).items()}
    settings = _Settings(None if alpha is None else float(alpha), alphas, bool(options.get("use_rslora")))
    if not all(math.isfinite(value) for value in (settings.alpha or 0, *alphas.values())):
        raise ValueError("an alpha that is no finite number")
    return settings
