"""LoRA files in every trainer's format, of one LoRA, and diffusers as their judge: low-rank changes of modules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from latentrt.export.checkpoint_parts import Part
from latentrt.export.networks import libraries_quiet
from latentrt.export.weights import of_array

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
CLASSES = {
    "sd15": "StableDiffusionPipeline",
    "sd21": "StableDiffusionPipeline",
    "sdxl_base": "StableDiffusionXLPipeline",
}
ATTENTION = r"(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$"
PROJECTIONS = r"attentions\.\d+\.proj_(in|out)$"
EVERYTHING = r"(?<!final_layer_norm)$"


@dataclass(frozen=True)
class Factors:
    """What one module's change is made of."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float | None = None
    magnitude: torch.Tensor | None = None


Weights = Mapping[str, np.ndarray[Any, Any]]
LoraFactors = Mapping[str, Mapping[str, Factors]]


def random_lora(
    pipeline: Any,
    *,
    seed: int,
    modules: str = ATTENTION,
    components: Iterable[str] = COMPONENTS,
    rank: int = 3,
    alpha: float | None = None,
    dora: bool = False,
) -> dict[str, dict[str, Factors]]:
    """Factors for the modules that match, each change about a third of the weight.

    Args:
        alpha: of every module; the changes are as large whatever it is.
    """
    generator = torch.Generator().manual_seed(seed)
    lora: dict[str, dict[str, Factors]] = {}
    for component in components:
        network = getattr(pipeline, component, None)
        if network is None:
            continue
        lora[component] = {
            name: _factors(module, generator, rank, alpha, dora=dora)
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d) and re.search(modules, name)
        }
    return lora


def _factors(
    module: nn.Linear | nn.Conv2d, generator: torch.Generator, rank: int, alpha: float | None, *, dora: bool
) -> Factors:
    weight = module.weight.detach()
    down = torch.randn(rank, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], rank, *(1,) * (weight.ndim - 2), generator=generator)
    up *= 0.3 * weight.std() / (rank if alpha is None else alpha) ** 0.5
    norm = weight.flatten(1).norm(dim=1)
    magnitude = norm * (1 + 0.2 * torch.rand(norm.shape, generator=generator)) if dora else None
    return Factors(down, up, alpha, magnitude)


def kohya(lora: LoraFactors, names: Mapping[str, str] | None = None) -> dict[str, torch.Tensor]:
    """sd-scripts' keys.

    Args:
        names: of U-Net modules, for trainers of the original U-Net; default their names in diffusers.
    """
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
    if "text_encoder_2" in lora:
        prefixes["text_encoder"] = "lora_te1"
    tensors = {}
    for component, modules in lora.items():
        for module, factors in modules.items():
            if module.startswith("encoder."):
                module = f"text_model.{module}"
            name = (names or {}).get(module, module).replace(".", "_")
            key = f"{prefixes[component]}_{name}"
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = factors.down, factors.up
            if factors.alpha is not None:
                tensors[f"{key}.alpha"] = torch.tensor(float(factors.alpha))
            if factors.magnitude is not None:
                shape = (-1, *(1,) * (factors.down.ndim - 1))
                tensors[f"{key}.dora_scale"] = factors.magnitude.reshape(shape)
    return tensors


def diffusers_old(lora: LoraFactors) -> dict[str, torch.Tensor]:
    """diffusers' first keys, of attention processors; only attention has them."""
    renamed = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}
    tensors = {}
    for component, modules in lora.items():
        for module, factors in modules.items():
            stem, _, projection = module.removesuffix(".0").rpartition(".")
            key = f"{stem}.processor.{projection}_lora" if component == "unet" else f"{stem}.{renamed[projection]}"
            tensors[f"{component}.{key}.down.weight"] = factors.down
            tensors[f"{component}.{key}.up.weight"] = factors.up
    return tensors


def diffusers_new(lora: LoraFactors) -> dict[str, torch.Tensor]:
    """diffusers' keys of modules that hold their LoRA."""
    middle = {"unet": "lora", "text_encoder": "lora_linear_layer", "text_encoder_2": "lora_linear_layer"}
    return {
        f"{component}.{module}.{middle[component]}.{side}.weight": getattr(factors, side)
        for component, modules in lora.items()
        for module, factors in modules.items()
        for side in ("down", "up")
    }


def peft(lora: LoraFactors, *, base: str = "") -> dict[str, torch.Tensor]:
    """peft's keys, as diffusers has them now; of a text encoder it reads a magnitude only as `.weight`.

    Args:
        base: what peft itself puts before a module.
    """
    tensors = {}
    for component, modules in lora.items():
        for module, factors in modules.items():
            key = f"{component}.{base}{module}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = factors.down, factors.up
            if factors.magnitude is not None:
                conv = factors.down.ndim == 4
                magnitude = factors.magnitude.reshape(1, -1, 1, 1) if conv else factors.magnitude
                tensors[f"{key}.lora_magnitude_vector.weight"] = magnitude
    return tensors


def scaled(lora: LoraFactors) -> dict[str, dict[str, Factors]]:
    """The same LoRA with its alphas multiplied out."""
    return {
        component: {
            module: Factors(f.down, f.up if f.alpha is None else f.up * (f.alpha / len(f.down)), None, f.magnitude)
            for module, f in modules.items()
        }
        for component, modules in lora.items()
    }


def write(path: Path, tensors: Mapping[str, torch.Tensor], **metadata: Any) -> Path:
    """Write a file; metadata that is no text as JSON."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=texts)
    return path


def load_pipeline(family: str, path: Path) -> Any:
    """A fresh diffusers pipeline of a family, in float32."""
    with libraries_quiet():
        import diffusers

        return getattr(diffusers, CLASSES[family]).from_pretrained(path, local_files_only=True, safety_checker=None)


def parts_of(pipeline: Any, dtype: torch.dtype = torch.float32) -> dict[str, Part]:
    """The networks that a LoRA may change."""
    networks = {name: getattr(pipeline, name, None) for name in COMPONENTS}
    return {
        name: Part(
            name=name,
            origin=Path(name),
            config=dict(network.config) if name == "unet" else network.config.to_dict(),
            model_class=type(network).__name__,
            weights={key: of_array(value.to(dtype).clone().numpy()) for key, value in network.state_dict().items()},
            files={},
        )
        for name, network in networks.items()
        if network is not None
    }


def reference(pipeline: Any, files: Sequence[tuple[Path, float]]) -> dict[str, Weights]:
    """The networks' weights after diffusers has fused the files, in turn."""
    with libraries_quiet():
        for path, scale in files:
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
            pipeline.fuse_lora(lora_scale=scale)
            pipeline.unload_lora_weights()
    return {
        name: {key: value.numpy() for key, value in network.state_dict().items()}
        for name in COMPONENTS
        if (network := getattr(pipeline, name, None)) is not None
    }


def distance(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64)))
