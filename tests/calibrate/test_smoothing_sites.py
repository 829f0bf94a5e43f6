from __future__ import annotations

import lzma
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attention_graphs import attention_graph
from small_graphs import model_of

from latentrt.calibrate.layers import graph_layers, kind_of
from latentrt.calibrate.smoothing_sites import Site, Stretch, sites_of, smoothing_sites

GRAPH = Path(__file__).parents[1] / "export" / "sd15_unet.onnx.xz"
SIZES = {"batch": 1, "latent_height": 64, "latent_width": 64, "sequence_length": 77}
EYE, HALF = np.eye(4, dtype=np.float32), np.ones((4, 8), np.float32)
ONES, WIDE = np.ones(4, np.float32), np.ones(8, np.float32)
PLANE = np.ones((4, 1, 1), np.float32)
CONV = np.ones((4, 4, 1, 1), np.float32)
MOVES = "integers = Constant<value_ints = [0, -1, 4]>()"


def site(nodes: str, *, group: str = "w", inputs: str = "float[b,n,4] x", outputs: str = "float[b,n,4] y") -> Site:
    """The site of one group of a graph of these nodes, which may read weights of 4 channels by these names."""
    weights = {"w": EYE, "w2": EYE, "gain": ONES, "shift": ONES, "plane": PLANE, "plane2": PLANE, "conv": CONV}
    weights |= {"up": HALF, "up_bias": WIDE}
    used = {name: values for name, values in weights.items() if f"{name}," in nodes or f"{name})" in nodes}
    return sites_of(model_of(f"net ({inputs}) => ({outputs}) {{ {nodes} }}", used))[group]


def test_every_group_of_stable_diffusion_has_the_site_that_its_place_allows() -> None:
    model = ir.from_proto(onnx.load_from_string(lzma.decompress(GRAPH.read_bytes())))
    sites = smoothing_sites(model, graph_layers(model, SIZES))
    found = Counter((kind_of(group), own.how) for group, own in sites.items())
    blocks = {
        ("proj_in", "norm"): 16,
        ("attn1.to_q", "norm"): 16,
        ("attn2.to_q", "norm"): 16,
        ("ff.net.0", "norm"): 16,
        ("attn1.to_out", "value"): 16,
        ("attn2.to_out", "value"): 16,
        ("ff.net.2", "geglu"): 16,
        ("proj_out", "mul"): 16,
        ("resnet.conv1", "mul"): 22,
        ("resnet.conv2", "mul"): 22,
        ("downsampler", "mul"): 3,
        ("upsampler", "mul"): 3,
        # On the way up all read a skip connection.
        ("conv_shortcut", "split"): 12,
        ("conv_shortcut", "mul"): 2,
    }
    assert {key: count for key, count in found.items() if key[0] != "attn2.to_k"} == blocks
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    value, gated = sites[f"{block}.attn1.to_out.0.weight"], sites[f"{block}.ff.net.2.weight"]
    assert value == Site("value", 1280, (Stretch(f"{block}.attn1.to_v.weight", 1),))
    assert gated == Site(
        "geglu", 5120, (Stretch(f"{block}.ff.net.0.proj.weight", 1), Stretch(f"{block}.ff.net.0.proj.bias", 0))
    )
    last = sites["unet.up_blocks.3.resnets.2.conv_shortcut.weight"]
    assert (last.channels, last.branches) == (640, (320, 320))


def test_the_inputs_of_a_graph_are_not_divided() -> None:
    model = model_of("net (float[b,n,4] text) => (float[b,n,4] y) { y = MatMul(text, w) }", {"w": EYE})
    assert sites_of(model) == {}


def test_a_layer_norm_takes_the_division_of_all_that_reads_it() -> None:
    norm = "n = LayerNormalization<axis=-1>(x, gain, shift)"
    both = (Stretch("gain", 0), Stretch("shift", 0))
    assert site(f"{norm} a = MatMul(n, w) c = MatMul(n, w2) y = Add(a, c)") == Site("norm", 4, both)
    assert site("n = LayerNormalization<axis=-1>(x, gain) y = MatMul(n, w)") == Site("norm", 4, both[:1])


@pytest.mark.parametrize(
    "nodes",
    [
        # Something else reads it.
        "n = LayerNormalization<axis=-1>(x, gain, shift) a = MatMul(n, w) y = Add(a, n)",
        # Something else reads its scale.
        "n = LayerNormalization<axis=-1>(x, gain, shift) o = Mul(x, gain) a = MatMul(n, w) y = Add(a, o)",
        # What lies between is no move.
        "n = LayerNormalization<axis=-1>(x, gain, shift) s = Sigmoid(n) y = MatMul(s, w)",
        # A feed-forward without a gate.
        "a = MatMul(x, w2) c = Add(a, shift) g = Gelu(c) y = MatMul(g, w)",
        # SiLU, a product with itself.
        "a = MatMul(x, w2) s = Sigmoid(a) g = Mul(a, s) y = MatMul(g, w)",
    ],
)
def test_what_no_weight_can_take_needs_a_multiplication(nodes: str) -> None:
    assert site(nodes) == Site("mul", 4)


GROUP_NORM = "m = Mul(x, plane) n = Add(m, plane2)"
PICTURE = "float[b,4,h,k] x"


def test_a_group_norms_own_scale_and_bias_take_it_through_moves() -> None:
    divided = (Stretch("plane", 0), Stretch("plane2", 0))
    assert site(f"{GROUP_NORM} y = Conv(n, conv)", group="conv", inputs=PICTURE, outputs="float[b,4,h,k] y") == Site(
        "norm", 4, divided
    )
    assert site(
        f"{GROUP_NORM} t = Transpose<perm=[0,2,3,1]>(n) i = Constant<value_ints=[0,-1,4]>() r = Reshape(t, i) "
        "y = MatMul(r, w)",
        inputs="float[1,4,2,3] x",
    ) == Site("norm", 4, divided)


def test_a_move_that_mixes_channels_stops_the_search() -> None:
    # Rows of four that are no channels: the last axis is the picture's width.
    nodes = f"{GROUP_NORM} i = Constant<value_ints=[0,-1,4]>() r = Reshape(n, i) y = MatMul(r, w)"
    assert site(nodes, inputs="float[1,4,3,4] x") == Site("mul", 4)
    turned = f"{GROUP_NORM} t = Transpose<perm=[0,2,1,3]>(n) y = Conv(t, conv)"
    assert site(turned, group="conv", inputs="float[1,4,4,4] x", outputs="float[1,4,4,4] y") == Site("mul", 4)


@pytest.mark.parametrize(("kept", "gate", "start"), [(0, 1, 0), (1, 0, 4)])
def test_the_part_that_is_gated_is_divided_wherever_it_lies(kept: int, gate: int, start: int) -> None:
    nodes = (
        "a = MatMul(x, up) c = Add(a, up_bias) h0, h1 = Split<axis=-1, num_outputs=2>(c) "
        f"g = Gelu(h{gate}) m = Mul(h{kept}, g) y = MatMul(m, w)"
    )
    assert site(nodes) == Site("geglu", 4, (Stretch("up", 1, start), Stretch("up_bias", 0, start)))


def test_a_gated_part_that_something_else_reads_is_left_alone() -> None:
    nodes = (
        "a = MatMul(x, up) h0, h1 = Split<axis=-1, num_outputs=2>(a) g = Gelu(h1) m = Mul(h0, g) "
        "o = MatMul(m, w) y = Add(o, h0)"
    )
    assert site(nodes) == Site("mul", 4)


@pytest.mark.parametrize("biases", [False, True])
def test_values_of_an_attention_take_the_division_of_what_it_puts_out(biases: bool) -> None:
    model, _ = attention_graph(biases=biases)
    divided = (Stretch("block.attn.to_v.weight", 1), *((Stretch("block.attn.to_v.bias", 0),) if biases else ()))
    assert sites_of(model)["block.attn.to_out.weight"] == Site("value", 16, divided)


def test_values_that_something_else_reads_are_left_alone() -> None:
    model, _ = attention_graph()
    values = next(node for node in model.graph if node.outputs[0].name == "v_heads").outputs[0]
    other = ir.node("Neg", [values])
    model.graph.append(other)
    model.graph.outputs.append(other.outputs[0])
    assert sites_of(model)["block.attn.to_out.weight"].how == "mul"


def test_a_concatenation_of_channels_is_split_and_one_of_others_is_not() -> None:
    picture = "float[b,2,h,k] x, float[b,2,h,k] z"
    nodes = "c = Concat<axis={}>({}) y = Conv(c, conv)"
    one = site(nodes.format(1, "x, z"), group="conv", inputs=picture, outputs="float[b,4,h,k] y")
    assert one == Site("split", 4, branches=(2, 2))
    tall = "float[b,4,h,k] x, float[b,4,h,k] z"
    assert site(nodes.format(2, "x, z"), group="conv", inputs=tall, outputs="float[b,4,j,k] y") == Site("mul", 4)
