"""Which model a LoRA was made for, as far as its file tells: for the message when it does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from latentrt.runtime.lora_delta import Delta

# Width of the text that the U-Net's cross-attention reads.
_BY_TEXT_WIDTH = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "SDXL",
    1280: "the SDXL refiner",
}
# Parts of keys that only one family has.
_BY_KEY = {
    "single_transformer_blocks": "FLUX",
    "double_blocks": "FLUX",
    "joint_blocks": "Stable Diffusion 3",
    "lora_te3_": "Stable Diffusion 3 or FLUX",
    "text_encoder_3": "Stable Diffusion 3 or FLUX",
    "lora_prior_": "Stable Cascade",
    "transformer.": "a transformer model such as Stable Diffusion 3 or FLUX",
}
# What trainers note, by their key; sd-scripts and the Stability Model Spec.
_BY_NOTE = ("ss_base_model_version", "modelspec.architecture")


def family_of(
    keys: Iterable[str], deltas: Mapping[str, Mapping[str, Delta]], metadata: Mapping[str, str]
) -> str | None:
    """The family of a LoRA's model, or None where nothing tells."""
    widths = (
        delta.shape[1]
        for target, delta in deltas.get("unet", {}).items()
        if target.endswith(("attn2_to_k.weight", "attn2_to_v.weight"))
    )
    keys = tuple(keys)
    by_key = next((family for part, family in _BY_KEY.items() if any(part in key for key in keys)), None)
    noted = next((metadata[note] for note in _BY_NOTE if metadata.get(note)), None)
    return _BY_TEXT_WIDTH.get(next(widths, 0)) or by_key or noted
