"""Networks and single files in the original layout of Stable Diffusion, written from diffusers' models.

The names are derived here on their own, from diffusers' side; diffusers' converters read them back in the tests, so
that what is tested does not test itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentrt.export.published_configs import published_configs
from latentrt.export.weights import Values, Weight

State = dict[str, torch.Tensor]
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
SIMPLE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
ENCODERS = {
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "refiner": {"text_encoder_2": "conditioner.embedders.0.model."},
}
# Published structures with narrow levels: widths that 32 groups and heads of 64 channels divide.
NARROW: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {
        "unet": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 64},
        "text_encoder": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "num_hidden_layers": 3},
    },
    "sd2": {
        "unet": {
            "block_out_channels": [64, 64, 64, 128],
            "attention_head_dim": [1, 1, 1, 2],
            "cross_attention_dim": 64,
        },
        "text_encoder": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "num_hidden_layers": 3},
    },
    "sdxl": {
        "unet": {
            "block_out_channels": [64, 64, 128],
            "attention_head_dim": [1, 1, 2],
            "transformer_layers_per_block": [1, 2, 3],
            "cross_attention_dim": 128,
            "projection_class_embeddings_input_dim": 48 + 6 * 256,
        },
        "text_encoder": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 1,
            "num_hidden_layers": 2,
            "projection_dim": 64,
        },
        "text_encoder_2": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 1,
            "num_hidden_layers": 3,
            "projection_dim": 48,
        },
    },
    "refiner": {
        "unet": {
            "block_out_channels": [64, 64, 128, 128],
            "attention_head_dim": [1, 1, 2, 2],
            "transformer_layers_per_block": 2,
            "cross_attention_dim": 64,
            "projection_class_embeddings_input_dim": 48 + 5 * 256,
        },
        "text_encoder_2": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 1,
            "num_hidden_layers": 3,
            "projection_dim": 48,
        },
    },
}
VAE: dict[str, Any] = {"block_out_channels": [32, 32, 64, 64]}


def configs(family: str, **unet: Any) -> dict[str, dict[str, Any]]:
    """A family's published configs with narrow levels.

    Args:
        family: a key of NARROW.
        unet: other options of the U-Net.
    """
    published = {name: dict(config) for name, config in published_configs(family).items()}
    for part, narrow in {**NARROW[family], "vae": VAE}.items():
        published[part] |= narrow
    published["unet"] |= unet
    return published


def model(part: str, config: Mapping[str, Any], *, seed: int = 0) -> Any:
    """A network with random weights; every one of them is other than zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = _model(part, config).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return made


def meta_model(part: str, config: Mapping[str, Any]) -> Any:
    """A network without weights, of whatever size."""
    with torch.device("meta"):
        return _model(part, config)


def _model(part: str, config: Mapping[str, Any]) -> Any:
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    if part == "unet":
        return diffusers.UNet2DConditionModel(**options)
    if part == "vae":
        return diffusers.AutoencoderKL(**options)
    if part == "controlnet":
        return diffusers.ControlNetModel(**options)
    text = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    return text(CLIPTextConfig(**options))


def state_of(part: str, made: Any) -> State:
    """A network's weights by the names that published checkpoints have."""
    state: State = made.state_dict()
    if part == "text_encoder" and not any(name.startswith("text_model.") for name in state):
        state = {f"text_model.{name}": tensor for name, tensor in state.items()}
    return state


def to_ldm(part: str, state: State, config: Mapping[str, Any], *, open_clip: bool = False) -> State:
    """A network's weights by the original names, without a prefix."""
    if part in ("unet", "controlnet"):
        return {_unet_name(name, state, config["layers_per_block"]): tensor for name, tensor in state.items()}
    if part == "vae":
        return dict(_vae_entry(name, tensor, len(config["block_out_channels"])) for name, tensor in state.items())
    return _open_clip(state) if open_clip else dict(state)


def _unet_name(name: str, state: State, layers: int) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in SIMPLE:
        return f"{SIMPLE[stem]}.{kind}"
    if match := re.fullmatch(r"controlnet_down_blocks\.(\d+)", stem):
        return f"zero_convs.{match[1]}.0.{kind}"
    if match := re.fullmatch(r"controlnet_cond_embedding\.blocks\.(\d+)", stem):
        return f"input_hint_block.{2 * int(match[1]) + 2}.{kind}"
    if stem == "controlnet_cond_embedding.conv_out":
        blocks = sum(n.startswith("controlnet_cond_embedding.blocks.") and n.endswith("bias") for n in state)
        return f"input_hint_block.{2 * blocks + 2}.{kind}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", stem):
        number = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{number}.{RESNET.get(match[3], match[3])}.{kind}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", stem)
    assert match, name
    way, level, what, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if what == "downsamplers":
        return f"input_blocks.{(layers + 1) * (level + 1)}.0.op.{kind}"
    if what == "upsamplers":
        attends = any(n.startswith(f"up_blocks.{level}.attentions.") for n in state)
        return f"output_blocks.{(layers + 1) * level + layers}.{1 + attends}.conv.{kind}"
    block = (layers + 1) * level + layer + (way == "down")
    inner = RESNET.get(rest, rest) if what == "resnets" else rest
    return f"{'input' if way == 'down' else 'output'}_blocks.{block}.{int(what == 'attentions')}.{inner}.{kind}"


def _vae_entry(name: str, tensor: torch.Tensor, levels: int) -> tuple[str, torch.Tensor]:
    if match := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        convolution = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        return f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}", convolution
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d)", r"down.\1", name)
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    name = name.replace(".resnets.", ".block.")
    return name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample"), tensor


def _open_clip(state: State) -> State:
    layer = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    fixed = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    made: State = {}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            made["text_projection"] = tensor.T.contiguous()
        elif name in fixed:
            made[fixed[name]] = tensor
        elif match := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            block, inner, kind = f"transformer.resblocks.{match[1]}", match[2], match[3]
            if inner.endswith("q_proj"):
                others = [state[name.replace("q_proj", other)] for other in ("q_proj", "k_proj", "v_proj")]
                made[f"{block}.attn.in_proj_{kind}"] = torch.cat(others)
            elif inner.endswith("out_proj"):
                made[f"{block}.attn.out_proj.{kind}"] = tensor
            elif not inner.endswith(("k_proj", "v_proj")):
                made[f"{block}.{layer[inner]}.{kind}"] = tensor
    return made


def single_file_state(family: str, states: Mapping[str, State], published: Mapping[str, Mapping[str, Any]]) -> State:
    """All networks of a family as one file in the original layout holds them.

    Args:
        family: a key of NARROW.
        states: by component, with diffusers' and transformers' names.
        published: configs by component.
    """
    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", **ENCODERS[family]}
    return {
        prefix + name: tensor
        for part, prefix in prefixes.items()
        for name, tensor in to_ldm(part, states[part], published[part], open_clip=".model." in prefix).items()
    }


def family_states(family: str, published: Mapping[str, Mapping[str, Any]], *, seed: int = 0) -> dict[str, State]:
    """Random weights of a family's networks, by component."""
    parts = ("unet", "vae", *ENCODERS[family])
    return {part: state_of(part, model(part, published[part], seed=seed + number)) for number, part in enumerate(parts)}


def write_file(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write tensors as a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, dict(metadata or {}))
    return path


def write_single_file(folder: Path, path: Path, family: str, *, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a diffusers folder with safetensors weights as one file in the original layout.

    Args:
        folder: the checkpoint.
        path: of the file to write.
        family: a key of NARROW.
        metadata: of the file.
    """
    parts = ("unet", "vae", *ENCODERS[family])
    published = {part: json.loads((folder / part / "config.json").read_text()) for part in parts}
    states = {}
    for part in parts:
        stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
        state = load_file(folder / part / f"{stem}.safetensors")
        wrapped = part != "text_encoder" or any(name.startswith("text_model.") for name in state)
        states[part] = state if wrapped else {f"text_model.{name}": tensor for name, tensor in state.items()}
    return write_file(path, single_file_state(family, states, published), metadata)


def shapes_only(state: Mapping[str, torch.Tensor]) -> dict[str, Weight]:
    """Weights that have shapes and cannot be read, of models that are too large to make."""

    def read() -> Values:
        raise AssertionError("read")

    return {name: Weight(tuple(tensor.shape), np.dtype(np.float32), read) for name, tensor in state.items()}


def write_shapes(path: Path, shapes: Mapping[str, Sequence[int]]) -> Path:
    """Write a safetensors file of tensors that are all zero and take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return path
