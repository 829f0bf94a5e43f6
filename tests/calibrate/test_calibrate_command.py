"""The command: what its words mean, what it refuses before anything is computed, and what it prints."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from drawn import small_plan

from latentrt.calibrate import calibration, preparing
from latentrt.calibrate.apply import Applied
from latentrt.calibrate.budget import Budget
from latentrt.calibrate.calibration import Calibrated
from latentrt.calibrate.calibration_options import CalibrateOptions
from latentrt.calibrate.verification import Measured, Verification
from latentrt.runtime.cli import main
from latentrt.runtime.manifest import Artifact

HALF, FULL = (Artifact("unet", "int8", f"unet/model.int8{name}.onnx", (), 20, "", {}, {}, 1) for name in ("", ".cpu"))


def verified(accuracy: float) -> Verification:
    """Of a hundred prompts, all of which fp32 shows."""

    def measured(precision: str, right: float) -> Measured:
        verdicts = tuple(index < round(100 * right) for index in range(100))
        return Measured({"unet": precision}, "onnxruntime CPU", precision, {}, verdicts, None)

    return Verification(
        component="unet",
        plan="key",
        tested="int8",
        prompts=("a star",) * 100,
        seed=0,
        settings={},
        loras=(),
        judge="judge.py:shows",
        budgets=(Budget("accuracy", 0.02),),
        measured={"fp32": measured("fp32", 1), "fp16": measured("fp16", 1), "int8": measured("int8", accuracy)},
        machine={},
    )


@dataclass
class Called:
    """What the command asked for, and what becomes of it."""

    accuracy: float = 0.99
    options: list[CalibrateOptions] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)

    def prepare(self, bundle: Path, options: CalibrateOptions, **_told: Any) -> Any:
        self.options.append(options)

        class Prepared:
            plan = small_plan()

        return Prepared()

    def run(self, name: str) -> Any:
        def made(*_: Any, **_told: Any) -> Calibrated:
            self.runs.append(name)
            applied = Applied(HALF, FULL, Path("unet/int8.plan.json"), "new")
            return Calibrated(small_plan(), (), applied, verified(self.accuracy), Path(), ())

        return made


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    called = Called()
    monkeypatch.setattr(preparing, "prepare", called.prepare)
    for name in ("calibrate", "quantize_all", "verify_edited"):
        monkeypatch.setattr(calibration, name, called.run(name))
    return called


def test_words_become_options(called: Called) -> None:
    words = ["--steps", "12", "--sampler", "Euler", "--sampler-option", "s_churn=0.5", "--guidance", "4.5"]
    words += ["--size", "96x64", "--lora", "style:0.5", "--lora", "plain", "--seed", "7", "--counts", "9,2,3"]
    words += ["--budget", "psnr=31,ssim=0.9", "--budget", "flip=0.1", "--method", "percentile", "--percentile", "99"]
    words += ["--no-smooth", "--correct", "--precision", "fp8", "--solver", "greedy", "--rounds", "2"]
    assert main(["calibrate", "some.bundle", *words]) == 0
    (options,) = called.options
    assert options.settings == {
        "steps": 12,
        "sampler": "Euler",
        "sampler_options": {"s_churn": 0.5},
        "guidance": 4.5,
        "width": 96,
        "height": 64,
    }
    assert options.loras == {"style": 0.5, "plain": None}
    assert options.budgets == (Budget("psnr", 31), Budget("ssim", 0.9), Budget("flip", 0.1))
    assert (options.seed, options.counts, options.solver, options.rounds) == (7, (9, 2, 3), "greedy", 2)
    numbers = options.numbers
    assert (numbers.method, numbers.percent, numbers.smooth, numbers.correct) == ("percentile", 99, False, True)
    assert (numbers.kind, numbers.weight_only, numbers.seed) == ("fp8", False, 7)


def test_without_words_there_are_defaults(called: Called) -> None:
    assert main(["calibrate", "some.bundle"]) == 0
    assert called.options == [CalibrateOptions(settings={"steps": 20})]
    assert called.runs == ["calibrate"]
    assert main(["calibrate", "some.bundle", "--precision", "int8w"]) == 0
    assert (called.options[1].numbers.kind, called.options[1].numbers.weight_only) == ("int8", True)


def test_what_is_wanted_is_run(called: Called, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "some.bundle", "--all-layers"]) == 0
    assert main(["calibrate", "some.bundle", "--apply", "some.plan.json"]) == 0
    assert called.runs == ["quantize_all", "verify_edited"]
    capsys.readouterr()
    assert main(["calibrate", "some.bundle", "--sensitivity", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    # The noisiest first; what was not measured is not there.
    assert [row["noise"] for row in said["layers"]] == [6e-4, 3e-4, 1e-4]
    assert said["noise"] == pytest.approx(1e-3)
    assert len(called.runs) == 2
    assert main(["calibrate", "some.bundle", "--sensitivity"]) == 0
    assert "all together: 30.0 dB" in capsys.readouterr().out


@pytest.mark.parametrize(("accuracy", "code"), [(0.99, 0), (0.97, 1)])
def test_json_is_one_object_whatever_becomes_of_the_budget(
    called: Called, capsys: pytest.CaptureFixture[str], accuracy: float, code: int
) -> None:
    called.accuracy = accuracy
    assert main(["calibrate", "some.bundle", "--json"]) == code
    out = capsys.readouterr()
    said = json.loads(out.out)
    assert said["met"] == (code == 0)
    assert said["budgets"][0]["value"] == pytest.approx(1 - accuracy)
    assert (said["quantized_layers"], said["layers"], said["macs_share"]) == (2, 4, pytest.approx(0.7))
    assert out.err == ""


def test_a_missed_budget_is_an_error_that_says_what_limits_it(
    called: Called, capsys: pytest.CaptureFixture[str]
) -> None:
    called.accuracy = 0.97
    assert main(["calibrate", "some.bundle"]) == 1
    out = capsys.readouterr()
    assert "int8: 2 of 4 layers, 70.0% of the multiplications" in out.out
    assert "expected it to be held on the held-out prompts, got: loss of prompt accuracy <= 0.02: 0.030" in out.err
    assert "most is from unet.b.to_q.weight (75%), unet.a.to_q.weight (25%)" in out.err
    # For a comparison it is none.
    assert main(["calibrate", "some.bundle", "--all-layers"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "int4"], "precision: expected one of int8, fp8, int8w, got 'int4'"),
        (["--method", "best"], "method: expected one of minmax, percentile"),
        (["--solver", "guess"], "solver: expected one of greedy, milp, got guess"),
        (["--counts", "1,2"], "counts: expected three numbers such as 64,8,32, got '1,2'"),
        (["--seed", "-1"], "seed: expected 0 or more, got -1"),
        (["--rounds", "0"], "rounds: expected 1 or more, got 0"),
        (["--budget", "beauty=3"], "budget: expected one of psnr, ssim"),
        (["--budget", "psnr=nan"], "budget psnr: expected a bound above 0"),
        (["--sensitivity", "--all-layers"], "--sensitivity: expected it without --all-layers, got both"),
        (["--apply", "a.json", "--adopt", "b.onnx"], "--apply: expected it without --adopt, got both"),
        (["--sensitivity", "--report", "a.html"], "--report: expected a calibration to report on, got --sensitivity"),
        (["--report", "/none/such/a.html"], "expected a file to write in a folder that exists, got /none/such"),
        (["--report", "/"], "expected a file to write in a folder that exists, got /"),
        (["--lora", "a:b"], "lora: expected NAME or NAME:SCALE"),
        (["--size", "64"], "size: expected"),
    ],
)
def test_words_that_mean_nothing(
    called: Called, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["calibrate", "some.bundle", *words]) == 2
    assert message in capsys.readouterr().err
    assert not called.options
    assert not called.runs
