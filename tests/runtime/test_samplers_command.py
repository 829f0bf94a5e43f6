"""The list of samplers."""

from __future__ import annotations

import json

import pytest

from latentrt.runtime.cli import main
from latentrt.runtime.sampler_names import SAMPLERS


def test_every_sampler_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samplers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(SAMPLERS)
    assert any("DPM++ 2M " in line and "dpmpp_2m " in line and "DPMSolverMultistepScheduler" in line for line in lines)


def test_one_sampler_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samplers", "Euler a", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["samplers"]
    assert found["name"] == "euler_ancestral"
    assert found["options"]["eta"]["default"] == "1.0"
    assert "karras" in found["spacings"]
    assert main(["samplers", "Euler a"]) == 0
    assert "eta = 1.0" in capsys.readouterr().out


def test_an_unknown_sampler(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samplers", "Eulr a"]) == 2
    assert "Euler a" in capsys.readouterr().err
