import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from drawn import PROMPTS, STEPS, Painter, picture, small_plan, write_bundle

from latentrt.calibrate import pictures, verify
from latentrt.calibrate.budget import parse_budgets
from latentrt.calibrate.calls import Call
from latentrt.calibrate.pictures import Drawing, draw, read_picture
from latentrt.calibrate.verification import (
    Verification,
    load_verification,
    outcomes,
    save_verification,
    value_of,
    what_limits,
)
from latentrt.calibrate.verify import verify_plan
from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.specs import ModelSpec, TensorSpec

PSNR = {name: 20 * math.log10(255 / step) for name, step in STEPS.items() if step}


class Shifted:
    """Components of a bundle: a network whose answer is the sample, moved by its precision's step."""

    opened: ClassVar[list[str]] = []

    def __init__(self, precision: str) -> None:
        self.precision, self.backend = precision, "onnxruntime CPU"
        self.spec = ModelSpec("unet", (), (TensorSpec("out_sample", "float32", ("b",)),))

    @classmethod
    def open(cls, path: Path, precision: str, **options: Any) -> "Shifted":
        cls.opened.append(precision)
        return cls(precision)

    def __getitem__(self, component: str) -> "Shifted":
        return self

    def __call__(self, feeds: Any) -> dict[str, Any]:
        return {"out_sample": feeds["sample"] + np.float32(STEPS[self.precision] / 100)}

    def close(self) -> None:
        pass


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    painter = Painter()
    monkeypatch.setattr(pictures, "Pipeline", painter)
    monkeypatch.setattr(verify, "Components", Shifted)
    Shifted.opened.clear()
    return painter


@pytest.fixture
def judge(tmp_path: Path) -> str:
    file = tmp_path / "judge.py"
    # int8 pictures are brighter by 4 levels: it fails them where the prompt says so.
    file.write_text("def shows(prompt, picture):\n    return prompt != 'dark' or picture.mean() < 62\n")
    return f"{file}:shows"


def drawing_of(tmp_path: Path, **changes: Any) -> Drawing:
    own = {"bundle": write_bundle(tmp_path / "a.bundle"), "prompts": PROMPTS, "seed": 7, "settings": {"steps": 3}}
    return Drawing(**{**own, **changes})


def calls() -> Iterator[Call]:
    for timestep in (900.0, 100.0):
        sample = np.ones((1, 2, 2, 2), np.float32)
        yield Call({"sample": sample, "timestep": np.array([timestep])}, 0, timestep, negatives=0, guidance=1.0)


def verified(drawing: Drawing, tmp_path: Path, *, budgets: str = "psnr=30", **options: Any) -> Verification:
    return verify_plan(drawing, tmp_path / "out", budgets=parse_budgets([budgets]), plan="key", **options)


def with_calls(given: Iterable[Call] | None = None) -> dict[str, Any]:
    return {"calls": calls() if given is None else given, "calls_key": "calls"}


def test_figures_are_those_of_the_pictures(painter: Painter, tmp_path: Path, judge: str) -> None:
    found = verified(drawing_of(tmp_path), tmp_path, judge=judge, **with_calls())
    assert list(found.measured) == ["fp32", "fp16", "int8"]
    for precision in ("fp16", "int8"):
        measured = found.measured[precision]
        np.testing.assert_allclose(measured.metrics["psnr"].values, [PSNR[precision]] * 4)
        assert measured.metrics["psnr"].mean == pytest.approx(PSNR[precision])
        assert 0 < measured.metrics["flip"].mean < 1
        assert measured.precisions == {"unet": precision, "vae_decoder": "fp16"}
        assert measured.noise is not None
        assert [step.timestep for step in measured.noise.raw] == [900.0, 100.0]
        expected = -20 * math.log10(STEPS[precision] / 100)
        np.testing.assert_allclose([step.sqnr_db for step in measured.noise.guided], expected, atol=1e-3)
    reference = found.measured["fp32"]
    assert (reference.metrics, reference.noise) == ({}, None)
    assert found.measured["fp16"].accuracy == reference.accuracy == 1.0
    assert found.measured["int8"].accuracy == 0.75
    assert value_of(found, "int8", "accuracy") == (0.25, (0.0, 0.75))
    assert not found.on_gpu


def test_prompt_i_is_drawn_with_seed_plus_i_in_every_precision(painter: Painter, tmp_path: Path) -> None:
    verified(drawing_of(tmp_path, batch=3), tmp_path)
    assert painter.drawn == [
        (precision, prompt, 7 + index) for precision in ("fp32", "fp16", "int8") for index, prompt in enumerate(PROMPTS)
    ]
    assert all(settings == {"steps": 3, "safety_checker": False} for settings in painter.settings)
    kept = read_picture(tmp_path / "out" / "int8", 2)
    np.testing.assert_array_equal(kept, picture(PROMPTS[2], 9, "int8"))


def test_an_interrupted_run_goes_on_with_the_picture_it_was_at(painter: Painter, tmp_path: Path) -> None:
    drawing = drawing_of(tmp_path, batch=1)
    painter.most = 6
    with pytest.raises(KeyboardInterrupt):
        verified(drawing, tmp_path)
    painter.most = 1000
    verified(drawing, tmp_path)
    assert len(painter.drawn) == len(set(painter.drawn)) == 12


def test_nothing_is_drawn_or_measured_twice(painter: Painter, tmp_path: Path, judge: str) -> None:
    drawing = drawing_of(tmp_path)
    first = verified(drawing, tmp_path, judge=judge, **with_calls())
    painter.drawn.clear()
    Shifted.opened.clear()
    assert verified(drawing, tmp_path, judge=judge, **with_calls([])) == first
    assert not painter.drawn
    assert not Shifted.opened


def test_a_new_plan_costs_only_what_is_new(painter: Painter, tmp_path: Path) -> None:
    verified(drawing_of(tmp_path), tmp_path, **with_calls())
    painter.drawn.clear()
    Shifted.opened.clear()
    write_bundle(tmp_path / "a.bundle", int8="another")
    verified(
        Drawing(bundle=tmp_path / "a.bundle", prompts=PROMPTS, seed=7, settings={"steps": 3}), tmp_path, **with_calls()
    )
    assert {precision for precision, _, _ in painter.drawn} == {"int8"}
    assert Shifted.opened == ["fp32", "int8"]


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"settings": {"steps": 4}}, {"backend": "cuda"}, {"prompts": PROMPTS[:3]}]
)
def test_other_pictures_take_the_place_of_the_old(painter: Painter, tmp_path: Path, change: dict[str, Any]) -> None:
    drawing = drawing_of(tmp_path)
    draw(drawing, "fp32", tmp_path / "out")
    other = replace(drawing, **change)
    draw(other, "fp32", tmp_path / "out")
    count = len(other.prompts)
    assert len(painter.drawn) == 4 + count
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [f"{i:05}.png" for i in range(count)]


def test_a_judge_that_was_edited_judges_again(painter: Painter, tmp_path: Path, judge: str) -> None:
    drawing = drawing_of(tmp_path)
    verified(drawing, tmp_path, judge=judge)
    Path(judge.rpartition(":")[0]).write_text("def shows(prompt, picture):\n    return False\n")
    assert verified(drawing, tmp_path, judge=judge).measured["fp32"].accuracy == 0.0


def test_outcomes_say_how_near_a_budget_is(painter: Painter, tmp_path: Path, judge: str) -> None:
    asked = "psnr=40,flip=0.9,accuracy=0.1,sqnr=27"
    found = verified(drawing_of(tmp_path), tmp_path, budgets=asked, judge=judge, **with_calls())
    psnr, flip, accuracy, sqnr = outcomes(found)
    assert [outcome.met for outcome in (psnr, flip, accuracy, sqnr)] == [False, True, False, True]
    assert psnr.value == pytest.approx(PSNR["int8"])
    assert psnr.floor == pytest.approx(PSNR["fp16"])
    assert str(psnr) == ("PSNR >= 40 dB: 36.1 dB, missed by 3.9 dB; 95 % interval 36.1 dB to 36.1 dB; fp16 48.1 dB")
    assert str(sqnr) == "SQNR of the guided prediction >= 27 dB: 28.0 dB, met by 1.0 dB; fp16 40.0 dB"
    assert accuracy.reachable


def test_what_limits_are_the_layers_with_most_noise(painter: Painter, tmp_path: Path) -> None:
    missed = outcomes(verified(drawing_of(tmp_path), tmp_path, budgets="psnr=40"))
    plan = small_plan()
    assert what_limits(missed, plan) == (
        "Of the predicted noise of 2 quantized layers, most is from unet.b.to_q.weight (75%), unet.a.to_q.weight (25%)."
    )
    unknown = replace(plan, layers=tuple(replace(layer, noise=None) for layer in plan.layers))
    assert what_limits(missed, unknown).startswith("The plan names no noise of its 2 quantized layers")


def test_a_budget_beyond_fp16_is_nobody_s_fault(painter: Painter, tmp_path: Path) -> None:
    missed = outcomes(verified(drawing_of(tmp_path), tmp_path, budgets="psnr=50"))
    assert not missed[0].reachable
    assert what_limits(missed, small_plan()) == (
        "fp16 itself misses PSNR >= 50 dB: no choice of layers can hold it. Ask for less."
    )


def test_a_verification_survives_its_file(painter: Painter, tmp_path: Path, judge: str) -> None:
    found = verified(drawing_of(tmp_path), tmp_path, budgets="psnr=30,sqnr=20", judge=judge, **with_calls())
    file = tmp_path / "verification.json"
    save_verification(file, found)
    assert load_verification(file) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content | {"format_version": 2}, "expected format version 1, got 2"),
        (lambda content: {"format_version": 1}, "damaged file"),
        (lambda content: content | {"more": 1}, "damaged file"),
        (lambda content: content | {"budgets": [{"metric": "fid", "bound": 1}]}, "damaged file"),
        (lambda content: [], "damaged file"),
    ],
)
def test_a_damaged_file_is_named(painter: Painter, tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / "verification.json"
    save_verification(file, verified(drawing_of(tmp_path), tmp_path))
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ArtifactError, match=message):
        load_verification(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a verification, got No such file"):
        load_verification(tmp_path / "none.json")


def test_budgets_are_checked_before_anything_is_drawn(painter: Painter, tmp_path: Path) -> None:
    for budgets in ("accuracy=0.01", "lpips=0.1", "sqnr=30"):
        with pytest.raises(UsageError, match="got none"):
            verified(drawing_of(tmp_path), tmp_path, budgets=budgets)
    assert painter.drawn == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ()}, "expected held-out prompts, got none"),
        ({"batch": 0}, "batch: expected 1 or more"),
        ({"settings": {"seed": 3, "steps": 4}}, "expected settings without seed"),
    ],
)
def test_drawings_that_make_no_sense_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        drawing_of(tmp_path, **change)


def test_a_damaged_picture_is_named(painter: Painter, tmp_path: Path) -> None:
    drawing = drawing_of(tmp_path)
    draw(drawing, "fp32", tmp_path / "out" / "fp32")
    (tmp_path / "out" / "fp32" / "00001.png").write_bytes(b"no picture")
    with pytest.raises(ArtifactError, match=r"00001\.png: expected a picture"):
        verified(drawing, tmp_path)


def test_a_real_bundle_is_verified(shapes_bundle: Path, tmp_path: Path) -> None:
    settings = {"steps": 2, "sampler": "dpm++ 2m karras", "guidance": 5.0}
    drawing = Drawing(bundle=shapes_bundle, prompts=("a red star on blue",), seed=1, settings=settings)
    found = verified(drawing, tmp_path, tested="fp16")
    half = found.measured["fp16"]
    assert half.precisions["unet"] == "fp16"
    # Half precision changes some levels by one, and none by much.
    assert 45 < half.metrics["psnr"].worst < 100
    assert outcomes(found)[0].met
    assert found.measured["fp32"].backend == "onnxruntime CPU"
