from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from published_graphs import published_graph
from small_graphs import model_of

from latentrt.benchmarks.graph_flops import graph_work
from latentrt.export.attention_fusion import AttentionFusionPass
from latentrt.export.networks import libraries_quiet
from latentrt.runtime.errors import ExportError, UsageError

ROOT = Path(__file__).parents[2]
# The U-Net of Stable Diffusion 1.5 in fp16 as `latentrt export` writes it, without its external weights.
SD15_UNET = ROOT / "tests" / "export" / "sd15_unet.onnx.xz"
PARAMETERS = 859_520_964  # as published


def sd15_unet() -> ir.Model:
    return ir.from_proto(onnx.load_from_string(lzma.decompress(SD15_UNET.read_bytes())))


def unet_shapes(rows: int, pixels: int, width: int = 768) -> dict[str, tuple[int, ...]]:
    return {
        "sample": (rows, 4, pixels // 8, pixels // 8),
        "timestep": (rows,),
        "encoder_hidden_states": (rows, 77, width),
    }


@pytest.mark.parametrize(("pixels", "tera"), [(512, 0.803), (768, 2.148), (1024, 4.674)])
def test_stable_diffusions_unet_takes_what_is_published(pixels: int, tera: float) -> None:
    model = sd15_unet()
    work = graph_work(model, unet_shapes(1, pixels))
    assert work.flops / 1e12 == pytest.approx(tera, rel=0.001)
    assert work.weight_bytes == pytest.approx(2 * PARAMETERS, rel=1e-5)
    assert work.outputs == {"out_sample": ((1, 4, pixels // 8, pixels // 8), "float32")}
    if pixels == 512:
        guided = graph_work(model, unet_shapes(2, pixels))
        assert guided.flops == 2 * work.flops
        assert guided.activation_bytes == 2 * work.activation_bytes
        assert guided.weight_bytes == work.weight_bytes


# 10^12 operations of one row as they were published with the systems that compute them, by side in pixels.
PUBLISHED = [
    ("sd2_unet", 512, 0.804),
    ("sd2_unet", 768, 2.149),
    ("sd1_vae_decoder", 512, 2.514),
    ("sd1_vae_decoder", 768, 5.754),
    ("sd1_vae_decoder", 1024, 10.47),
    ("sd1_vae_encoder", 512, 1.117),
    ("sd1_vae_encoder", 1024, 4.879),
    ("sd1_text_encoder", 0, 0.0133),
    ("sd2_text_encoder", 0, 0.0451),
    ("sdxl_text_encoder_2", 0, 0.0979),
    ("sdxl_unet", 512, 1.589),
    ("sdxl_unet", 768, 3.641),
    ("sdxl_unet", 1024, 6.761),
]


@pytest.mark.parametrize(("name", "pixels", "tera"), PUBLISHED)
def test_networks_take_what_is_published(name: str, pixels: int, tera: float) -> None:
    model = published_graph(name)
    sizes = {"batch": 1, "sequence_length": 77, "height": pixels, "width": pixels}
    sizes |= {"latent_height": pixels // 8, "latent_width": pixels // 8}
    shapes = {
        str(value.name): [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape or ()]
        for value in model.graph.inputs
    }
    assert graph_work(model, shapes).flops / 1e12 == pytest.approx(tera, rel=0.005)


def torch_flops(component: str, checkpoint: Path, feeds: dict[str, tuple[int, ...]]) -> int:
    """PyTorch's own count of a network of the checkpoint, on the meta device."""
    with libraries_quiet():
        import torch
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from torch.utils.flop_counter import FlopCounterMode
        from transformers import CLIPTextConfig, CLIPTextModel

    meta: dict[str, Any] = {name: torch.zeros(shape, device="meta") for name, shape in feeds.items()}
    counting: Any = FlopCounterMode
    with torch.device("meta"), torch.no_grad(), counting(display=False) as counter:
        if component == "unet":
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(checkpoint / "unet"))(**meta)
        elif component == "vae_decoder":
            AutoencoderKL.from_config(AutoencoderKL.load_config(checkpoint / "vae")).decode(meta["latent_sample"])
        else:
            CLIPTextModel(CLIPTextConfig.from_pretrained(checkpoint / "text_encoder"))(meta["input_ids"].long())
    return int(counter.get_total_flops())


FEEDS: dict[str, dict[str, tuple[int, ...]]] = {
    "unet": unet_shapes(3, 128, 64),
    "vae_decoder": {"latent_sample": (2, 4, 16, 24)},
    "text_encoder": {"input_ids": (2, 77)},
}


@pytest.mark.parametrize("component", FEEDS)
def test_networks_take_what_pytorch_counts(component: str, shapes_bundle: Path, shapes_checkpoint: Path) -> None:
    model = ir.load(shapes_bundle / component / "model.onnx")
    feeds = FEEDS[component]
    assert graph_work(model, feeds).flops == torch_flops(component, shapes_checkpoint, feeds)


@pytest.mark.parametrize("component", FEEDS)
def test_half_precision_is_as_much_work_and_half_the_bytes(component: str, shapes_bundle: Path) -> None:
    feeds = FEEDS[component]
    full, half = (graph_work(ir.load(shapes_bundle / component / f"model{name}.onnx"), feeds) for name in ("", ".fp16"))
    assert half.flops == full.flops
    assert half.weight_bytes == pytest.approx(full.weight_bytes / 2, rel=1e-3)
    assert half.activation_bytes == pytest.approx(full.activation_bytes / 2, rel=0.02)


def test_fused_attention_is_as_much_work_as_written_out(shapes_bundle: Path) -> None:
    feeds = FEEDS["text_encoder"]
    model = ir.load(shapes_bundle / "text_encoder" / "model.onnx")
    plain = graph_work(model, feeds)
    assert AttentionFusionPass()(model).modified
    fused = graph_work(model, feeds)
    assert fused.flops == plain.flops
    # What the operator reads and writes is what is left of the written out one, whose scores do not count.
    assert fused.activation_bytes == pytest.approx(plain.activation_bytes, rel=0.001)
    assert fused.weight_bytes == pytest.approx(plain.weight_bytes, abs=100)  # the scales are attributes now


TABLE = """
g (int64[b,n] ids) => (float[b,n,4] out) {
    looked_up = Gather(table, ids)
    out = MatMul(looked_up, w)
}
"""


def test_of_a_table_only_the_rows_that_are_looked_up_are_read() -> None:
    reads: list[str] = []
    weights = {"table": np.ones((1000, 8), np.float32), "w": np.ones((8, 4), np.float32)}
    work = graph_work(model_of(TABLE, weights, reads=reads), {"ids": (2, 5)})
    assert work.weight_bytes == 4 * (2 * 5 * 8 + 8 * 4)
    assert work.activation_bytes == 4 * 2 * 5 * (8 + 4)
    assert graph_work(model_of(TABLE, weights), {"ids": (200, 10)}).weight_bytes == 4 * (1000 * 8 + 8 * 4)
    assert reads == []


QUANTIZED = """
g (float[b,8,6,6] x) => (float[b,16,6,6] out) {
    x_q = QuantizeLinear(x, s, zero) x_d = DequantizeLinear(x_q, s, zero)
    w_d = DequantizeLinear(w, s, zero)
    y = Conv<pads=[1, 1, 1, 1]>(x_d, w_d)
    y_q = QuantizeLinear(y, s, zero) y_d = DequantizeLinear(y_q, s, zero)
    v_d = DequantizeLinear(v, s, zero)
    out = Conv(y_d, v_d)
}
"""


def test_quantized_values_move_in_eight_bits() -> None:
    weights: dict[str, NDArray[Any]] = {
        "s": np.full((), 0.1, np.float32),
        "zero": np.zeros((), np.int8),
        "w": np.ones((16, 8, 3, 3), np.int8),
        "v": np.ones((16, 16, 1, 1), np.int8),
    }
    work = graph_work(model_of(QUANTIZED, weights), {"x": (2, 8, 6, 6)})
    pixels = 2 * 6 * 6
    assert work.flops == 2 * pixels * 16 * (8 * 9 + 16)
    assert work.weight_bytes == 16 * 8 * 9 + 16 * 16 + 4 + 1
    # Both inputs and what lies between in int8, the result in float32.
    assert work.activation_bytes == pixels * (8 + 16 + 16 + 4 * 16)


def test_scores_that_are_an_output_have_to_be_written() -> None:
    text = "g (float[n,4] q, float[4,m] k) => (float[n,m] out) { scores = MatMul(q, k) out = Softmax(scores) }"
    work = graph_work(model_of(text), {"q": (3, 4), "k": (4, 5)})
    assert work.activation_bytes == 4 * (3 * 4 + 4 * 5 + 3 * 5)


# How PyTorch's older exporter, and so optimum, expands a mask: to a size that is 1 where -1 is asked for.
EXPANDED = """
g (float[b,n,4] x, float[1,1,4] row) => (float[b,n,3] out) {
    size = Shape(x)
    rank = Shape(size)
    filled = ConstantOfShape<value = int64[1] {1}>(rank)
    kept = Mul(filled, minus)
    same = Equal(size, kept)
    target = Where(same, filled, size)
    y = Expand(row, target)
    out = MatMul(y, w)
}
"""


def test_shapes_that_are_computed_from_filled_constants_are_known() -> None:
    weights: dict[str, NDArray[Any]] = {
        "minus": np.full((), -1, np.int64),
        "w": np.ones((4, 3), np.float32),
    }
    model = model_of(EXPANDED, weights)
    for node in model.graph:
        for value in node.outputs:
            value.shape = value.shape if value.is_graph_output() else None
    assert graph_work(model, {"x": (2, 5, 4), "row": (1, 1, 4)}).flops == 2 * 2 * 5 * 4 * 3


@pytest.mark.parametrize("shapes", [{}, {"ids": (2,)}, {"ids": (2, 5, 1)}])
def test_shapes_that_are_not_the_inputs_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    weights = {"table": np.ones((10, 8), np.float32), "w": np.ones((8, 4), np.float32)}
    with pytest.raises(UsageError, match="ids: expected a shape of 2"):
        graph_work(model_of(TABLE, weights), shapes)


def test_sizes_that_contradict_each_other_are_refused() -> None:
    text = "g (float[b,4] x, float[b,4] y) => (float[b,4] out) { out = Add(x, y) }"
    with pytest.raises(UsageError, match="y: expected a shape that fits"):
        graph_work(model_of(text), {"x": (2, 4), "y": (3, 4)})


def test_a_shape_that_depends_on_values_is_an_error() -> None:
    with pytest.raises(ExportError, match="out"):
        graph_work(model_of("g (float[b] x) => (int64[1,k] out) { out = NonZero(x) }"), {"x": (4,)})
