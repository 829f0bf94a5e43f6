"""Stages are done once, in their order, with what they need."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import project_bench
import pytest
from project_bench import is_done, keep, keys_of, run_stages, with_needs
from project_stages import Command, Plan, Stage, stages_of
from typer.main import get_command

from latentrt.runtime.machine import Gpu, Machine

GRAPHS = {"unet/model.onnx": "ab"}


def plan(**changes: Any) -> Plan:
    values = {"out": "build/x", "bundle": "b", "gpu": False, "full_size": 256, "full_steps": 4}
    return Plan(**{**values, **changes})


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A repository whose commands only write the files that their -o, --json and --markdown name."""
    words: list[str] = []

    def write(command: list[str], *, cwd: Path) -> Any:
        words.append(" ".join(command))
        for option, value in pairwise(command):
            if option in ("-o", "--json", "--markdown"):
                (cwd / value).write_text("{}")
        return type("Done", (), {"returncode": int("fails" in command)})

    monkeypatch.setattr(project_bench, "ROOT", tmp_path)
    monkeypatch.setattr("project_bench.subprocess.run", write)
    monkeypatch.setattr(project_bench, "graphs_of", lambda bundle: GRAPHS)
    return words


@pytest.mark.parametrize("gpu", [False, True])
def test_every_option_is_one_of_latentrt_bench(gpu: bool) -> None:
    from latentrt.benchmarks.bench_command import app

    known = {name for option in get_command(app).commands["run"].params for name in option.opts}  # type: ignore[attr-defined]
    commands = [command.words for stage in stages_of(plan(gpu=gpu)) for command in stage.commands]
    benches = [words for words in commands if words[:2] == ("latentrt", "bench")]
    assert len(benches) == 5
    for words in benches:
        assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("gpu", [False, True])
def test_every_path_of_the_repository_is_there(gpu: bool) -> None:
    root = Path(__file__).parents[2]
    words = {word for stage in stages_of(plan(gpu=gpu)) for command in stage.commands for word in command.words}
    named = {word.split("=")[-1].split(":")[0] for word in words if word.startswith(("benchmarks/", "examples/"))}
    assert named
    assert all((root / name).exists() for name in named)


def test_on_a_gpu_all_is_held_against_pytorch() -> None:
    words = [" ".join(command.words) for stage in stages_of(plan(gpu=True)) for command in stage.commands]
    benches = [line for line in words if line.startswith("latentrt bench")]
    assert all("--backend cuda,tensorrt" in line for line in benches)
    assert all("--against diffusers" in line for line in benches)
    assert sum("torch-compile" in line for line in benches) == 2


@pytest.mark.parametrize("gpu", [False, True])
def test_what_a_stage_needs_stands_before_it(gpu: bool) -> None:
    before: set[str] = set()
    for stage in stages_of(plan(gpu=gpu)):
        assert set(stage.needs) <= before
        before.add(stage.name)


def test_needs_come_first() -> None:
    names = [stage.name for stage in with_needs(stages_of(plan()), ["full-size", "samplers"])]
    assert names == ["export-full-size", "full-size", "samplers"]


def test_a_stage_that_there_is_not_is_refused() -> None:
    with pytest.raises(SystemExit, match="expected stages of bundle, export"):
        with_needs(stages_of(plan()), ["speed"])


def test_finished_stages_are_kept(ran: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run_stages(plan(), ["growth"], force=False)
    first = len(ran)
    assert first == 1 + 3
    run_stages(plan(), ["growth"], force=False)
    assert len(ran) == first
    assert "growth: kept, it took 0 s" in capsys.readouterr().out


def test_force_runs_what_is_named_and_not_what_it_needs(ran: list[str]) -> None:
    run_stages(plan(), ["growth"], force=False)
    ran.clear()
    run_stages(plan(), ["growth"], force=True)
    assert len(ran) == 3
    assert all("bench" in line for line in ran)


def test_a_stage_runs_again_when_a_file_of_it_is_gone(ran: list[str], tmp_path: Path) -> None:
    run_stages(plan(), ["samplers"], force=False)
    (tmp_path / "build/x/samplers-cpu.json").unlink()
    run_stages(plan(), ["samplers"], force=False)
    assert len(ran) == 2


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (lambda stages, files: keys_of(stages, {**files, "unet/model.onnx": "cd"}), {"growth", "samplers"}),
        (lambda stages, files: keys_of(stages_of(plan(quick=True)), files), {"growth", "samplers"}),
        (lambda stages, files: keys_of(stages_of(plan(full_steps=8)), files), set()),
    ],
)
def test_keys_follow_commands_and_graphs(
    change: Callable[[tuple[Stage, ...], dict[str, str]], dict[str, str]], again: set[str]
) -> None:
    stages = stages_of(plan())
    before, after = keys_of(stages, GRAPHS), change(stages, GRAPHS)
    assert {name for name in ("growth", "samplers") if before[name] != after[name]} == again


def test_what_needs_another_stage_has_that_in_its_key() -> None:
    first, second = (Stage(name="a", about="", commands=()), Stage(name="b", about="", commands=(), needs=("a",)))
    changed = Stage(name="a", about="", commands=(Command(("python", "x")),))
    assert keys_of([first, second], {})["b"] != keys_of([changed, second], {})["b"]


def test_a_failed_command_ends_the_run_and_leaves_the_stage_open(
    ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(name="a", about="", commands=(Command(("python", "fails")),))
    monkeypatch.setattr(project_bench, "stages_of", lambda plan: (stage,))
    with pytest.raises(SystemExit, match="python fails failed with exit 1"):
        run_stages(plan(), ["a"], force=False)
    assert not (tmp_path / "build/x/finished.json").exists()


def test_what_may_fail_is_said(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Stage(name="a", about="", commands=(Command(("python", "fails"), may_fail=True),))
    monkeypatch.setattr(project_bench, "stages_of", lambda plan: (stage,))
    run_stages(plan(), ["a"], force=False)
    assert "failed with exit 1; the rows that need it will say why" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(project_bench, "probe_machine", lambda: Machine(why_no_gpu="no NVIDIA driver"))
    for told in (["--gpu"], ["--gpu", "--check"]):
        assert project_bench.main(told) == 1
        assert "expected an NVIDIA GPU, got none: no NVIDIA driver" in capsys.readouterr().err
    monkeypatch.setattr(project_bench, "probe_machine", lambda: Machine(gpus=(Gpu("Example", "sm89", 2**34),)))
    assert project_bench.main(["--gpu", "--check"]) == 0


def test_a_missed_bar_is_an_exit_code(
    ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundle").mkdir()
    told = ["--only", "samplers", "--bundle", "bundle", "--out", "out"]
    rows = [{"sampler": "Euler", "ratio": 1.0, "bar": 2.0}]
    monkeypatch.setattr(project_bench, "run_stages", lambda *_, **__: [])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samplers-cpu.json").write_text(json.dumps({"rows": rows}))
    assert project_bench.main(told) == 1
    assert "MISSED: samplers" in capsys.readouterr().out
    rows[0]["ratio"] = 2.0
    (tmp_path / "out" / "samplers-cpu.json").write_text(json.dumps({"rows": rows}))
    assert project_bench.main(told) == 0


def test_results_are_kept_beside_those_that_were_not_measured(ran: list[str], tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "int8-cpu.json").write_text("earlier")
    keep(run_stages(plan(), ["end-to-end", "samplers"], force=False), tmp_path / "build/x", kept)
    names = {"end-to-end-cpu.json", "end-to-end-cpu.md", "export-cpu.json", "int8-cpu.json", "samplers-cpu.json"}
    assert {path.name for path in kept.iterdir()} == names
    assert (kept / "int8-cpu.json").read_text() == "earlier"


def test_what_was_only_tried_is_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        project_bench.main(["--quick", "--keep"])
    assert "expected a whole run" in capsys.readouterr().err


def test_a_list_runs_nothing(ran: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert project_bench.main(["--list", "--only", "full-size"]) == 0
    assert "--sampler 'DPM++ 2M'" in capsys.readouterr().out
    assert not ran


def test_is_done_wants_the_same_key(tmp_path: Path) -> None:
    stage = Stage(name="a", about="", commands=())
    assert is_done(stage, "k", {"a": {"key": "k"}}, tmp_path)
    assert not is_done(stage, "other", {"a": {"key": "k"}}, tmp_path)
