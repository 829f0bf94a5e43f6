"""The names that U-Nets and ControlNets have in diffusers and in the original implementation (CompVis' LDM).

Each function lists all weights of a network: diffusers' name -> the original one. The original numbers what follows
what (`input_blocks.4.1`: the fifth step on the way down, its second layer), diffusers levels and layers.
"""

from __future__ import annotations

from collections.abc import Iterator

from .unet_structure import UnetStructure

Pairs = Iterator[tuple[str, str]]

_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "out_layers.0": "norm2", "out_layers.3": "conv2"}


def unet_names(structure: UnetStructure) -> dict[str, str]:
    """All weights of a U-Net."""
    names = dict(_way_down(structure))
    block = 0
    for level, depths in enumerate(structure.up):
        for layer, depth in enumerate(depths):
            original, own = f"output_blocks.{block}", f"up_blocks.{level}"
            names.update(_resnet(f"{original}.0", f"{own}.resnets.{layer}", shortcut=True))
            names.update(_attention(f"{original}.1", f"{own}.attentions.{layer}", depth))
            if layer == len(depths) - 1 and level < len(structure.up) - 1:
                names.update(weight_and_bias(f"{original}.{2 if depth else 1}.conv", f"{own}.upsamplers.0.conv"))
            block += 1
    names.update(weight_and_bias("out.0", "conv_norm_out"))
    names.update(weight_and_bias("out.2", "conv_out"))
    return names


def controlnet_names(structure: UnetStructure, *, hints: int) -> dict[str, str]:
    """All weights of a ControlNet.

    Args:
        hints: convolutions that the picture goes through before it meets the latents: 8 of every known one.
    """
    names = dict(_way_down(structure))
    outputs = sum(map(len, structure.down)) + len(structure.down)
    for output in range(outputs):
        names.update(weight_and_bias(f"zero_convs.{output}.0", f"controlnet_down_blocks.{output}"))
    names.update(weight_and_bias("middle_block_out.0", "controlnet_mid_block"))
    embedding = ["conv_in", *(f"blocks.{number}" for number in range(hints - 2)), "conv_out"]
    for number, layer in enumerate(embedding):
        # Between the convolutions are activations, which count too.
        names.update(weight_and_bias(f"input_hint_block.{2 * number}", f"controlnet_cond_embedding.{layer}"))
    return names


def weight_and_bias(original: str, own: str) -> Pairs:
    """The two weights of a layer, by both of its names."""
    for kind in ("weight", "bias"):
        yield f"{own}.{kind}", f"{original}.{kind}"


def _way_down(structure: UnetStructure) -> Pairs:
    """What U-Nets and ControlNets share: embeddings, the way down and the middle."""
    yield from weight_and_bias("input_blocks.0.0", "conv_in")
    for number, own in ((0, "linear_1"), (2, "linear_2")):
        yield from weight_and_bias(f"time_embed.{number}", f"time_embedding.{own}")
        if structure.added:
            yield from weight_and_bias(f"label_emb.0.{number}", f"add_embedding.{own}")
    block = 1
    for level, depths in enumerate(structure.down):
        widens = level > 0 and structure.channels[level - 1] != structure.channels[level]
        for layer, depth in enumerate(depths):
            original, own = f"input_blocks.{block}", f"down_blocks.{level}"
            yield from _resnet(f"{original}.0", f"{own}.resnets.{layer}", shortcut=widens and layer == 0)
            yield from _attention(f"{original}.1", f"{own}.attentions.{layer}", depth)
            block += 1
        if level < len(structure.down) - 1:
            yield from weight_and_bias(f"input_blocks.{block}.0.op", f"down_blocks.{level}.downsamplers.0.conv")
            block += 1
    if structure.mid is not None:
        yield from _resnet("middle_block.0", "mid_block.resnets.0", shortcut=False)
    if structure.mid:
        yield from _attention("middle_block.1", "mid_block.attentions.0", structure.mid)
        yield from _resnet("middle_block.2", "mid_block.resnets.1", shortcut=False)


def _resnet(original: str, own: str, *, shortcut: bool) -> Pairs:
    for there, here in _RESNET.items():
        yield from weight_and_bias(f"{original}.{there}", f"{own}.{here}")
    yield from weight_and_bias(f"{original}.emb_layers.1", f"{own}.time_emb_proj")
    if shortcut:
        yield from weight_and_bias(f"{original}.skip_connection", f"{own}.conv_shortcut")


def _attention(original: str, own: str, depth: int) -> Pairs:
    """Transformer blocks between two projections, of the same names in both; nothing for no blocks."""
    layers = ["norm", "proj_in", "proj_out"] if depth else []
    matrices = []
    for number in range(depth):
        block = f"transformer_blocks.{number}"
        layers += [f"{block}.{layer}" for layer in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")]
        for attention in (f"{block}.attn1", f"{block}.attn2"):
            layers.append(f"{attention}.to_out.0")
            matrices += [f"{attention}.{matrix}.weight" for matrix in ("to_q", "to_k", "to_v")]
    for layer in layers:
        yield from weight_and_bias(f"{original}.{layer}", f"{own}.{layer}")
    for matrix in matrices:
        yield f"{own}.{matrix}", f"{original}.{matrix}"
