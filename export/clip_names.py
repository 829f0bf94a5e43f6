"""The names that CLIP text encoders have in single files, and in transformers.

Single files hold two kinds. OpenAI's encoder (Stable Diffusion 1, the first of SDXL) has transformers' names behind a
prefix, with or without `text_model.`. OpenCLIP's (Stable Diffusion 2, the second of SDXL) has its own, with the three
projections of an attention layer in one matrix, and the text projection transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .weight_shapes import shape_of
from .weights import Values, Weight, Weights, changed

_HEAD_WIDTH = 64  # of all published encoders
_LAYER = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def clip_layers(weights: Weights) -> int:
    """Layers of a text encoder, of either kind."""
    numbers = (re.search(r"(?:encoder\.layers|resblocks)\.(\d{1,2})\.", name) for name in weights)
    return max((int(match[1]) + 1 for match in numbers if match), default=0)


def clip_names(layers: int, *, wrapped: bool) -> dict[str, str]:
    """All weights of OpenAI's encoder: transformers' name -> the one in the file.

    Args:
        wrapped: whether the file's names have `text_model.`; those of old trainers do not.
    """
    parts = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight"]
    modules = ["final_layer_norm"]
    for layer in range(layers):
        modules += [f"encoder.layers.{layer}.{module}" for module in _LAYER.values()]
        modules += [f"encoder.layers.{layer}.self_attn.{projection}" for projection in _PROJECTIONS]
    parts += [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    return {f"text_model.{part}": f"text_model.{part}" if wrapped else part for part in parts}


def open_clip_names(layers: int, *, projected: bool) -> dict[str, str]:
    """All weights of OpenCLIP's encoder: transformers' name -> the one in the file.

    Args:
        projected: whether the network has the text projection.
    """
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    if projected:
        names["text_projection.weight"] = "text_projection"
    for layer in range(layers):
        own, original = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            names |= {f"{own}.{here}.{kind}": f"{original}.{there}.{kind}" for there, here in _LAYER.items()}
            for projection in _PROJECTIONS:
                names[f"{own}.self_attn.{projection}.{kind}"] = f"{original}.attn.in_proj_{kind}"
    return names


def open_clip_weight(name: str, weight: Weight) -> Weight:
    """A weight of OpenCLIP's encoder as transformers has it.

    Args:
        name: transformers'.
    """
    if name == "text_projection.weight":
        return changed(weight, lambda values: values.T, weight.shape[::-1])
    projection = name.split(".")[-2]
    if projection not in _PROJECTIONS:
        return weight
    width = weight.shape[0] // 3
    first = _PROJECTIONS.index(projection) * width

    def rows(values: Values) -> Values:
        return values[first : first + width]

    return changed(weight, rows, (width, *weight.shape[1:]))


def clip_config(layers: int, weights: Weights, published: Mapping[str, Any], origin: Path) -> dict[str, Any]:
    """The config of a text encoder.

    Args:
        weights: by transformers' names.
        published: config of an encoder of the family, for what weights do not show, such as the activation.
        origin: where the weights came from, for messages.

    Raises:
        ArtifactError: weights that it is read from are missing.
    """
    vocabulary, width = shape_of(weights, "text_model.embeddings.token_embedding.weight", 2, origin)
    inner = "text_model.encoder.layers.0.mlp.fc1.bias"
    positions = "text_model.embeddings.position_embedding.weight"
    projected = "text_projection.weight"
    return {
        **published,
        "hidden_size": width,
        "intermediate_size": shape_of(weights, inner, 1, origin)[0],
        "max_position_embeddings": shape_of(weights, positions, 2, origin)[0],
        "num_attention_heads": max(width // _HEAD_WIDTH, 1),
        "num_hidden_layers": layers,
        **({"projection_dim": shape_of(weights, projected, 2, origin)[0]} if projected in weights else {}),
        "vocab_size": vocabulary,
    }
