from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentrt.calibrate.layers import Layer
from latentrt.calibrate.plan import LayerPlan, Plan
from latentrt.calibrate.plan_checks import check_plan
from latentrt.calibrate.plan_file import arrays_path, load_plan, plan_key, save_plan
from latentrt.runtime.errors import ArtifactError, CalibrationError

Edit = Callable[[dict[str, Any]], object]


def planned(name: str, group: str, *, quantized: bool = True, scale: float | None = 0.25) -> LayerPlan:
    return LayerPlan(
        name=name,
        group=group,
        kind="attn1.to_q",
        quantized=quantized,
        reason="cheap",
        scale=scale,
        noise=1e-4,
        gain=0.3,
        macs=0.4,
    )


def layer(name: str, group: str, *, inputs: int = 32, operator: str = "MatMul") -> Layer:
    return Layer(name, operator, "attn1.to_q", f"in.{group}", group, inputs, 48, 1, 100, 0.25)


LAYERS = (layer("q", "q"), layer("k", "q"), layer("up", "up"), layer("conv_in", "conv_in", inputs=4, operator="Conv"))
PLAN = Plan(
    component="unet",
    kind="int8",
    graph={"unet/model.onnx": "ab12", "unet/model.onnx_data": "cd34"},
    loras=({"name": "ink", "scale": 0.5, "sha256": "ef"},),
    layers=(
        planned("q", "q"),
        planned("k", "q"),
        planned("up", "up", quantized=False, scale=0.5),
        planned("conv_in", "conv_in", quantized=False, scale=None),
    ),
    vectors={"q": np.linspace(0.5, 2, 32, dtype=np.float32)},
    corrections={"k": np.linspace(-1, 1, 48, dtype=np.float32)},
    made={"budget": "psnr=30", "predicted": 41.5},
)


def check(plan: Plan) -> None:
    check_plan(plan, LAYERS, PLAN.graph, PLAN.loras)


def edited(path: Path, edit: Edit) -> Path:
    """A plan's file as somebody with an editor leaves it."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def same(one: Plan, other: Plan) -> None:
    for name in ("component", "kind", "graph", "layers", "made"):
        assert getattr(one, name) == getattr(other, name), name
    assert list(one.loras) == list(other.loras)
    for ours, theirs in ((one.vectors, other.vectors), (one.corrections, other.corrections)):
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name])


floats = st.floats(0, 1, exclude_min=True)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    layers: list[LayerPlan] = []
    for group in draw(st.lists(names, min_size=1, max_size=4, unique=True)):
        scale = draw(st.floats(6e-8, 65504))
        layers.extend(
            LayerPlan(
                name=group if index == 0 else f"{group}\0{index}",
                group=group,
                kind=draw(names),
                quantized=draw(st.booleans()),
                reason=draw(st.text(max_size=30)),
                scale=scale,
                noise=draw(st.none() | floats),
                gain=draw(floats),
                macs=draw(floats),
            )
            for index in range(draw(st.integers(1, 3)))
        )
    arrays = st.lists(st.floats(2**-10, 2**10, width=32), max_size=4).map(lambda values: np.array(values, np.float32))
    some = st.sampled_from([each.name for each in layers])
    return Plan(
        component=draw(st.sampled_from(["unet", "vae_decoder"])),
        kind=draw(st.sampled_from(["int8", "fp8"])),
        graph=draw(st.dictionaries(names, names, max_size=3)),
        loras=tuple(draw(st.lists(st.fixed_dictionaries({"name": names, "scale": floats}), max_size=2))),
        layers=tuple(layers),
        vectors=draw(st.dictionaries(some, arrays, max_size=2)),
        corrections=draw(st.dictionaries(some, arrays, max_size=2)),
        made=draw(st.dictionaries(names, names | floats | st.none(), max_size=3)),
    )


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans())
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, plan: Plan) -> None:
    path, arrays = save_plan(plan, tmp_path / "int8.plan.json")
    assert (path.name, arrays.name) == ("int8.plan.json", "int8.plan.safetensors")
    found = load_plan(path)
    same(plan, found)
    assert plan_key(found) == plan_key(plan)
    before = path.read_bytes(), arrays.read_bytes()
    save_plan(found, path)
    assert (path.read_bytes(), arrays.read_bytes()) == before


def test_a_layer_is_a_line(tmp_path: Path) -> None:
    path, _ = save_plan(PLAN, tmp_path / "int8.plan.json")
    (line,) = (line for line in path.read_text().splitlines() if '"name": "up"' in line)
    assert json.loads(line.rstrip(","))["scale"] == 0.5
    check(load_plan(path))


def test_a_plan_edited_by_hand_is_another_plan(tmp_path: Path) -> None:
    path, _ = save_plan(PLAN, tmp_path / "int8.plan.json")
    key = plan_key(PLAN)
    same(PLAN, load_plan(edited(path, lambda content: None)))
    reworded = load_plan(edited(path, lambda content: content["layers"][0].update(reason="I like it", noise=None)))
    assert plan_key(reworded) == key
    flipped = load_plan(edited(path, lambda content: content["layers"][2].update(quantized=True)))
    check(flipped)
    assert flipped.quants().keys() == {"q", "k", "up"}
    assert plan_key(flipped) != key
    finer = load_plan(edited(path, lambda content: [row.update(scale=0.2) for row in content["layers"][:2]]))
    check(finer)
    assert len({plan_key(finer), plan_key(flipped), key}) == 3


def test_the_key_is_of_all_that_decides_about_the_graphs() -> None:
    others = [
        replace(PLAN, kind="fp8"),
        replace(PLAN, component="vae_decoder"),
        replace(PLAN, graph={**PLAN.graph, "unet/model.onnx": "ab13"}),
        replace(PLAN, loras=()),
        replace(PLAN, vectors={"q": PLAN.vectors["q"] * 2}),
        replace(PLAN, corrections={}),
        replace(PLAN, layers=(replace(PLAN.layers[0], quantized=False), *PLAN.layers[1:])),
    ]
    assert len({plan_key(plan) for plan in (PLAN, *others)}) == len(others) + 1
    # Nobody reads the vector of a group none of which is quantized.
    assert plan_key(replace(PLAN, vectors={**PLAN.vectors, "up": np.ones(32, np.float32)})) == plan_key(PLAN)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["layers"][0].update(scale=-1.0), r"q: scale: expected a positive number up to 65504, .* got -1.0"),
        (lambda c: c["layers"][0].update(scale=0), "q: scale: expected a positive number"),
        (lambda c: c["layers"][0].update(scale=1e6), "q: scale: expected a positive number"),
        (lambda c: c["layers"][0].update(scale="0.1"), "q: scale: expected a positive number"),
        (lambda c: c["layers"][0].update(scale=True), "q: scale: expected a positive number"),
        (lambda c: c["layers"][1].update(scale=0.3), r"k: expected scale 0.25, as q has, .* got 0.3"),
        (lambda c: c["layers"][0].update(quantized=1), "q: quantized: expected true or false, got 1"),
        (lambda c: c["layers"][3].update(quantized=True), r"conv_in: expected a scale, .* Set `quantized` to false"),
        (lambda c: c["layers"][0].pop("macs"), "expected a plan of `latentrt calibrate`, got .* macs"),
        (lambda c: c["layers"].append(c["layers"][0]), "plan: expected every layer once, got q twice"),
        (lambda c: c.update(kind="int4"), "plan: kind: expected int8 or fp8, got int4"),
        (lambda c: c.pop("graph"), "expected a plan of `latentrt calibrate`, got KeyError"),
        (lambda c: c["layers"][0].update(name=3), "expected texts for name"),
        (lambda c: c["layers"][0].update(gain=None), "q: gain: expected a finite number, got None"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, edit: Edit, message: str) -> None:
    path, _ = save_plan(PLAN, tmp_path / "int8.plan.json")
    with pytest.raises(CalibrationError, match=message):
        load_plan(edited(path, edit))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["layers"].pop(0), "expected the 4 layers of the graph, got 1 missing: q"),
        (lambda c: c["layers"][2].update(name="down"), "got 1 unknown to the graph: down"),
        (lambda c: c["layers"][2].update(group="q"), "up: expected group up, whose input it reads, got q"),
        (
            lambda c: c["layers"][3].update(quantized=True, scale=0.1),
            "conv_in: expected a Conv or MatMul of 16 channels or more .* got a Conv from 4 to 48. Set its `quantized`",
        ),
        (lambda c: c["graph"].update({"unet/model.onnx": "ff"}), "got a plan for another graph"),
        (lambda c: c["loras"].clear(), "got a plan for weights with other LoRAs"),
    ],
)
def test_what_does_not_fit_the_graph_is_said(tmp_path: Path, edit: Edit, message: str) -> None:
    path, _ = save_plan(PLAN, tmp_path / "int8.plan.json")
    with pytest.raises(CalibrationError, match=message):
        check(load_plan(edited(path, edit)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": {"q": np.ones(31, np.float32)}}, r"q: vector: expected shape \(32,\), got \(31,\)"),
        ({"vectors": {"k": np.ones(32, np.float32)}}, r"k: vector: expected shape \(None,\), got \(32,\)"),
        ({"corrections": {"up": np.ones(32, np.float32)}}, r"up: correction: expected shape \(48,\), got \(32,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        check(replace(PLAN, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": {"q": np.zeros(32, np.float32)}}, "q: vector: expected positive numbers"),
        ({"vectors": {"q": np.full(32, np.inf, np.float32)}}, "q: vector: expected positive numbers"),
        ({"corrections": {"k": np.full(48, np.nan, np.float32)}}, "k: correction: expected finite numbers"),
        ({"layers": (planned("q", "q", scale=float("nan")),)}, "q: scale: expected a positive number .* got nan"),
        ({"made": {"predicted": float("nan")}}, "int8.plan.json: expected finite numbers"),
    ],
)
def test_a_plan_that_cannot_be_is_not_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        save_plan(replace(PLAN, **change), tmp_path / "int8.plan.json")
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_plan_are_said(tmp_path: Path) -> None:
    path, arrays = save_plan(PLAN, tmp_path / "int8.plan.json")
    other, theirs = save_plan(replace(PLAN, vectors={}), tmp_path / "other.plan.json")
    arrays.write_bytes(theirs.read_bytes())
    with pytest.raises(ArtifactError, match=r"got int8.plan.safetensors is another plan's"):
        load_plan(path)
    arrays_path(other).unlink()
    with pytest.raises(ArtifactError, match="No such file"):
        load_plan(other)
    for text in ("{", "[]", '{"format": 2}', '{"format": 1, "layers": NaN}'):
        path.write_text(text)
        with pytest.raises(ArtifactError, match="expected a plan of `latentrt calibrate`"):
            load_plan(path)


def test_of_weights_alone_no_layer_has_a_scale() -> None:
    bare = replace(PLAN, layers=tuple(replace(each, scale=None) for each in PLAN.layers))
    check(bare)
    assert {quant.scale for quant in bare.quants().values()} == {None}
