"""`latentrt bench` as a user runs it, on the shapes bundle: real processes, a few short runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from bench_rows import bench_results

from latentrt.benchmarks.results_file import Results, load_results, save_results
from latentrt.runtime.cli import main

SHORT = (
    *("--size", "64", "--steps", "2", "--sampler", "Euler", "--prompts", "shapes", "--guidance", "5"),
    *("--warm-up", "1", "--min-runs", "2", "--max-runs", "2", "--seconds", "5", "--cold", "1", "--quality", "1"),
)


@pytest.fixture(scope="module")
def measured(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one run of the command wrote."""
    folder = tmp_path_factory.mktemp("measured")
    files = ["-o", str(folder / "r.json"), "--html", str(folder / "r.html"), "--markdown", str(folder / "r.md")]
    # fp4 no bundle holds, and optimum is not installed beside this project.
    wanted = ["--precision", "fp32,fp16,fp4", "--backend", "onnxruntime", "--against", "optimum"]
    assert main(["bench", str(shapes_bundle), *wanted, *SHORT, *files]) == 0
    return folder


@pytest.fixture
def results(measured: Path) -> Results:
    return load_results(measured / "r.json")


def test_every_part_of_a_row_is_filled(results: Results) -> None:
    rows = [row for row in results.rows if row.skipped is None]
    assert [row.case.subject.precision for row in rows] == ["fp32", "fp16"]
    for row in rows:
        assert len(row.runs) == 2
        assert all(len(run.calls) == 2 for run in row.runs)
        assert all(sum(run.stages.values()) <= run.seconds for run in row.runs)
        assert row.backend == "onnxruntime CPU"
        assert not row.on_gpu
        assert len(row.cold) == 1
        assert row.memory is not None
        assert row.memory.vram.reason
        assert row.disk is not None
        assert row.roofline is not None
        assert row.quality is not None
    assert results.overhead is not None
    fp32, fp16 = (row.quality for row in rows)
    assert fp32 is not None
    assert fp16 is not None
    # The reference is fp32 itself; half precision is near it.
    assert fp32.latent_l2 == (0.0, 0.0)
    assert 0 < fp16.latent_l2[-1] < 0.01
    assert fp16.psnr[0] > 40


def test_runs_take_turns_there_and_back(results: Results) -> None:
    turns = {run.turn: row.case.subject.precision for row in results.rows for run in row.runs}
    assert [turns[turn] for turn in sorted(turns)] == ["fp32", "fp16", "fp16", "fp32"]
    assert results.interleaved


def test_what_cannot_be_measured_is_a_row_that_says_why(results: Results) -> None:
    skipped = {row.case.subject.label: row.skipped for row in results.rows if row.skipped is not None}
    assert set(skipped) == {"latentrt fp4, onnxruntime", "optimum fp32, cpu"}
    assert str(skipped["latentrt fp4, onnxruntime"]).startswith("the bundle holds fp32, fp16")
    assert "--optimum-python" in str(skipped["optimum fp32, cpu"])


def test_the_file_says_what_it_is_of_and_names_no_folder(measured: Path, results: Results) -> None:
    assert results.model["name"] == "shapes"
    assert results.model["files"]["unet/model.onnx"]
    assert {"latentrt", "onnxruntime", "numpy"} <= set(results.packages)
    assert results.machine["cores"] > 0
    text = (measured / "r.json").read_text().replace(results.command.replace('"', '\\"'), "")
    assert str(measured.parent) not in text
    assert str(Path.home()) not in text


def test_reports_are_written_and_say_where_it_ran(measured: Path) -> None:
    for name in ("r.html", "r.md"):
        text = (measured / name).read_text()
        assert "not run on a GPU" in text
        assert "fp4" in text
    assert "data:image/png" in (measured / "r.html").read_text()


def test_a_measurement_beside_itself_has_not_changed(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(measured / "r.json")
    assert main(["bench", "compare", file, file]) == 0
    assert "not run on a GPU" in capsys.readouterr().out


def slowed(results: Results, factor: float) -> Results:
    def slow(row: Any) -> Any:
        runs = [dataclasses.replace(run, seconds=run.seconds * factor) for run in row.runs]
        return dataclasses.replace(row, runs=tuple(runs))

    return dataclasses.replace(results, rows=tuple(slow(row) for row in results.rows))


def test_compare_exits_1_past_the_threshold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, slower = tmp_path / "before.json", tmp_path / "slower.json"
    save_results(before, bench_results())
    save_results(slower, slowed(bench_results(), 1.5))
    assert main(["bench", "compare", str(before), str(slower), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["regressed"] is True
    assert main(["bench", "compare", str(slower), str(before)]) == 0
    assert main(["bench", "compare", str(before), str(slower), "--threshold", "0.9"]) == 0


def test_bad_input_is_one_error(shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, other = str(shapes_bundle), tmp_path / "other.json"
    other.write_text("{}")
    wanted = {
        ("bench", bundle, "--size", "65"): (2, "size: expected multiples of 8"),
        ("bench", bundle, "--sampler", "Eule"): (2, "sampler: expected"),
        ("bench", bundle, "--against", "comfy"): (2, "against: expected"),
        ("bench", bundle, "--checkpoint", str(tmp_path / "none")): (2, "checkpoint: expected an existing"),
        ("bench", bundle, "-o", str(tmp_path / "none" / "r.json")): (2, "expected a file to write in a folder"),
        ("bench", bundle, "--prompts", str(tmp_path / "none.txt")): (2, "none.txt"),
        ("bench", str(tmp_path / "none.bundle")): (1, "none.bundle"),
        ("bench", "compare", str(other), str(other)): (1, "expected a results file of latentrt bench"),
        ("bench", "compare", str(tmp_path / "a"), str(other)): (1, "expected a results file of latentrt bench"),
    }
    for words, (code, message) in wanted.items():
        assert main([*words]) == code, words
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert not list(tmp_path.glob("r.*"))


def test_help_of_the_command_is_that_of_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["bench"], ["bench", "--help"]):
        assert main(words) == 0
        assert "--against" in capsys.readouterr().out
    assert main(["bench", "compare", "--help"]) == 0
    assert "--threshold" in capsys.readouterr().out
