"""Stages: made once, kept by content, gone on with, and never half taken."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from latentrt.calibrate.stages import Stage, run_stage, stage_of
from latentrt.runtime.errors import ArtifactError


def counted(calls: list[str], content: str = "x") -> tuple[object, object]:
    def make(folder: Path) -> str:
        calls.append("make")
        (folder / "data").write_text(content)
        return content

    def load(folder: Path) -> str:
        calls.append("load")
        found = (folder / "data").read_text()
        if found != content:
            raise ArtifactError("data: expected what was written, got something else.")
        return found

    return make, load


def run(stage: Stage, calls: list[str], said: list[str] | None = None) -> str:
    make, load = counted(calls)
    return run_stage(stage, make, load, say=(said if said is not None else []).append)  # type: ignore[arg-type]


def test_a_stage_is_made_once(tmp_path: Path) -> None:
    stage, calls = stage_of(tmp_path, "unet", "capture", {"steps": 20}), list[str]()
    assert [run(stage, calls), run(stage, calls)] == ["x", "x"]
    assert calls == ["make", "load"]


def test_other_inputs_make_another_stage_and_say_what_changed(tmp_path: Path) -> None:
    calls, said = list[str](), list[str]()
    run(stage_of(tmp_path, "unet", "capture", {"options": {"steps": 20, "seed": 0}}), calls)
    run(stage_of(tmp_path, "unet", "capture", {"options": {"steps": 30, "seed": 0}}), calls, said)
    assert calls == ["make", "make"]
    assert said == ["capture: made again, for these changed: options.steps"]


def test_what_was_damaged_is_made_again(tmp_path: Path) -> None:
    stage, calls, said = stage_of(tmp_path, "unet", "capture", {}), list[str](), list[str]()
    run(stage, calls)
    (stage.folder / "data").write_text("y")
    assert run(stage, calls, said) == "x"
    assert calls == ["make", "load", "make"]
    assert "expected what was written" in said[0]


def test_an_interrupted_stage_is_not_done_and_goes_on(tmp_path: Path) -> None:
    stage, said = stage_of(tmp_path, "unet", "capture", {}), list[str]()

    def interrupted(folder: Path) -> str:
        (folder / "half").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, interrupted, lambda folder: "")
    assert not stage.done
    assert run(stage, [], said) == "x"
    assert said == ["capture: going on where an earlier run stopped"]
    assert (stage.folder / "half").exists()
    assert stage.done


def test_two_at_once_make_it_once(tmp_path: Path) -> None:
    stage, calls = stage_of(tmp_path, "unet", "statistics", {}), list[str]()
    threads = [threading.Thread(target=run, args=(stage, calls)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == ["load", "load", "load", "make"]
