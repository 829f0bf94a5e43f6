"""Whether a single file's U-Net predicts noise or velocity, as far as the file says.

Both kinds have the same weights in form, and one taken for the other draws only noise. What tells them apart: metadata
(modelspec.prediction_type of the ModelSpec standard, modelspec.predict_key of ComfyUI, the architecture), and the empty
tensors `v_pred` and `ztsnr` with which ComfyUI and trainers of SDXL mark files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from latentrt.runtime.errors import UsageError

PREDICTION_TYPES = ("epsilon", "v_prediction")
_SPELLINGS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_METADATA = ("modelspec.prediction_type", "modelspec.predict_key")
_ARCHITECTURES = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction"}


def stated_prediction_type(metadata: Mapping[str, str], names: Collection[str]) -> tuple[str, str] | None:
    """The prediction type that a file states and where it does; None if it does not.

    Args:
        metadata: of the safetensors file.
        names: of its tensors.
    """
    if "v_pred" in names:
        return "v_prediction", "tensor v_pred"
    for key in _METADATA:
        spelled = _SPELLINGS.get(metadata.get(key, "").strip().lower())
        if spelled is not None:
            return spelled, f"metadata {key}"
    # LoRAs and the like append what they are: stable-diffusion-v2-512/lora.
    architecture = _ARCHITECTURES.get(metadata.get("modelspec.architecture", "").partition("/")[0])
    return (architecture, "metadata modelspec.architecture") if architecture else None


def with_prediction_type(
    scheduler: Mapping[str, Any],
    *,
    asked: str | None,
    metadata: Mapping[str, str],
    names: Collection[str],
    ambiguous: bool,
    origin: Path,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A scheduler's config for a file, with notes on how its prediction type was found.

    Args:
        scheduler: config of the family.
        asked: what the caller says, which goes before what the file states; None for nothing.
        metadata: of the file.
        names: of its tensors.
        ambiguous: whether models of both kinds were published in the family, so that a silent file is not guessed at.
        origin: the file, for messages.

    Raises:
        UsageError: an unknown prediction type, or none asked for where the file does not tell.
    """
    if asked is not None and asked not in PREDICTION_TYPES:
        raise UsageError(f"prediction type: expected one of {', '.join(PREDICTION_TYPES)}, got {asked!r}.")
    stated = stated_prediction_type(metadata, names)
    if asked is None and stated is None and ambiguous:
        raise UsageError(
            f"{origin}: expected the prediction type of this Stable Diffusion 2 in the file, found none. Give it with "
            "--prediction-type: v_prediction for models made from 2.0 or 2.1 at 768 pixels, epsilon for those made "
            "from 2-base or 2-1-base at 512."
        )
    config, notes = dict(scheduler), []
    if asked is not None:
        config["prediction_type"] = asked
        if stated is not None and stated[0] != asked:
            notes.append(f"prediction type: {asked} as asked for, though the file's {stated[1]} says {stated[0]}")
    elif stated is not None:
        config["prediction_type"] = stated[0]
        notes.append(f"prediction type: {stated[0]}, as the file's {stated[1]} says")
    if "ztsnr" in names:
        # Trained at full noise, which only trailing timesteps begin with (Lin et al. 2023, section 3.3).
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        notes.append("noise schedule: zero terminal signal-to-noise ratio, as the file's tensor ztsnr says")
    return config, tuple(notes)
