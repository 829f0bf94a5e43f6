"""One attention as a small graph, with PyTorch's result, and the U-Nets of whole families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx_ir as ir
import torch
from small_graphs import model_of
from torch import nn

from latentrt.export.weights import Values

FAMILIES = ["sd15", "sd21", "sdxl_base", "sdxl_refiner"]
HEADS, WIDTH, TEXT = 2, 8, 6
INNER = HEADS * WIDTH


def attention_graph(
    *, cross: bool = False, biases: bool = False, mask: bool = False, reads: list[str] | None = None, scale: float = 0.6
) -> tuple[ir.Model, dict[str, Values]]:
    """Attention in the exporter's form, its queries and keys scaled by `scale` each, and its weights.

    x is (b, n, 16), with a text (b, m, 6) if `cross`; the weights are `block.attn.to_q.weight` and so on.
    """
    rng = np.random.default_rng(0)
    source, width = ("text", TEXT) if cross else ("x", INNER)
    sizes = {"q": (INNER, INNER), "k": (width, INNER), "v": (width, INNER), "out": (INNER, INNER)}
    weights: dict[str, Values] = {
        f"to_{name}_weight": rng.standard_normal(size, np.float32) / 4 for name, size in sizes.items()
    }
    for name in "qkv" if biases else "":
        weights[f"to_{name}_bias"] = rng.standard_normal(INNER, np.float32)

    def projected(name: str, value: str) -> str:
        if not biases:
            return f"{name} = MatMul({value}, to_{name}_weight)"
        return f"{name}_product = MatMul({value}, to_{name}_weight) {name} = Add({name}_product, to_{name}_bias)"

    inputs = "float[b,n,16] x" + (", float[b,m,6] text" if cross else "") + (", float[m] mask" if mask else "")
    model = model_of(
        f"""<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => (float[b,n,16] out)
        <int64[4] heads = {{0, -1, {HEADS}, {WIDTH}}}, int64[3] merged = {{0, -1, {INNER}}}, float s = {{{scale}}}>
        {{
            {projected("q", "x")} {projected("k", source)} {projected("v", source)}
            q_split = Reshape(q, heads) k_split = Reshape(k, heads) v_split = Reshape(v, heads)
            q_heads = Transpose<perm=[0, 2, 1, 3]>(q_split) k_heads = Transpose<perm=[0, 2, 3, 1]>(k_split)
            v_heads = Transpose<perm=[0, 2, 1, 3]>(v_split)
            q_scaled = Mul(q_heads, s) k_scaled = Mul(k_heads, s)
            scores = MatMul(q_scaled, k_scaled)
            {"masked = Add(scores, mask)" if mask else ""}
            weights = Softmax<axis=-1>({"masked" if mask else "scores"})
            context = MatMul(weights, v_heads)
            turned = Transpose<perm=[0, 2, 1, 3]>(context) joined = Reshape(turned, merged)
            out = MatMul(joined, to_out_weight)
        }}""",
        weights,
        reads=reads,
    )
    named = {}
    for name, values in weights.items():
        parameter = "block.attn." + name.replace("_weight", ".weight").replace("_bias", ".bias")
        model.graph.initializers[name].name = parameter
        named[parameter] = values
    return model, named


def feeds_of(model: ir.Model) -> dict[str, Values]:
    """Values for the inputs of an `attention_graph`."""
    rng, sizes = np.random.default_rng(1), {"x": (3, 5, INNER), "text": (3, 7, TEXT), "mask": (5,)}
    if any(value.name == "text" for value in model.graph.inputs):
        sizes["mask"] = (7,)
    names = [str(value.name) for value in model.graph.inputs]
    return {name: rng.standard_normal(sizes[name], np.float32) for name in names}


def attention_oracle(weights: dict[str, Values], feeds: dict[str, Values], *, scale: float = 0.6) -> Any:
    """The same by PyTorch."""
    tensors = {name: torch.from_numpy(values) for name, values in feeds.items()}
    source = tensors.get("text", tensors["x"])

    def heads(name: str, value: torch.Tensor) -> torch.Tensor:
        bias = weights.get(f"block.attn.to_{name}.bias")
        layer = torch.from_numpy(weights[f"block.attn.to_{name}.weight"].T)
        linear: torch.Tensor = nn.functional.linear(value, layer, None if bias is None else torch.from_numpy(bias))
        return linear.reshape(*value.shape[:2], HEADS, WIDTH).transpose(1, 2)

    context = nn.functional.scaled_dot_product_attention(
        heads("q", tensors["x"]),
        heads("k", source),
        heads("v", source),
        attn_mask=tensors.get("mask"),
        scale=scale**2,
    )
    joined = context.transpose(1, 2).flatten(2)
    return nn.functional.linear(joined, torch.from_numpy(weights["block.attn.to_out.weight"].T)).numpy()


def torch_unet(checkpoint: Path) -> Any:
    """A checkpoint's U-Net in diffusers."""
    return diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval()


def unet_feeds(unet: Any, rows: int = 2) -> dict[str, Values]:
    """Values for a U-Net's inputs; latents of 9 by 7."""
    rng, config = np.random.default_rng(2), unet.config
    feeds = {
        "sample": rng.standard_normal((rows, config.in_channels, 9, 7), np.float32),
        "timestep": np.linspace(10, 900, rows, dtype=np.float32),
        "encoder_hidden_states": rng.standard_normal((rows, 77, config.cross_attention_dim), np.float32),
    }
    if config.addition_embed_type:
        pooled = 32
        ids = (config.projection_class_embeddings_input_dim - pooled) // config.addition_time_embed_dim
        feeds["text_embeds"] = rng.standard_normal((rows, pooled), np.float32)
        feeds["time_ids"] = np.full((rows, ids), 64, np.float32)
    return feeds


def unet_oracle(unet: Any, feeds: dict[str, Values]) -> Any:
    """The U-Net's prediction by diffusers."""
    tensors = {name: torch.from_numpy(values) for name, values in feeds.items()}
    main = [tensors.pop(name) for name in ("sample", "timestep", "encoder_hidden_states")]
    with torch.no_grad():
        return unet(*main, added_cond_kwargs=tensors or None).sample.numpy()


def relative_l2(reference: Any, found: Any) -> float:
    """‖found - reference‖ / ‖reference‖."""
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
