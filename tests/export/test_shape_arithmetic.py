from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.testing import assert_array_equal
from small_graphs import counts, model_of, outputs_of, run
from tiny import COMPONENTS

from latentrt.export.shape_arithmetic import ShapeArithmeticPass, shape_nodes
from latentrt.export.weights import Values

RNG = np.random.default_rng(0)
# What the exporter writes of a transformer block, a halving, a block below it and a Resize back.
BLOCKS = """
g (float[batch,32,latent_height,latent_width] sample) => (float[batch,32,a,b] out) {
    batch = Shape<start=0, end=1>(sample)
    height = Shape<start=2, end=3>(sample)
    h = Squeeze(height)
    width = Shape<start=3, end=4>(sample)
    w = Squeeze(width)
    area = Mul(h, w)
    areas = Reshape<allowzero=0>(area, to_vector)
    to_tokens = Concat<axis=0>(batch, areas, channels)
    channels_last = Transpose<perm=[0, 2, 3, 1]>(sample)
    tokens = Reshape<allowzero=1>(channels_last, to_tokens)
    to_heads = Concat<axis=0>(batch, to_vector, four, eight)
    split = Reshape<allowzero=1>(tokens, to_heads)
    heads = Transpose<perm=[0, 2, 1, 3]>(split)
    joined = Transpose<perm=[0, 2, 1, 3]>(heads)
    mixed = Reshape<allowzero=1>(joined, to_tokens)
    to_picture = Concat<axis=0>(batch, height, width, channels)
    picture = Reshape<allowzero=1>(mixed, to_picture)
    upper = Transpose<perm=[0, 3, 1, 2]>(picture)
    below = Conv<kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]>(upper, kernel)
    h_less = Add(minus, h)
    h_half = Div(h_less, two)
    h_below = Add(h_half, one)
    h_vector = Reshape(h_below, to_vector)
    w_less = Add(minus, w)
    w_half = Div(w_less, two)
    w_below = Add(w_half, one)
    w_vector = Reshape(w_below, to_vector)
    area_below = Mul(h_below, w_below)
    areas_below = Reshape(area_below, to_vector)
    to_tokens_below = Concat<axis=0>(batch, areas_below, channels)
    last_below = Transpose<perm=[0, 2, 3, 1]>(below)
    tokens_below = Reshape<allowzero=1>(last_below, to_tokens_below)
    to_picture_below = Concat<axis=0>(batch, h_vector, w_vector, channels)
    picture_below = Reshape<allowzero=1>(tokens_below, to_picture_below)
    lower = Transpose<perm=[0, 3, 1, 2]>(picture_below)
    leading = Shape<start=0, end=2>(lower)
    spatial = Concat<axis=0>(height, width)
    sizes = Concat<axis=0>(leading, spatial)
    back = Resize<mode="nearest">(lower, , , sizes)
    out = Add(back, upper)
}
"""
CONSTANTS: dict[str, Values] = {
    "to_vector": np.array([-1]),
    "channels": np.array([32]),
    "four": np.array([4]),
    "eight": np.array([8]),
    "minus": np.array(-1),
    "one": np.array(1),
    "two": np.array(2),
}


def blocks() -> ir.Model:
    return model_of(BLOCKS, {**CONSTANTS, "kernel": RNG.standard_normal((32, 32, 3, 3), np.float32)})


def test_shapes_are_constants_where_they_are_the_inputs_own(tmp_path: Path) -> None:
    model = blocks()
    feeds = [{"sample": RNG.standard_normal((2, 32, h, w), np.float32)} for h, w in ((8, 6), (5, 7), (1, 9))]
    expected = [run(model, tmp_path, feed)["out"] for feed in feeds]
    before = len(shape_nodes(model))
    assert ShapeArithmeticPass()(model).modified
    left = [node.op_type for node in shape_nodes(model)]
    assert before == 25
    # The sizes of the inputs, half the height, one target of each level and the sizes of the Resize.
    assert sorted(left) == ["Add", "Add", "Concat", "Concat", "Concat", "Div", "Shape", "Shape", "Shape"]
    targets = [node.inputs[1].const_value for node in model.graph if node.op_type == "Reshape" and node.inputs[1]]
    assert [tensor.numpy().tolist() for tensor in targets if tensor is not None] == [
        [0, -1, 32],
        [0, -1, 4, 8],
        [0, -1, 32],
        [0, -1, 32],
    ]
    for feed, values in zip(feeds, expected, strict=True):
        assert_array_equal(run(model, tmp_path, feed)["out"], values)


def test_a_second_time_there_is_nothing_to_do() -> None:
    model = blocks()
    ShapeArithmeticPass()(model)
    names = [node.name for node in model.graph]
    assert not ShapeArithmeticPass()(model).modified
    assert [node.name for node in model.graph] == names


def test_a_reshape_to_the_shape_that_is_there_goes(tmp_path: Path) -> None:
    model = model_of(
        "g (float[batch,77] x) => (float[batch,77] out) { y = Reshape<allowzero=1>(x, to) out = Neg(y) }",
        {"to": np.array([-1, 77])},
    )
    assert ShapeArithmeticPass()(model).modified
    assert counts(model) == {"Neg": 1}
    feeds = {"x": RNG.standard_normal((3, 77), np.float32)}
    assert_array_equal(run(model, tmp_path, feeds)["out"], -feeds["x"])


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        ("Concat<axis=0>(seven, rest)", (7, 30)),  # another size than the batch
        ("Concat<axis=0>(tail, rest)", (5, 42)),  # read of another axis
        ("Concat<axis=0>(rest, tail)", (42, 5)),  # what is left comes before what is read
        ("Concat<axis=0>(seven, rest, tail)", (7, 6, 5)),
        ("Concat<axis=0>(tail, batch, rest)", (5, 3, 14)),
    ],
)
def test_sizes_that_are_not_the_inputs_stay_what_they_are(target: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    dims = ",".join("klm"[: len(shape)])
    text = f"""
    g (float[batch,14,n] x) => (float[{dims}] out) {{
        batch = Shape<start=0, end=1>(x)
        tail = Shape<start=2, end=3>(x)
        to = {target}
        y = Reshape(x, to)
        out = Neg(y)
    }}
    """
    model = model_of(text, {"seven": np.array([7]), "rest": np.array([-1])})
    feeds = {"x": RNG.standard_normal((3, 14, 5), np.float32)}
    expected = run(model, tmp_path, feeds)["out"]
    ShapeArithmeticPass()(model)
    result = run(model, tmp_path, feeds)["out"]
    assert result.shape == shape
    assert_array_equal(result, expected)


def test_a_size_that_is_used_as_a_number_stays_one(tmp_path: Path) -> None:
    text = """
    g (float[batch,4] x) => (int64[batch] out) {
        batch = Shape<start=0, end=1>(x)
        number = Squeeze(batch)
        out = Range(zero, number, one)
    }
    """
    model = model_of(text, {"zero": np.array(0), "one": np.array(1)})
    ShapeArithmeticPass()(model)
    out = run(model, tmp_path, {"x": np.zeros((3, 4), np.float32)})["out"]
    assert out.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", COMPONENTS)
def test_whole_graphs_give_the_same_with_hardly_a_size_computed(
    name: str, tiny_bundle: Path, tiny_cases: dict[str, Any], tmp_path: Path
) -> None:
    source = tiny_bundle / name / "model.onnx"
    model = ir.load(source)
    ShapeArithmeticPass()(model)
    concats = [node for node in shape_nodes(model) if node.op_type == "Concat"]
    # U-Nets: a target for each level with attention, and a Resize for each upsampling; VAEs: one attention.
    assert len(concats) <= {"text_encoder": 0, "unet": 3, "vae_decoder": 1, "vae_encoder": 1}[name]
    for case in tiny_cases[name]:
        expected = outputs_of(source, case.feeds)
        for output, values in run(model, tmp_path, case.feeds).items():
            assert_array_equal(values, expected[output])
