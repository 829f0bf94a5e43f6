from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from drawing_workers import CHANNELS, SIDE, Drawer, level, picture, write_bundle
from PIL import Image

from latentrt.benchmarks import quality_plan
from latentrt.benchmarks.cases import Case, Model, Settings, Subject, System
from latentrt.benchmarks.drawings import Prompts
from latentrt.benchmarks.quality import RANDOM_WEIGHTS, with_quality
from latentrt.benchmarks.quality_figures import latent_distances
from latentrt.benchmarks.quality_pictures import reference_name, shown_prompts
from latentrt.benchmarks.quality_plan import QualityPlan, load_lpips
from latentrt.benchmarks.results_file import Quality, Row
from latentrt.runtime.errors import UsageError
from latentrt.runtime.image import Pictures

SEED = 100
TEXTS = ("a red circle", "a blue star", "rain", "snow", "fog")
PLAN = QualityPlan(prompts=Prompts(texts=TEXTS, seed=SEED, made_with={"unet/model.onnx": "a"}))
TEN = Settings(sampler="DDIM", schedule=None, steps=10, guidance=5.0)
TWENTY = replace(TEN, steps=20)
HUNDRED = Settings(sampler="DPM++ 2M", schedule="karras", steps=100, guidance=5.0)


def row(precision: str = "fp16", settings: Settings = TEN, *, system: System = "latentrt", batch: int = 1) -> Row:
    backend = "auto" if system == "latentrt" else "cpu"
    subject = Subject(system=system, precision=precision, backend=backend, width=SIDE, height=SIDE, batch=batch)
    return Row(case=Case(subject=subject, settings=settings), notes=("as it was",))


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(bundle=str(write_bundle(tmp_path / "bundle")))


@pytest.fixture
def measure(tmp_path: Path, model: Model) -> Any:
    """`with_quality` with a work folder that lasts for the test."""

    def measured(*rows: Row, plan: QualityPlan = PLAN, drawer: Drawer | None = None, **options: Any) -> Any:
        worker = drawer or Drawer()
        options = {"model": model, "work_folder": tmp_path / "work", **options}
        return with_quality(rows, plan=plan, open_worker=worker.open, **options)

    return measured


def decibels(off: float) -> float:
    """PSNR of a picture all of whose pixels are off by so much."""
    return float(10 * np.log10(255**2 / off**2))


def offs(precision: str, settings: Settings) -> list[int]:
    subject = row(precision, settings).case.subject
    return [level(subject, settings, SEED + index) for index in range(len(TEXTS))]


def test_pictures_are_held_against_fp32_of_the_same_settings(measure: Any) -> None:
    (exact, half, rough), text = measure(row("fp32"), row("fp16"), row("int8"))
    assert exact.quality.psnr == (100.0,) * 5
    assert exact.quality.ssim == pytest.approx((1.0,) * 5)
    assert half.quality.psnr == pytest.approx((decibels(1),) * 5)
    assert rough.quality.psnr == pytest.approx([decibels(own - 9) for own in offs("int8", TEN)])
    assert all(0 < value < 1 for value in rough.quality.ssim)
    assert rough.quality.prompts == 5
    assert rough.quality.lpips == ()
    assert rough.quality.accuracy is None
    assert rough.notes == ("as it was",)
    assert text == (
        "latentrt fp32 on onnxruntime CPU, one picture at a time, seeds 100 to 104, with the row's size and settings"
    )


def test_latents_are_held_against_fp32_after_each_step(measure: Any) -> None:
    (half, rough), _ = measure(row("fp16"), row("int8", TWENTY))
    assert half.quality.latent_l2 == pytest.approx([0.01] * 10, rel=1e-4)
    assert rough.quality.latent_l2 == pytest.approx([0.04] * 20, rel=1e-4)


def test_latent_distances_are_means_over_pictures() -> None:
    rng = np.random.default_rng(3)
    reference = (
        rng.standard_normal((4, 3, CHANNELS, 2, 2)).astype(np.float32) * np.arange(1, 4)[None, :, None, None, None]
    )
    moved = reference + rng.standard_normal(reference.shape)
    wanted = []
    for step in range(4):
        each = []
        for one, other in zip(reference[step], moved[step], strict=True):
            each.append(np.sqrt(np.sum((other - one) ** 2)) / np.sqrt(np.sum(one**2)))
        wanted.append(sum(each) / 3)
    found = latent_distances(reference.astype(np.float32), moved.astype(np.float32))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_settings_are_held_against_many_steps(measure: Any) -> None:
    drawer = Drawer()
    (ten, twenty, rough), text = measure(row("fp32"), row("fp32", TWENTY), row("int8"), drawer=drawer)
    assert ten.quality.finest_psnr == pytest.approx((decibels(9),) * 5)
    assert twenty.quality.finest_psnr == pytest.approx((decibels(4),) * 5)
    assert rough.quality.finest_psnr == pytest.approx([decibels(own) for own in offs("int8", TEN)])
    assert {settings for _, settings, _, _ in drawer.drawn} == {TEN, TWENTY, HUNDRED}
    assert text.endswith("settings are held against 100 steps of DPM++ 2M karras, guided throughout")


def test_partly_guided_settings_are_held_against_guided_ones(measure: Any) -> None:
    drawer = Drawer()
    partly = replace(TEN, guidance_interval=(0.0, 0.5))
    rows, _ = measure(row(settings=TEN), row(settings=partly), row(settings=replace(TEN, guidance=1.0)), drawer=drawer)
    assert [len(each.quality.finest_psnr) for each in rows] == [5, 5, 0]
    finest = {settings for _, settings, _, _ in drawer.drawn if settings.steps == 100}
    assert finest == {HUNDRED}


def test_samplers_that_add_noise_are_not_held_against_many_steps(measure: Any) -> None:
    rows, _ = measure(row(), row(settings=TWENTY), row(settings=replace(TEN, sampler="Euler a")))
    assert [len(each.quality.finest_psnr) for each in rows] == [5, 5, 0]
    assert [len(each.quality.psnr) for each in rows] == [5, 5, 5]


@pytest.mark.parametrize("finest_steps", [0, 100])
def test_many_steps_are_drawn_only_where_settings_differ_and_they_are_wanted(measure: Any, finest_steps: int) -> None:
    drawer = Drawer()
    other = [row(settings=TWENTY)] if not finest_steps else [row("int8")]
    rows, text = measure(row(), *other, plan=replace(PLAN, finest_steps=finest_steps), drawer=drawer)
    assert [each.quality.finest_psnr for each in rows] == [(), ()]
    assert all(settings.steps < 100 for _, settings, _, _ in drawer.drawn)
    assert "karras" not in text


def test_a_batch_draws_the_same_prompts_and_its_surplus_is_dropped(measure: Any) -> None:
    drawer = Drawer()
    (found,), _ = measure(row("fp16", batch=4), drawer=drawer)
    assert found.quality.psnr == pytest.approx((decibels(1),) * 5)
    assert found.quality.latent_l2 == pytest.approx([0.01] * 10, rel=1e-4)
    assert [(texts, seed) for subject, _, texts, seed in drawer.drawn if subject.batch == 4] == [
        (TEXTS[:4], 100),
        ((TEXTS[4], *TEXTS[:3]), 104),
    ]


def test_rows_that_were_skipped_pass_and_random_weights_have_no_quality(measure: Any) -> None:
    drawer = Drawer()
    skipped = replace(row(), skipped="no such backend")
    rows, text = measure(skipped, drawer=drawer)
    assert (rows, text) == ((skipped,), "")
    rows, text = measure(skipped, row("int8"), plan=replace(PLAN, random_weights=True), drawer=drawer)
    assert (rows, text) == ((skipped, row("int8")), RANDOM_WEIGHTS)
    assert not drawer.drawn
    rows, _ = measure(skipped, row("int8"))
    assert rows[0] == skipped
    assert rows[1].quality is not None


def test_what_was_drawn_before_an_interruption_is_not_drawn_again(measure: Any, tmp_path: Path) -> None:
    rows = (row("fp32"), row("int8", batch=2), row("fp16", TWENTY))
    whole, stopped, again, last = Drawer(), Drawer(most=9), Drawer(), Drawer()
    wanted = measure(*rows, drawer=whole, work_folder=tmp_path / "other")
    with pytest.raises(KeyboardInterrupt):
        measure(*rows, drawer=stopped)
    assert measure(*rows, drawer=again) == wanted
    assert stopped.drawn + again.drawn == whole.drawn
    assert measure(*rows, drawer=last) == wanted
    assert not last.opened


@pytest.mark.parametrize(
    "other",
    [
        replace(PLAN, prompts=replace(PLAN.prompts, made_with={"unet/model.onnx": "b"})),
        replace(PLAN, prompts=replace(PLAN.prompts, seed=7)),
        replace(PLAN, prompts=replace(PLAN.prompts, texts=(*TEXTS[:4], "dew"))),
    ],
)
def test_pictures_of_other_files_prompts_or_seeds_are_drawn_anew(measure: Any, other: QualityPlan) -> None:
    measure(row())
    drawer = Drawer()
    (found,), _ = measure(row(), plan=other, drawer=drawer)
    assert len(drawer.drawn) == 10
    assert found.quality.psnr == pytest.approx((decibels(1),) * 5)


def test_a_system_is_opened_once_for_all_its_settings(measure: Any) -> None:
    drawer = Drawer()
    measure(row(), row("int8"), row(settings=TWENTY), row("int8", TWENTY), drawer=drawer)
    assert [(subject.precision, subject.backend) for subject in drawer.opened] == [
        ("fp32", "onnxruntime"),
        ("fp16", "auto"),
        ("int8", "auto"),
    ]


def test_a_row_that_cannot_be_drawn_says_why_and_the_others_go_on(measure: Any) -> None:
    drawer = Drawer(broken=(("diffusers", "fp32"),))
    (peer, half), _ = measure(row("fp32", system="diffusers"), row(), drawer=drawer)
    assert peer.quality is None
    assert peer.notes == (
        "as it was",
        "quality: no pictures: diffusers fp32, cpu: expected networks, got none. Export them.",
    )
    assert half.quality.psnr == pytest.approx((decibels(1),) * 5)


def test_peers_are_given_settings_as_they_take_them(measure: Any) -> None:
    def settings_of(case: Case) -> Any:
        if case.subject.system == "latentrt":
            return case.settings
        if case.settings == TWENTY:
            raise UsageError("schedule: expected one that diffusers has, got ays.")
        return {**asdict(case.settings), "guidance": 3.0, "scheduler": {"class": "DDIMScheduler"}}

    drawer = Drawer()
    peers = row("fp32", system="diffusers"), row("fp32", TWENTY, system="diffusers")
    rows, _ = measure(*peers, drawer=drawer, settings_of=settings_of, plan=replace(PLAN, finest_steps=0))
    assert {settings for subject, settings, _, _ in drawer.drawn if subject.system == "diffusers"} == {
        replace(TEN, guidance=3.0)
    }
    assert rows[0].quality.prompts == 5
    assert rows[1].notes[1:] == ("quality: no pictures: schedule: expected one that diffusers has, got ays.",)


def test_after_a_failure_the_next_settings_get_a_fresh_process(measure: Any) -> None:
    drawer = Drawer(failing=(20,))
    (broken, whole), text = measure(row(settings=TWENTY), row(), drawer=drawer)
    assert broken.notes[1:] == ("quality: no pictures: latentrt fp16, auto: black pictures.",)
    assert whole.quality.psnr == pytest.approx((decibels(1),) * 5)
    assert [subject.precision for subject in drawer.opened] == ["fp32", "fp32", "fp16", "fp16"]
    assert text.startswith("latentrt fp32 on onnxruntime CPU")


def test_without_a_reference_accuracy_is_left(measure: Any) -> None:
    drawer = Drawer(broken=(("latentrt", "fp32"),))
    plan = replace(PLAN, judge=lambda prompt, _: "a " in prompt)
    (found,), text = measure(row("int8"), plan=plan, drawer=drawer)
    assert found.quality == Quality(prompts=5, accuracy=2 / 5)
    assert found.notes[1:] == (
        "quality: no psnr, ssim, latent_l2: latentrt fp32, onnxruntime: expected networks, got none. Export them.",
    )
    assert text == "none: the reference was not drawn, and each row says why"


def test_a_bundle_without_fp32_is_held_against_its_best(measure: Any, tmp_path: Path) -> None:
    drawer = Drawer()
    other = Model(bundle=str(write_bundle(tmp_path / "half", ["int8", "fp16"])))
    (found,), text = measure(row("int8"), model=other, drawer=drawer)
    assert found.quality.psnr == pytest.approx([decibels(own - 10) for own in offs("int8", TEN)])
    assert text.startswith("latentrt fp16 on onnxruntime CPU")
    assert text.endswith("; the bundle holds no fp32, and fp16 is the best that it has")


def test_judges_see_each_picture_with_its_prompt(measure: Any) -> None:
    def exact(prompt: str, seen: Pictures) -> bool:
        index = TEXTS.index(prompt)
        return bool((seen == picture(prompt, SEED + index, offs("int8", TEN)[index])).all()) and prompt != "fog"

    def lost(prompt: str, seen: Pictures) -> bool:
        raise ValueError(prompt)

    (found,), _ = measure(row("int8"), plan=replace(PLAN, judge=exact))
    assert found.quality.accuracy == 4 / 5
    (found,), _ = measure(row("int8"), plan=replace(PLAN, judge=lost))
    assert found.quality.accuracy is None
    assert len(found.quality.psnr) == 5
    assert found.notes[1].startswith("quality: no accuracy: judge: expected a verdict on 'a red circle'")


def test_lpips_is_one_more_distance(measure: Any) -> None:
    def largest(reference: Pictures, pictures: Pictures) -> Any:
        return np.abs(pictures.astype(float) - reference).max((1, 2, 3)) / 100

    (found,), _ = measure(row("int8"), plan=replace(PLAN, lpips=largest))
    assert found.quality.lpips == pytest.approx([(own - 9) / 100 for own in offs("int8", TEN)])


def test_without_scipy_there_is_no_ssim(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_plan, "find_spec", lambda name: None)
    (found,), text = measure(row("int8"))
    assert found.quality.ssim == ()
    assert len(found.quality.psnr) == 5
    assert text.endswith("; no SSIM, since SciPy is not installed")


def test_a_system_that_counts_steps_otherwise_has_no_latent_distances(measure: Any) -> None:
    (found,), _ = measure(row("fp32", system="diffusers"), drawer=Drawer(more_steps=1))
    assert found.quality.latent_l2 == ()
    assert found.quality.psnr == (100.0,) * 5
    assert len(found.notes) == 2
    assert found.notes[1] == (
        "quality: no latent_l2: trajectory: expected (steps, n, c, h, w) = (10, 5, 4, 3, 3) as the reference, "
        "got (11, 5, 4, 3, 3)."
    )


def test_pictures_of_another_size_are_refused(measure: Any) -> None:
    (found,), text = measure(row(), drawer=Drawer(side=16))
    assert found.quality is None
    assert found.notes[1] == (
        "quality: no pictures: latentrt fp16, auto: expected pictures (1, 24, 24, 3) uint8, got (1, 16, 24, 3) uint8."
    )
    assert text.startswith("none")


def test_a_damaged_file_is_named(measure: Any, tmp_path: Path) -> None:
    measure(row("int8"))
    for path in (tmp_path / "work").rglob("00003.npz"):
        path.write_bytes(path.read_bytes()[:100])
    (found,), _ = measure(row("int8"))
    assert found.quality is None
    assert "00003.npz: expected pictures with their latents" in found.notes[1]


def test_pictures_whose_record_is_lost_are_drawn_anew(measure: Any, tmp_path: Path) -> None:
    wanted = measure(row("int8"))
    for path in (tmp_path / "work").rglob("drawn.json"):
        path.write_text("{")
    drawer = Drawer()
    assert measure(row("int8"), drawer=drawer) == wanted
    assert len(drawer.drawn) == 10


def test_report_pictures_are_the_worst_the_middle_and_the_best(measure: Any, tmp_path: Path) -> None:
    # int8 pictures of seeds 100 to 104 are off by 4, 5, 6, 7 and 4 levels.
    rows, _ = measure(row("fp16"), row("int8"), pictures=tmp_path / "bench.pictures")
    shown = [int(Path(name).stem) for name in rows[1].pictures]
    assert sorted(offs("int8", TEN)[index] - 9 for index in shown) == [4, 5, 7]
    assert shown == sorted(shown)
    for each, place in zip(rows, ("000-latentrt-fp16", "001-latentrt-int8"), strict=True):
        assert each.pictures == tuple(f"bench.pictures/{place}/{index:05}.png" for index in shown)
    for name in rows[1].pictures:
        index = int(Path(name).stem)
        off = offs("int8", TEN)[index]
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), picture(TEXTS[index], SEED + index, off))
        reference = np.asarray(Image.open(tmp_path / reference_name(name)))
        np.testing.assert_array_equal(reference, picture(TEXTS[index], SEED + index, 9))


def test_rows_without_pictures_or_reference_save_what_there_is(measure: Any, tmp_path: Path) -> None:
    drawer = Drawer(broken=(("latentrt", "fp32"), ("latentrt", "fp16")))
    rows, _ = measure(row("fp16"), row("int8"), pictures=tmp_path / "p", drawer=drawer)
    assert rows[0].pictures == ()
    assert rows[1].pictures == tuple(f"p/001-latentrt-int8/{index:05}.png" for index in range(3))
    assert sorted(path.name for path in (tmp_path / "p").rglob("*.png")) == ["00000.png", "00001.png", "00002.png"]


def with_psnr(given: Row, *values: float) -> Row:
    return replace(given, quality=Quality(prompts=len(values), psnr=values))


@pytest.mark.parametrize(
    ("rows", "count", "shown"),
    [
        ([with_psnr(row("fp16"), 1, 2, 3), with_psnr(row("int8"), 30, 10, 20)], 1, (1,)),
        ([with_psnr(row("int8"), 30, 10, 20), with_psnr(row("fp16"), 1, 2, 3)], 2, (0, 1)),
        ([with_psnr(row("int8"), 40, 20, 30), with_psnr(row("int8", TWENTY), 3, 2, 1)], 1, (2,)),
        ([with_psnr(row("int8", system="optimum"), 3, 2, 1), with_psnr(row("fp16"), 9, 7, 8)], 1, (1,)),
        ([with_psnr(row("fp32", system="optimum"), 3, 2, 1)], 1, (2,)),
        ([with_psnr(row("int8"), 5, 1, 4, 2, 3)], 3, (0, 1, 4)),
        ([with_psnr(row("int8"), 5, 1)], 3, (0, 1)),
        ([replace(row(), quality=Quality(prompts=2))], 3, (0, 1)),
        ([row()], 3, ()),
        ([with_psnr(row("int8"), 5, 1)], 0, ()),
    ],
)
def test_prompts_are_chosen_by_the_roughest_row(rows: list[Row], count: int, shown: tuple[int, ...]) -> None:
    assert shown_prompts(rows, count) == shown


def test_plans_are_checked() -> None:
    with pytest.raises(UsageError, match="quality: expected prompts, got none"):
        replace(PLAN, prompts=replace(PLAN.prompts, texts=()))
    with pytest.raises(UsageError, match="no negative number, got -1 and 3"):
        replace(PLAN, finest_steps=-1)
    with pytest.raises(UsageError, match="no negative number, got 100 and -3"):
        replace(PLAN, shown=-3)


def test_lpips_is_loaded_with_pytorch_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Path] = []
    module = ModuleType("latentrt.calibrate.lpips")
    module.open_lpips = asked.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    load_lpips(tmp_path)
    assert asked == [tmp_path]
    monkeypatch.setitem(sys.modules, module.__name__, None)
    with pytest.raises(UsageError, match=r"lpips: expected PyTorch.*latentrt\[calibrate\]"):
        load_lpips(tmp_path)
