"""Which family of Stable Diffusion a single file is of: what its tensors say, whatever its name says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from latentrt.runtime.errors import ArtifactError, ConfigError

from .weights import Weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."


@dataclass(frozen=True)
class Encoder:
    """A text encoder of a family.

    Attributes:
        part: its component.
        prefix: of its names in the file.
        open_clip: whether it has OpenCLIP's names, and a tokenizer that pads with "!".
    """

    part: str
    prefix: str
    open_clip: bool


@dataclass(frozen=True)
class Family:
    """What files of a family have in common.

    Attributes:
        key: of its published configs.
        title: for messages.
        context: width of the text that its published U-Net takes.
    """

    key: str
    title: str
    context: int
    encoders: tuple[Encoder, ...]


FAMILIES = (
    Family("sd1", "Stable Diffusion 1", 768, (Encoder("text_encoder", "cond_stage_model.transformer.", False),)),
    Family("sd2", "Stable Diffusion 2", 1024, (Encoder("text_encoder", "cond_stage_model.model.", True),)),
    Family(
        "sdxl",
        "SDXL",
        2048,
        (
            Encoder("text_encoder", "conditioner.embedders.0.transformer.", False),
            Encoder("text_encoder_2", "conditioner.embedders.1.model.", True),
        ),
    ),
    Family("refiner", "SDXL refiner", 1280, (Encoder("text_encoder_2", "conditioner.embedders.0.model.", True),)),
)
# Models of which the noise is not that of any scheduler here, by a tensor that marks them.
_UNSUPPORTED = {"edm_mean": "Playground 2.5", "edm_vpred.sigma_max": "CosXL"}
# What else a file may be: how a name in it begins, what it is then, and what to do.
_WHOLE = "Give a whole checkpoint: a file with all networks, or a diffusers folder."
_OTHERS = (
    (("control_model.", "controlnet_", "input_hint_block."), "a ControlNet", "Add it to a checkpoint: --controlnet"),
    (("lora_",), "a LoRA", "Add it to a checkpoint: --lora"),
    ((VAE, "encoder.", "decoder."), "a VAE alone", "Put it into a checkpoint: --vae"),
    (("down_blocks.", "input_blocks."), "a U-Net alone, without VAE and text encoders", _WHOLE),
    (("double_blocks.", f"{UNET}double_blocks."), "Flux", "It is not supported."),
    (("joint_blocks.", f"{UNET}joint_blocks."), "Stable Diffusion 3", "It is not supported."),
)


def family_of(weights: Weights, origin: Path) -> Family:
    """The family of a file that holds a U-Net, a VAE and text encoders.

    Args:
        weights: of the file, by their names there.
        origin: the file, for messages.

    Raises:
        ArtifactError: the file lacks one of them.
        ConfigError: it is of a model that is not supported.
    """
    for mark, model in _UNSUPPORTED.items():
        if mark in weights:
            raise ConfigError(f"{origin}: expected Stable Diffusion 1, 2 or XL, got {model}. It is not supported.")
    if not _has(weights, f"{UNET}input_blocks."):
        for beginnings, model, advice in _OTHERS:
            if any(_has(weights, beginning) for beginning in beginnings):
                raise ConfigError(
                    f"{origin}: expected a checkpoint of Stable Diffusion 1, 2 or XL, got {model}. {advice}"
                )
        raise ArtifactError(
            f"{origin}: expected a checkpoint of Stable Diffusion 1, 2 or XL, with tensors {UNET}…, "
            f"got {len(weights)} tensors such as {next(iter(weights), None)!r}. {_WHOLE}"
        )
    found = next(
        (family for family in FAMILIES if all(_has(weights, encoder.prefix) for encoder in family.encoders)), None
    )
    lacking = []
    if found is None:
        lacking.append(f"text encoders ({' or '.join(_prefixes(_likely(weights)))})")
    if not _has(weights, VAE):
        lacking.append(f"a VAE ({VAE})")
    if found is None or lacking:
        titles = " or ".join(family.title for family in ([found] if found else _likely(weights)))
        raise ArtifactError(
            f"{origin}: expected a checkpoint with U-Net, VAE and text encoders, got one of {titles} "
            f"without {' and '.join(lacking)}. {_WHOLE}"
        )
    return found


def _has(weights: Weights, beginning: str) -> bool:
    return any(name.startswith(beginning) for name in weights)


def _prefixes(families: Iterable[Family]) -> list[str]:
    return [" and ".join(encoder.prefix for encoder in family.encoders) for family in families]


def _likely(weights: Weights) -> list[Family]:
    """The families whose U-Net takes text of the width that this one takes; all if that does not tell."""
    for name, weight in weights.items():
        if name.startswith(UNET) and name.endswith(".attn2.to_k.weight"):
            families = [family for family in FAMILIES if weight.shape[-1:] == (family.context,)]
            return families or list(FAMILIES)
    return list(FAMILIES)
