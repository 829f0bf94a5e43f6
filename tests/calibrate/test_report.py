import base64
import io
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from drawn import PROMPTS, STEPS, picture, small_plan
from html_page import Page, assert_self_contained
from PIL import Image

from latentrt.calibrate.budget import parse_budgets
from latentrt.calibrate.picture_metrics import spread
from latentrt.calibrate.pictures import picture_path
from latentrt.calibrate.prediction_noise import PredictionNoise, StepNoise
from latentrt.calibrate.report import Report, chosen_mix, page, write_report
from latentrt.calibrate.report_pictures import data_uri, shown_prompts
from latentrt.calibrate.report_plots import kind_shares, noise_plot, noisiest
from latentrt.calibrate.verification import Measured, Verification
from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.image import Pictures, save_png

DASH = "\N{EN DASH}"


def noise(db: float) -> PredictionNoise:
    steps = ((900.0, 100.0, db + 2), (100.0, 25.0, db - 2))
    guided = tuple(StepNoise(t, signal, signal * 10 ** (-own / 10)) for t, signal, own in steps)
    return PredictionNoise(raw=tuple(replace(step, noise=step.noise / 10) for step in guided), guided=guided)


def measured(precision: str, psnr: tuple[float, ...], *, verdicts: tuple[bool, ...], db: float) -> Measured:
    values = {"psnr": psnr, "ssim": tuple(value / 100 for value in psnr)}
    metrics = {name: spread(name, np.array(each)) for name, each in values.items()}
    return Measured({"unet": precision}, "onnxruntime CPU", precision, metrics, verdicts, noise(db))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("pictures")
    for precision in STEPS:
        (folder / precision).mkdir()
        for index, prompt in enumerate(PROMPTS):
            save_png(picture_path(folder / precision, index), picture(prompt, index, precision))
    all_right = (True,) * 4
    verification = Verification(
        component="unet",
        plan="plan-key",
        tested="int8",
        prompts=PROMPTS,
        seed=40,
        settings={"steps": 20, "sampler": "dpm++ 2m karras"},
        loras=(),
        judge="judge.py:shows",
        budgets=parse_budgets(["psnr=33,accuracy=0.3"]),
        measured={
            "fp32": Measured({"unet": "fp32"}, "onnxruntime CPU", "fp32", {}, all_right, None),
            "fp16": measured("fp16", (60.0, 61.0, 62.0, 63.0), verdicts=all_right, db=70),
            "int8": measured("int8", (33.0, 31.0, 36.0, 38.0), verdicts=(True, True, False, True), db=35),
        },
        machine={"platform": "linux_x86_64", "tools": {"onnxruntime": "1.2.3"}},
    )
    frontier = ((0.3, 45.0, None), (0.7, 35.0, 34.2), (1.0, 30.0, None))
    command = "latentrt calibrate a.bundle --budget psnr=33 && echo '<done>'"
    return Report("shapes & more", small_plan(), verification, frontier, folder, command, "2026-11-23")


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return page(report)


@pytest.fixture(scope="module")
def found(text: str) -> Page:
    return Page(text)


def test_a_page_needs_nothing_but_itself(text: str, found: Page) -> None:
    assert_self_contained(text, found)


def test_a_page_can_be_read_without_seeing_it(found: Page) -> None:
    assert found.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in found.all("img"))
    assert len(found.all("svg")) == 4
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in found.all("svg"))
    assert len(found.all("caption")) == len(found.all("table")) == 2
    assert all(cell["scope"] == "col" for cell in found.all("th"))
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_ids_of_a_page_differ(text: str, found: Page) -> None:
    assert len(found.ids) == len(set(found.ids))
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text)) <= set(found.ids)


def test_the_headline_is_the_verification_s(text: str, found: Page) -> None:
    assert "shapes & more: int8 holds its quality budget" in found.text
    assert "met PSNR >= 33 dB: 34.5 dB, met by 1.5 dB" in found.text
    assert "met loss of prompt accuracy <= 0.3: 0.250, met by 0.050" in found.text
    assert "not run on a GPU" in found.text
    assert "4 held-out prompts" in found.text
    tiles = dict(re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", text))
    assert tiles == {
        "multiplications in int8": "70.0%",
        "layers in int8": "2 of 4",
        "mean PSNR": "34.5 dB",
        "mean SQNR, guided": "35.0 dB",
        "prompt accuracy": "75.0%",
    }


def test_a_missed_budget_says_what_limits_it_and_a_gpu_is_named_where_one_ran(report: Report) -> None:
    verification = report.verification
    on_gpu = replace(verification.measured["int8"], backend="tensorrt_rtx sm89")
    measured = {**verification.measured, "int8": on_gpu}
    missed = replace(verification, budgets=parse_budgets(["psnr=40"]), measured=measured)
    found = Page(page(replace(report, verification=missed)))
    assert "int8 misses its quality budget" in found.text
    assert "missed by 5.5 dB" in found.text
    assert "most is from unet.b.to_q.weight (75%)" in found.text
    assert "measured on a GPU" in found.text
    assert "not run on a GPU" not in found.text


def test_the_table_of_precisions_has_the_measured_figures(report: Report, found: Page) -> None:
    rows = found.cells
    assert rows[0] == ["precision", "PSNR", "SSIM", "SQNR guided", "SQNR raw", "prompt accuracy"]
    assert rows[1] == ["fp32 reference", DASH, DASH, DASH, DASH, "100.0%"]
    int8 = report.verification.measured["int8"].metrics["psnr"]
    name, psnr, _, guided, raw, accuracy = rows[3]
    assert name == "int8 tested"
    assert psnr == f"34.5 dB {int8.low:.1f} to {int8.high:.1f} 95 %: 31.3, worst: 31.0"
    assert (guided, raw) == ("35.0 dB", "45.0 dB")
    assert accuracy.startswith("75.0% -25.0 points -75.0 to +0.0")
    assert rows[2][5] == "100.0% +0.0 points +0.0 to +0.0"


def test_the_table_of_layers_has_the_plan(found: Page) -> None:
    rows = found.cells[4:]
    assert rows[0] == ["layer", "kind", "precision", "multiplications", "noise", "why"]
    assert rows[1:] == [
        ["conv_in", "conv_in", "kept", "10.00%", DASH, "first layer"],
        ["a.to_q", "attn1.to_q", "int8", "40.00%", "10.00%", "within the budget"],
        ["a.ff.net.2", "ff.net.2", "kept", "20.00%", "60.00%", "too noisy <for> this & that"],
        ["b.to_q", "attn1.to_q", "int8", "30.00%", "30.00%", "within the budget"],
    ]


def decoded(uri: str | None) -> Pictures:
    assert uri is not None
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def test_pictures_are_shown_from_the_worst_to_the_best(report: Report, found: Page) -> None:
    assert [index for index, _ in shown_prompts(report.verification)] == [1, 0, 2, 3]
    images = found.all("img")
    assert [image["alt"] for image in images[:5]] == [
        "fp32: dark",
        "fp16: dark",
        "int8: dark",
        "fp16 less fp32, 32 times: dark",
        "int8 less fp32, 32 times: dark",
    ]
    for image, precision in zip(images[:3], STEPS, strict=True):
        np.testing.assert_array_equal(decoded(image["src"]), picture("dark", 1, precision))
    # Steps of 1 and 4 levels, 32-fold: the largest power of two that keeps 4 levels within 255.
    assert np.unique(decoded(images[3]["src"])).tolist() == [32]
    assert np.unique(decoded(images[4]["src"])).tolist() == [128]


def test_what_users_wrote_is_text_and_not_markup(text: str, found: Page) -> None:
    assert "a <b>dark</b> & stormy night" in found.text
    assert "&& echo '<done>'" in found.text
    assert "<b>" not in text
    assert "<done>" not in text


def test_large_pictures_are_averaged_down() -> None:
    large = np.zeros((1030, 600, 3), np.uint8)
    large[::3] = 90
    small = decoded(data_uri(large))
    assert small.shape == (344, 200, 3)
    assert np.unique(small[:-1]).tolist() == [30]


def test_the_chosen_plan_is_a_point_of_the_frontier(report: Report, found: Page) -> None:
    share, predicted, measured = chosen_mix(report)
    assert share == pytest.approx(0.7)
    assert predicted == pytest.approx(-10 * np.log10(4e-4))
    assert measured == pytest.approx(-10 * np.log10((10**-3.7 + 10**-3.3) / 2))
    assert f"predicted {predicted:.1f} dB, measured {measured:.1f} dB" in found.text


def test_shares_of_kinds_add_up(report: Report) -> None:
    kinds, noise, macs = zip(*kind_shares(report.plan), strict=True)
    assert kinds == ("ff.net.2", "attn1.to_q", "conv_in")
    assert noise == pytest.approx([0.6, 0.4, 0.0])
    assert macs == pytest.approx([0.2, 0.7, 0.1])
    assert [layer.noise for layer in noisiest(report.plan)] == [6e-4, 3e-4, 1e-4]


def test_plots_hold_the_figures_and_the_page_s_colours(report: Report, text: str) -> None:
    plots = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(plots) == 4
    for plot in plots:
        assert "currentColor" in plot
        assert not re.findall(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]\b", plot)
    steps, layers, kinds, frontier = plots
    assert all(label in steps for label in ("fp16, guided", "int8, raw", "int8, guided", "timestep"))
    assert "budget" not in steps
    assert all(label in layers for label in ("a.ff.net.2", "b.to_q", "kept"))
    assert all(label in kinds for label in ("attn1.to_q", "multiplications"))
    assert all(label in frontier for label in ("predicted", "measured", "chosen plan"))
    assert "budget, 31 dB" in noise_plot(report.verification, bound=31)


def test_what_was_not_measured_is_said(report: Report) -> None:
    verification = report.verification
    bare = {name: replace(each, noise=None, verdicts=None) for name, each in verification.measured.items()}
    plan = replace(report.plan, layers=tuple(replace(layer, noise=None) for layer in report.plan.layers))
    verification = replace(verification, measured=bare, budgets=parse_budgets(["psnr=33"]), judge=None)
    found = Page(page(replace(report, verification=verification, plan=plan, frontier=())))
    assert "no calls were captured" in found.text
    assert "the plan was not chosen by a solver" in found.text
    assert found.all("svg") == []


def test_how_it_was_made_is_told(found: Page) -> None:
    for fact in (
        "4 held out, seeds 40 to 43",
        "steps 20, sampler dpm++ 2m karras",
        "plan-key",
        "output-error",
        "alphas0.25, 0.5",
        "onnxruntime 1.2.3",
        "judge.py:shows",
    ):
        assert fact in found.text


def test_equal_reports_are_equal_files(report: Report, text: str, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", report)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text


def test_a_missing_picture_is_named(report: Report, tmp_path: Path) -> None:
    shutil.copytree(report.pictures, tmp_path / "out")
    picture_path(tmp_path / "out" / "int8", 2).unlink()
    with pytest.raises(ArtifactError, match=r"00002\.png: expected a picture"):
        page(replace(report, pictures=tmp_path / "out"))
