"""The LoRAs of a run: those that are asked for, or those that a quantized U-Net has in its weights for good.

Weights in int8 or fp8 cannot be changed: their scales, and those of what they multiply, are of the weights that were
calibrated. What LoRAs those held stands in the graph's record, as `lora_notes` has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .bundle import Bundle
from .errors import UsageError
from .lora_store import ActiveLora, Wanted, open_loras
from .lora_weights import lora_notes
from .precisions import QUANTIZED

_UNET = "unet"


def calibrated_loras(bundle: Bundle, precision: str) -> tuple[Mapping[str, Any], ...]:
    """The notes of the LoRAs with which a run's U-Net was calibrated; none of one that is not quantized."""
    if precision not in QUANTIZED or bundle.manifest is None:
        return ()
    artifact = bundle.manifest.artifact(_UNET, precision)
    return () if artifact is None else tuple(artifact.inputs.get("loras", ()))


def loras_of_run(bundle: Bundle, precision: str, wanted: Wanted, *, verify: bool) -> tuple[ActiveLora, ...]:
    """LoRAs of a bundle for a run in a precision, in the order in which they are folded in.

    Of a quantized U-Net that was calibrated with some, those are taken if none are asked for: the text encoders need
    them too.

    Raises:
        UsageError: the bundle holds none of that name, a scale is not finite, or the U-Net is quantized and was
            calibrated with others.
        ArtifactError: a file is missing, damaged or changed.
    """
    built_in = calibrated_loras(bundle, precision)
    asked = open_loras(bundle, wanted, verify=verify)
    loras = asked or open_loras(bundle, {note["name"]: note["scale"] for note in built_in}, verify=verify)
    changes_unet = any(_UNET in active.lora.deltas for active in loras)
    if precision in QUANTIZED and (built_in or changes_unet) and lora_notes(loras) != list(built_in):
        options = "".join(f" --lora {active.lora.name}:{active.scale:g}" for active in loras)
        found = _described(lora_notes(loras))
        found += " of other files" if found == _described(built_in) else ""
        raise UsageError(
            f"unet {precision}: expected the LoRAs that it was calibrated with, {_described(built_in) or 'none'}, got "
            f"{found}. {precision} weights cannot be changed: draw in another precision, or run: "
            f"latentrt calibrate {bundle.path} --precision {precision}{options}"
        )
    return loras


def lora_note(bundle: Bundle, precision: str) -> str | None:
    """That a run draws with LoRAs for which nobody has to ask, for people; None if it does not."""
    built_in = calibrated_loras(bundle, precision)
    return f"unet: {precision}, calibrated with LoRA {_described(built_in)}, which it draws with" if built_in else None


def _described(notes: tuple[Mapping[str, Any], ...] | list[dict[str, str | float]]) -> str:
    return ", ".join(f"{note['name']}:{note['scale']:g}" for note in notes)
