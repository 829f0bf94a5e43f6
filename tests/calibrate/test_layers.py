from __future__ import annotations

import lzma
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import diffusers
import families
import onnx
import onnx_ir as ir
import pytest
import torch
from small_graphs import model_of
from torch import nn

from latentrt.calibrate.layers import OTHER, Layer, graph_layers, groups, kind_of, layer_modules
from latentrt.export.networks import libraries_quiet
from latentrt.export.unet import UNet
from latentrt.export.vae import VaeDecoder
from latentrt.runtime.errors import CalibrationError

GRAPH = Path(__file__).parents[1] / "export" / "sd15_unet.onnx.xz"
SIZES = {"batch": 1, "latent_height": 64, "latent_width": 64, "sequence_length": 77}
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 2,
}
FAMILIES = ("SD_UNET", "SD21_UNET", "SDXL_UNET", "REFINER_UNET", "BK_TINY_UNET", "SSD_1B_UNET", "KOALA_UNET")


def on_meta(**config: Any) -> nn.Module:
    with libraries_quiet(), torch.device("meta"):
        unet: nn.Module = diffusers.UNet2DConditionModel(**config)
    return unet


@pytest.fixture(scope="module")
def graph() -> ir.Model:
    return ir.from_proto(onnx.load_from_string(lzma.decompress(GRAPH.read_bytes())))


@pytest.fixture(scope="module")
def layers(graph: ir.Model) -> tuple[Layer, ...]:
    return graph_layers(graph, SIZES)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return on_meta(cross_attention_dim=768)


def test_macs_are_those_published_of_stable_diffusion(layers: tuple[Layer, ...]) -> None:
    # 0.803 TMAC for two rows, 15.6 % of it attention's products without weights.
    assert 2 * sum(layer.macs for layer in layers) == pytest.approx(0.803e12 * (1 - 0.156), rel=2e-3)
    shares: defaultdict[str, float] = defaultdict(float)
    for layer in layers:
        shares[layer.kind] += 2 * layer.macs / 0.803e12 * 100
    for kinds, share in {
        ("resnet.conv1", "resnet.conv2"): 40.6,
        ("upsampler", "downsampler"): 9.2,
        ("ff.net.0",): 12.7,
        ("ff.net.2",): 6.4,
        ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out"): 6.4,
        ("attn2.to_q", "attn2.to_out"): 3.2,
        ("attn2.to_k", "attn2.to_v"): 0.4,
        ("conv_shortcut",): 2.2,
        ("proj_in", "proj_out"): 3.2,
    }.items():
        # Published to a tenth, of a total to a thousandth.
        assert sum(shares[kind] for kind in kinds) == pytest.approx(share, abs=0.05 + share * 0.0005 / 0.803), kinds
    assert sum(layer.share for layer in layers) == pytest.approx(1)


def test_layers_are_the_modules_of_the_same_weights(layers: tuple[Layer, ...], unet: nn.Module) -> None:
    modules = layer_modules(layers, UNet(unet))
    assert list(modules) == [layer.name for layer in layers]
    paths = {module: path for path, module in unet.named_modules()}
    weighted = [path for path, module in unet.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert sorted(paths[module] for module in modules.values()) == sorted(weighted)
    for name, module in modules.items():
        assert name == f"unet.{paths[module]}.weight"


def test_groups_are_what_reads_one_tensor(layers: tuple[Layer, ...]) -> None:
    found = groups(layers)
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    assert [layer.name for layer in found[f"{block}.attn1.to_q.weight"]] == [
        f"{block}.attn1.to_{x}.weight" for x in "qkv"
    ]
    # The text, whichever block reads it, and the time.
    sizes = Counter(len(members) for members in found.values())
    assert sizes == {1: 282 - 16 * 3 - 32 - 22, 3: 16, 32: 1, 22: 1}
    text = next(members for members in found.values() if len(members) == 32)
    assert {layer.kind for layer in text} == {"attn2.to_k", "attn2.to_v"}
    # This graph is in half precision, into which it casts the text first.
    assert {layer.input for layer in text} == {"encoder_hidden_states_f16"}


def test_only_layers_with_int8_kernels_can_be_quantized(layers: tuple[Layer, ...]) -> None:
    left_out = {layer.kind for layer in layers if not layer.quantizable}
    assert left_out == {"conv_in", "conv_out", "time_embedding", "time_emb_proj"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_family_has_a_kind(family: str) -> None:
    names = [
        f"unet.{name}"
        for name, values in on_meta(**getattr(families, family)).named_parameters()
        if name.endswith(".weight") and values.ndim > 1
    ]
    kinds = Counter(kind_of(name) for name in names)
    assert OTHER not in kinds
    assert kinds["attn1.to_q"] == kinds["attn2.to_v"] == kinds["ff.net.2"] > 0
    assert ("add_embedding" in kinds) == (family in {"SDXL_UNET", "REFINER_UNET", "SSD_1B_UNET", "KOALA_UNET"})


def test_every_layer_of_a_decoder_has_a_kind() -> None:
    with libraries_quiet(), torch.device("meta"):
        decoder = VaeDecoder(diffusers.AutoencoderKL(block_out_channels=(32, 64), **BLOCKS))
    names = [f"{path}.weight" for path, module in decoder.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert Counter(map(kind_of, names)) == {
        "post_quant_conv": 1,
        "conv_in": 1,
        "conv_out": 1,
        # Two of the middle block, three of each level; the second level has half the channels.
        "resnet.conv1": 8,
        "resnet.conv2": 8,
        "conv_shortcut": 1,
        "upsampler": 1,
        **{f"attention.to_{x}": 1 for x in ("q", "k", "v", "out")},
    }


def test_names_that_only_look_alike_have_no_kind() -> None:
    assert kind_of("unet.time_embedding.cond_proj.weight") == "time_embedding"
    for name in ("unet.preconv_in.weight", "unet.conv_in.bias", "unet.class_embedding.linear_1.weight"):
        assert kind_of(name) == OTHER


def test_a_layer_on_one_side_alone_is_named(layers: tuple[Layer, ...], unet: nn.Module) -> None:
    with pytest.raises(CalibrationError, match=r"got 1 missing in the graph: unet\.time_embedding\.linear_1\.weight\."):
        layer_modules(layers[1:], UNet(unet))
    with pytest.raises(CalibrationError, match=r"\d+ without a module: unet\.mid_block\.\S+, unet\.mid_block"):
        layer_modules(layers, UNet(on_meta(cross_attention_dim=768, mid_block_type=None)))
    with pytest.raises(CalibrationError, match=r"32 of another shape: .*attn2\.to_k\.weight"):
        layer_modules(layers, UNet(on_meta(cross_attention_dim=1024)))


def test_graphs_without_weighted_layers_are_refused() -> None:
    with pytest.raises(CalibrationError, match="net: expected Conv and MatMul nodes with weights, found none"):
        graph_layers(model_of("net (float[b,4] x) => (float[b,4] y) { y = Relu(x) }"), {"b": 1})
