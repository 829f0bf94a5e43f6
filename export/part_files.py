"""Networks in single files of their own: VAEs and ControlNets, with diffusers' or the original names."""

from __future__ import annotations

from pathlib import Path

from latentrt.runtime.errors import ArtifactError

from .checkpoint_parts import Part
from .ldm_names import controlnet_names
from .ldm_vae import vae_config, vae_names, vae_structure, vae_weight
from .published_configs import published_configs
from .renaming import Renaming, below, check_names
from .safetensors_file import read_safetensors
from .single_file_family import VAE
from .unet_config import controlnet_config
from .unet_structure import UnetStructure, diffusers_structure, ldm_structure
from .weights import Weights

_CONTROLNET = "control_model."
# What files of a VAE alone hold beside it, from its training.
_VAE_TRAINING = ("loss.", "model_ema.", "logvar")


def open_vae_file(path: Path, *, instead_of: Part) -> Part:
    """Open a VAE in a file of its own, or the one inside a whole checkpoint.

    Args:
        path: the file.
        instead_of: the VAE that it replaces. What weights do not show, such as the scaling factor, is as there.

    Raises:
        ArtifactError: the file is damaged, or does not hold exactly a VAE.
    """
    weights = read_safetensors(path).weights
    prefix = next((prefix for prefix in (VAE, "vae.") if any(name.startswith(prefix) for name in weights)), "")
    files = {f"{instead_of.name}/{path.name}": path}
    inside = below(weights, prefix)
    if "encoder.mid_block.resnets.0.conv1.weight" in inside:
        return Part(instead_of.name, path, instead_of.config, instead_of.model_class, inside, files)
    structure = vae_structure(inside, path)
    renaming = Renaming("", vae_names(structure), vae_weight)
    check_names(inside, [renaming], origin=path, taken_for="a VAE", ignored=lambda name: name.startswith(_VAE_TRAINING))
    own = renaming.apply(inside)
    config = vae_config(structure, own, instead_of.config, path)
    return Part(instead_of.name, path, config, instead_of.model_class, own, files)


def open_controlnet_file(name: str, path: Path) -> Part:
    """Open a ControlNet in a file of its own.

    Its weights do not show whether its residuals are averaged over the picture (`global_pool_conditions`, of the
    published "shuffle" model alone): they are taken not to be.

    Args:
        name: of the part: controlnet, controlnet_2…
        path: the file.

    Raises:
        ArtifactError: the file is damaged, or does not hold exactly a ControlNet.
        ConfigError: diffusers has no such ControlNet.
    """
    weights = read_safetensors(path).weights
    prefix = _CONTROLNET if any(name.startswith(_CONTROLNET) for name in weights) else ""
    inside = below(weights, prefix)
    if "controlnet_cond_embedding.conv_in.weight" in inside:
        structure = diffusers_structure(inside, path)
        hints = sum(name.startswith("controlnet_cond_embedding.") for name in inside) // 2
        own_names = controlnet_names(structure, hints=hints)
        renaming = Renaming("", {own: own for own in own_names})
    elif "input_hint_block.0.weight" in inside:
        structure = ldm_structure(inside, path, goes_up=False)
        hints = sum(name.startswith("input_hint_block.") for name in inside) // 2
        renaming = Renaming("", controlnet_names(structure, hints=hints))
    else:
        raise ArtifactError(
            f"{path}: expected a ControlNet, with diffusers' or the original names, got {len(weights)} tensors such as "
            f"{next(iter(weights), None)!r}. Give the file of a ControlNet, or its diffusers folder."
        )
    check_names(inside, [renaming], origin=path, taken_for="a ControlNet")
    own = renaming.apply(inside)
    published = published_configs(_family_of(structure, own))["unet"]
    config = controlnet_config(structure, own, published, path)
    return Part(name, path, config, "ControlNetModel", own, {f"{name}/{path.name}": path})


def _family_of(structure: UnetStructure, weights: Weights) -> str:
    """Key of the family that a ControlNet is for, by its embeddings and projections."""
    if structure.added:
        return "sdxl"
    linear = any(name.endswith(".proj_in.weight") and len(weight.shape) == 2 for name, weight in weights.items())
    return "sd2" if linear else "sd1"
