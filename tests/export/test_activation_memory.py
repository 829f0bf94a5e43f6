from __future__ import annotations

import dataclasses
import json
import lzma
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from activation_graphs import attention, decoder, transformer
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.export.activation_memory import Step, estimate_activation, fullest, packed_bytes, slotted_bytes
from latentrt.export.engine_builder import build_engine
from latentrt.export.engine_config import EngineConfig
from latentrt.runtime.engine_sidecar import ShapeProfile

WORKSPACE = 8_192_000
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "plan-activation.json"
# The U-Net of `full_size.write_checkpoint("sd1", …)` as `latentrt export` writes it, without its external weights.
UNET = Path(__file__).with_name("sd15_unet.onnx.xz")


STEPS = [
    Step("a", (), {"x": 100}, workspace=20),
    Step("b", ("x",), {"y": 300}),
    Step("c", ("y",), {"z": 200}, workspace=90),
    Step("d", ("z", "input"), {"w": 250}, workspace=20),
    Step("e", ("w", "z"), {}),
]


def test_the_fullest_step_holds_what_it_writes_and_what_is_read_from_then_on() -> None:
    assert fullest(STEPS) == ("c", {"y": 300, "z": 200})
    assert fullest([]) == ("", {})


def test_packed_tensors_lie_in_the_first_gap_from_their_writing_to_their_last_reading() -> None:
    # x 0..100, y 100..400 and x goes, z 400..600 and y goes, w 0..250. The workspace of c fits where x was.
    assert packed_bytes(STEPS) == 600
    # One byte more and it does not: 600..701.
    assert packed_bytes([*STEPS[:2], dataclasses.replace(STEPS[2], workspace=101), *STEPS[3:]]) == 701


def test_slots_hold_one_tensor_at_a_time_and_the_largest_workspace_lies_beside_them() -> None:
    # y and w share 300, x and z share 200: x is gone when z is written.
    assert slotted_bytes(STEPS) == 300 + 200 + 90


def test_inputs_and_outputs_lie_elsewhere() -> None:
    steps = [Step("a", ("input",), {"x": 100}), Step("b", ("x", "input"), {})]
    assert (packed_bytes(steps), slotted_bytes(steps)) == (100, 100)


Shapes = Mapping[str, tuple[int, ...]]


def built(model: onnx.ModelProto, least: Shapes, most: Shapes, folder: Path) -> int:
    """The builder's figure."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: see the README")
    onnx.save(model, folder / "model.onnx")
    profile = {name: ShapeProfile(least[name], shape, shape) for name, shape in most.items()}
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    config = EngineConfig("unet", "fp16" if half else "fp32", (profile,), ("sm89",))
    return build_engine(trt, folder / "model.onnx", config).memory["activation_bytes"]


def pictures(batch: int) -> Shapes:
    return {"z": (batch, 4, 64, 64)}


def tokens(batch: int) -> Shapes:
    return {"x": (batch, 1024, 64), "text": (batch, 77, 32)}


def wide_tokens(width: int) -> Shapes:
    return {"x": (1, 1024, width)}


@pytest.mark.parametrize(
    ("model", "least", "most", "within"),
    [
        (decoder(), pictures(4), pictures(4), 0.001),
        (decoder(), pictures(2), pictures(4), 0.05),
        (transformer(), tokens(2), tokens(2), 0.001),
        (transformer(), tokens(1), tokens(2), 0.05),
        # Heads of 256 in half are the widest whose scores stay on the chip; scores are most of the memory elsewhere.
        (attention(512, 2), wide_tokens(512), wide_tokens(512), 0.001),
        (attention(528, 2), wide_tokens(528), wide_tokens(528), 0.1),
        (attention(80, 2, dtype=np.float32), wide_tokens(80), wide_tokens(80), 0.001),
    ],
    ids=["decoder", "decoder, open", "transformer", "transformer, open", "fused", "wide", "float32"],
)
def test_the_estimate_is_the_builders_figure(
    model: onnx.ModelProto, least: Shapes, most: Shapes, within: float, tmp_path: Path
) -> None:
    batch = next(iter(most.values()))[0]
    estimate = estimate_activation(ir.from_proto(model), {"b": batch}, fixed=least == most).total
    assert estimate > 1.1 * WORKSPACE
    assert estimate == pytest.approx(built(model, least, most, tmp_path), rel=within)


@pytest.fixture(scope="module")
def unet() -> ir.Model:
    return ir.from_proto(onnx.load_from_string(lzma.decompress(UNET.read_bytes())))


def sizes(batch: int, side: int) -> dict[str, int]:
    return {"batch": batch, "latent_height": side // 8, "latent_width": side // 8, "sequence_length": 77}


@pytest.mark.parametrize("guidance", ["on", "both"])
def test_the_full_size_unet_is_within_the_bar_of_the_builders_figures(unet: ir.Model, guidance: str) -> None:
    cases = json.loads(RESULTS.read_text())["cases"]
    for side, images in ((512, 1), (512, 4), (768, 1), (768, 4)):
        stated = cases[f"unet {side} batch {images} sm89 guidance {guidance}"]["builder"]["activation_bytes"]
        estimate = estimate_activation(unet, sizes(2 * images, side), fixed=guidance == "on")
        assert estimate.total == pytest.approx(stated, rel=0.15)


def test_the_fullest_moment_names_what_fills_it(unet: ir.Model) -> None:
    block = estimate_activation(unet, sizes(2, 512))
    largest = list(block.held.items())[:2]
    # Both halves of a gated feed-forward at the highest resolution: 2 rows of 64 x 64 tokens of 1280 numbers in half.
    assert [size for _, size in largest] == [2 * 64 * 64 * 1280 * 2] * 2


def test_an_engine_that_leaves_sizes_open_takes_more(unet: ir.Model) -> None:
    fixed, open_ = (estimate_activation(unet, sizes(2, 256), fixed=fixed).total for fixed in (True, False))
    assert fixed < open_


@given(st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=8, deadline=None)
def test_more_rows_never_take_less(first: int, second: int) -> None:
    model = ir.from_proto(transformer(tokens=256, layers=1))
    less, more = (estimate_activation(model, {"b": batch}).total for batch in sorted((first, second)))
    assert less <= more


def test_larger_pictures_never_take_less(unet: ir.Model) -> None:
    totals = [estimate_activation(unet, sizes(2, side)).total for side in (256, 512, 1024)]
    assert totals == sorted(totals)
