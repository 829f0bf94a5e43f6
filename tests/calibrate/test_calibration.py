"""A calibration from the bundle to the verified int8 network, and what is true of it by other means."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from drawn import small_plan
from linked_bundles import linked
from numpy.typing import NDArray

from latentrt.calibrate import calibration
from latentrt.calibrate.budget import Budget, parse_budgets
from latentrt.calibrate.calibration import Calibrated, calibrate, quantize_all
from latentrt.calibrate.calibration_options import CalibrateOptions
from latentrt.calibrate.capture_file import open_capture
from latentrt.calibrate.plan import Plan
from latentrt.calibrate.plan_file import load_plan
from latentrt.calibrate.planning import PlanOptions
from latentrt.calibrate.preparing import Prepared, network_on, prepare
from latentrt.calibrate.search import Choice, Trial, spare_db
from latentrt.calibrate.sensitivity import measured
from latentrt.calibrate.source import open_source
from latentrt.calibrate.verification import Outcome
from latentrt.runtime import Pipeline
from latentrt.runtime.cli import main

Numbers = NDArray[np.float64]
SETTINGS: dict[str, Any] = {"steps": 5, "height": 64, "width": 64, "guidance": 3.0, "sampler": "ddim"}
# Prompts to calibrate, to search and to verify with.
COUNTS = (8, 4, 3)
WORDS = ["--prompts", "shapes", "--counts", ",".join(map(str, COUNTS)), "--timesteps", "3", "--steps", "5"]
WORDS += ["--size", "64x64", "--guidance", "3", "--sampler", "ddim", "--seed", "5"]
PSNR, SQNR = 30.0, 33.0
BUDGETS = ["--budget", f"psnr={PSNR:g}", "--budget", f"sqnr={SQNR:g}"]
FILES = ("int8.plan.json", "int8.plan.safetensors", "model.int8.onnx", "model.int8.cpu.onnx")


@dataclass(frozen=True)
class Done:
    """A bundle that was calibrated, and what the command said of it."""

    bundle: Path
    said: dict[str, Any]
    page: str


@pytest.fixture(scope="module")
def done(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Not to be changed."""
    folder = tmp_path_factory.mktemp("calibration")
    bundle = linked(shapes_bundle, folder / "shapes.bundle")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words: printed.extend(map(str, words)))
        report = folder / "report.html"
        assert main(["calibrate", str(bundle), *WORDS, *BUDGETS, "--report", str(report), "--json"]) == 0
    (line,) = printed
    return Done(bundle, json.loads(line), report.read_text())


def quantized_weights(path: Path) -> set[str]:
    """Of the weights that a graph's Conv and MatMul nodes read, those that come as int8 through a DequantizeLinear."""
    graph = onnx.load(path).graph
    stored = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    restored = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }
    read = [node.input[1] for node in graph.node if node.op_type in ("Conv", "MatMul")]
    return {restored[name].removesuffix(".int8") for name in read if name in restored}


def test_the_chosen_layers_are_the_quantized_ones_in_both_graphs(done: Done) -> None:
    rows = json.loads((done.bundle / "unet/int8.plan.json").read_text())["layers"]
    chosen = {row["name"] for row in rows if row["quantized"]}
    for name in ("model.int8.onnx", "model.int8.cpu.onnx"):
        assert quantized_weights(done.bundle / "unet" / name) == chosen
    assert 20 < len(chosen) < len(rows) - 20
    assert (done.said["quantized_layers"], done.said["layers"]) == (len(chosen), len(rows))
    macs = {row["name"]: row["macs"] for row in rows}
    assert sum(macs.values()) == pytest.approx(1)
    assert done.said["macs_share"] == pytest.approx(sum(macs[name] for name in chosen))
    reasons = {row["name"].removeprefix("unet."): row["reason"] for row in rows}
    assert reasons["conv_in.weight"] == "fewer than 16 channels"
    assert reasons["time_embedding.linear_1.weight"] == "one vector a picture: nothing to gain"
    assert {row["reason"] for row in rows if row["quantized"]} == {"within the budget"}
    # What is chosen costs less noise for what it saves than what is not, on the whole.
    others = [row for row in rows if not row["quantized"] and row["noise"] is not None]
    price = [np.median([row["noise"] / row["gain"] for row in some]) for some in (rows_of(rows, chosen), others)]
    assert price[0] < price[1] / 3


def rows_of(rows: list[dict[str, Any]], names: set[str]) -> list[dict[str, Any]]:
    return [row for row in rows if row["name"] in names]


def guided_noise(bundle: Path, name: str, prompts: int = COUNTS[2]) -> dict[float, tuple[float, float]]:
    """By timestep, the power of fp32's guided predictions and of what a graph adds, by ONNX Runtime alone."""
    exact, tested = (ort.InferenceSession(bundle / "unet" / each) for each in ("model.onnx", name))
    found: dict[float, Numbers] = {}
    for call in calls_of(bundle, prompts):
        answers = [session.run(None, dict(call.feeds))[0].astype(np.float64) for session in (exact, tested)]
        # Negative prompt first: n + g (p - n).
        wanted, got = (answer[0] + SETTINGS["guidance"] * (answer[1] - answer[0]) for answer in answers)
        power = np.array([(wanted**2).sum(), ((got - wanted) ** 2).sum()])
        found[call.timestep] = found.get(call.timestep, np.zeros(2)) + power
    return {timestep: (float(power[0]), float(power[1])) for timestep, power in found.items()}


def calls_of(bundle: Path, prompts: int) -> Iterator[Any]:
    """The captured calls of a part, which has so many prompts."""
    folders = [path.parent for path in bundle.glob("calibration/unet/capture-*/capture.json")]
    (capture,) = (found for found in map(open_capture, folders) if len(found.prompts) == prompts)
    return capture.calls()


def simulated_noise(bundle: Path, plan: Plan) -> dict[float, tuple[float, float]]:
    """The same of a plan, as trials are measured."""
    source = open_source(bundle)
    with network_on(source, "cpu") as network:
        found = measured(network, {"plan": plan.quants()}, calls_of(bundle, COUNTS[2]))
    steps = zip(found.timesteps, found.signal, found.noise["plan"], strict=True)
    return {float(timestep): (float(signal), float(added)) for timestep, signal, added in steps}


def mean_share_db(noise: dict[float, tuple[float, float]]) -> float:
    return -10 * math.log10(np.mean([added / signal for signal, added in noise.values()]))


def test_the_graph_has_the_noise_that_was_simulated_and_predicted(done: Done) -> None:
    noise = guided_noise(done.bundle, "model.int8.cpu.onnx")
    plan = load_plan(done.bundle / "unet/int8.plan.json")
    # Smoothing that is folded into other weights, or into a branch's scale, rounds those otherwise than was simulated.
    assert mean_share_db(noise) == pytest.approx(mean_share_db(simulated_noise(done.bundle, plan)), abs=1)
    # Predicted layer by layer, with one random probe for each of the search's dozen calls.
    searched = guided_noise(done.bundle, "model.int8.cpu.onnx", COUNTS[1])
    assert plan.made["predicted_db"] == pytest.approx(mean_share_db(searched), abs=4)
    chosen = sum(layer.noise or 0.0 for layer in plan.layers if layer.quantized)
    assert plan.made["predicted_db"] == pytest.approx(-10 * math.log10(chosen))
    # What was verified is that graph.
    ratios = [10 * math.log10(signal / added) for signal, added in noise.values()]
    assert done.said["figures"]["int8"]["sqnr"] == pytest.approx(np.mean(ratios), abs=0.1)
    assert np.mean(ratios) >= SQNR


def test_the_budget_is_held_by_pictures_that_are_drawn_again(done: Done) -> None:
    prompts = json.loads((done.bundle / "calibration/unet/verification-int8/verification.json").read_text())["prompts"]
    pictures = []
    for precision in ("fp32", "int8"):
        with Pipeline.load(done.bundle, precision=precision, backend="onnxruntime") as pipeline:
            assert pipeline.precisions["unet"] == precision
            seeds = [5 + index for index in range(len(prompts))]
            pictures.append(pipeline(prompts, seed=seeds, **SETTINGS).images.astype(np.float64))
    errors = np.square(pictures[0] - pictures[1]).mean((1, 2, 3))
    psnr = float(np.mean(10 * np.log10(255**2 / errors)))
    assert psnr >= PSNR
    assert done.said["figures"]["int8"]["psnr"] == pytest.approx(psnr, abs=0.2)
    assert done.said["met"]
    assert done.said["figures"]["fp16"]["psnr"] > psnr


def test_the_page_and_the_object_tell_of_the_same_plan(done: Done) -> None:
    for budget in done.said["budgets"]:
        assert budget["budget"] in done.page.replace("&gt;", ">")
    assert done.said["report"].endswith("report.html")
    assert done.said["note"].startswith("measured with ONNX Runtime on the CPU")
    assert [row["layers"] for row in done.said["trials"]][-1] <= done.said["trials"][0]["layers"]
    assert done.said["graphs"] == ["unet/model.int8.onnx", "unet/model.int8.cpu.onnx"]


OPTIONS = CalibrateOptions(
    prompts="shapes", counts=COUNTS, timesteps=3, settings=SETTINGS, seed=5, numbers=PlanOptions(seed=5)
)
# Where a run is interrupted, by what it says that it does.
MOMENTS = ("captured prompt 4", "statistics: call 13", "planning: sensitivities: call 3", "draw a trial", "draw int8")


def test_an_interrupted_run_goes_on_at_its_stage_and_gives_the_same_files(
    done: Done, shapes_bundle: Path, tmp_path: Path
) -> None:
    """Also: the same seed gives the same plan."""
    bundle = linked(shapes_bundle, tmp_path / "shapes.bundle")
    options = CalibrateOptions(**{**vars(OPTIONS), "budgets": parse_budgets(BUDGETS[1::2])})
    left, said = list(MOMENTS), list[list[str]]()

    def interrupt(text: str, _share: float) -> None:
        if left and text.startswith(left[0]):
            left.pop(0)
            raise KeyboardInterrupt

    while True:
        said.append([])
        try:
            result = calibrate(
                prepare(bundle, options, say=said[-1].append, on_progress=interrupt),
                say=said[-1].append,
                on_progress=interrupt,
            )
            break
        except KeyboardInterrupt:
            assert not (bundle / "unet/model.int8.onnx").exists() or not left
    assert result.met
    assert not left
    names = [[line.split(":")[0] for line in lines if "kept from an earlier run" in line] for lines in said]
    kept = ["capture for calibration", "statistics", "capture for search", "plan"]
    assert names == [[], [], kept[:1], kept[:3], kept, [*kept, "capture for verification"]]
    going_on = [[line.split(":")[0] for line in lines if "going on where an earlier run" in line] for lines in said]
    assert going_on == [[], kept[:1], [], [], [], []]
    for name in FILES:
        assert (bundle / "unet" / name).read_bytes() == (done.bundle / "unet" / name).read_bytes(), name


def test_another_option_begins_at_the_first_stage_that_it_changes(done: Done, tmp_path: Path) -> None:
    bundle, said = shutil.copytree(done.bundle, tmp_path / "shapes.bundle"), list[str]()
    numbers = PlanOptions(seed=5, method="minmax", smooth=False)
    prepared = prepare(bundle, CalibrateOptions(**{**vars(OPTIONS), "numbers": numbers}), say=said.append)
    assert said[-1] == "plan: made again, for these changed: options.method, options.smooth"
    assert all("kept from an earlier run" in line for line in said[:-1])
    # All that can be, whatever it costs: the budget is not asked.
    result = quantize_all(prepared)
    quantized = [layer for layer in result.plan.layers if layer.quantized]
    assert len(quantized) == len(quantized_weights(bundle / "unet/model.int8.onnx")) > done.said["quantized_layers"]
    # Without smoothing, the graph computes what is simulated, but for last bits.
    noise, simulated = guided_noise(bundle, "model.int8.cpu.onnx"), simulated_noise(bundle, result.plan)
    assert noise.keys() == simulated.keys()
    for timestep, (signal, added) in simulated.items():
        assert noise[timestep][0] == pytest.approx(signal, rel=1e-3)
        assert noise[timestep][1] == pytest.approx(added, rel=0.1)
    assert mean_share_db(noise) < done.said["figures"]["int8"]["sqnr"] - 3


def test_a_budget_out_of_reach_says_how_near_the_nearest_came(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: (done.bundle / "unet" / name).stat().st_ino for name in FILES}
    assert main(["calibrate", str(done.bundle), *WORDS, "--budget", "sqnr=99", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert "expected SQNR of the guided prediction >= 99 dB, got " in said["error"]
    assert "most is from unet." in said["error"]
    # What was there is there still.
    assert before == {name: (done.bundle / "unet" / name).stat().st_ino for name in FILES}


BUDGET = Budget("sqnr", 30)
# Noise over signal of the small plan's two layers; one fits into what two do not.
TOGETHER, ALONE = frozenset({"unet.a.to_q.weight", "unet.b.to_q.weight"}), frozenset({"unet.a.to_q.weight"})


@dataclass
class HeldOut:
    """A search that finds plans by a limit of noise, and held-out prompts that think otherwise of them."""

    values: list[float]
    limits: list[float]
    applied: list[frozenset[str]]

    def search(self, _budgets: Any, *, limit: float) -> tuple[Trial, ...]:
        self.limits.append(limit)
        found = [Choice(TOGETHER, 4e-4, 0.7), Choice(ALONE, 1e-4, 0.4), Choice(frozenset(), 0.0, 0.0)]
        choice = next(each for each in found if each.noise <= limit)
        return (Trial(choice, {"sqnr": choice.predicted_db}, spare_db(BUDGET, choice.predicted_db), BUDGET),)

    @contextmanager
    def measuring(self, *_: Any, **__: Any) -> Iterator[Any]:
        yield self

    def verify(self, _prepared: Any, plan: Plan, trials: Any, *_: Any) -> Calibrated:
        self.applied.append(frozenset(plan.quants()))
        value = self.values.pop(0)
        outcome = Outcome(BUDGET, value, None, None)
        nothing = cast(Any, None)
        return cast(
            Calibrated,
            SimpleNamespace(plan=plan, trials=trials, outcomes=(outcome,), met=outcome.met, applied=nothing),
        )


def held_out_says(monkeypatch: pytest.MonkeyPatch, *values: float) -> HeldOut:
    found = HeldOut(list(values), [], [])
    monkeypatch.setattr(calibration, "measuring", found.measuring)
    monkeypatch.setattr(calibration, "_apply_and_verify", found.verify)
    return found


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    source = SimpleNamespace(bundle=SimpleNamespace(path=tmp_path), component="unet")
    return cast(
        Prepared, SimpleNamespace(source=source, options=CalibrateOptions(budgets=(BUDGET,)), plan=small_plan())
    )


def test_a_plan_that_held_out_prompts_refuse_is_chosen_anew_with_less_noise(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, said = held_out_says(monkeypatch, 28.0, 31.0), list[str]()
    result = calibrate(prepared, say=said.append)
    assert found.applied == [TOGETHER, ALONE]
    assert (result.met, result.plan.made["predicted_db"]) == (True, pytest.approx(40))
    # By what was missing, and a little.
    assert found.limits == [math.inf, pytest.approx(4e-4 * 10**-0.23)]
    assert said == ["held-out prompts miss a budget by 2.0 dB: 2.3 dB less noise are wanted"]


def test_where_no_plan_has_less_noise_the_last_one_counts(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    found, said = held_out_says(monkeypatch, 28.0, 29.9), list[str]()
    result = calibrate(prepared, say=said.append)
    assert found.applied == [TOGETHER, ALONE]
    assert not result.met
    # What was too little is doubled.
    assert found.limits[2] == pytest.approx(1e-4 * 10**-0.46)
    assert said[-1] == "no plan has so little noise"


def test_it_ends(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    found = held_out_says(monkeypatch, *[29.99] * 9)
    trials = (Trial(Choice(ALONE, 1e-4, 0.4), {"sqnr": 40.0}, 10.0, BUDGET),)
    monkeypatch.setattr(found, "search", lambda _budgets, *, limit: trials)
    assert not calibrate(prepared).met
    assert found.applied == [ALONE] * 4
