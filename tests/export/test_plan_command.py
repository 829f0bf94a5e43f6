from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engine_bundle import make_bundle

from latentrt.export.build_rates import recorded_builds
from latentrt.runtime.cli import main


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def report(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out)
    return found


def test_json_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = report(capsys, str(make_bundle(tmp_path / "b")), "--size", "128", "--batch", "2", "--vram", "RTX 4060")
    parts = {part["component"]: part for part in plan["components"]}
    assert list(parts) == ["text_encoder", "unet", "vae_decoder"]
    unet = parts["unet"]
    assert unet["shapes"] == {"sample": [4, 4, 16, 16], "timestep": [4], "encoder_hidden_states": [4, 77, 64]}
    # Float32 in and out: twice the latents, the timesteps, the text.
    assert unet["tensor_bytes"] == 4 * (2 * 4 * 4 * 16 * 16 + 4 + 4 * 77 * 64)
    # Half: 8 x 4 and 4 x 8 kernels of 3 x 3, 64 x 8 for the text; and three int64 constants of 1, 2 and 3 axes.
    assert unet["weight_bytes"] == 2 * (2 * 8 * 4 * 9 + 64 * 8) + 8 * 6
    assert unet["activation_source"] == "estimate"
    assert unet["estimate_error"] is None
    assert plan["card"] == {"name": "RTX 4060", "memory_bytes": 8 << 30, "context_bytes": (24 * 3 + 128) << 20}
    everything = next(policy for policy in plan["policies"] if policy["policy"] == "all")
    assert everything["peak_bytes"] == (
        plan["card"]["context_bytes"]
        + sum(part["weight_bytes"] + part["tensor_bytes"] for part in parts.values())
        + max(part["activation_bytes"] for part in parts.values())
    )
    assert everything["spare_bytes"] == (8 << 30) - everything["peak_bytes"]
    assert (plan["fits"], plan["ways_to_fit"]) == ("all", [])
    assert plan["disk_bytes"] == sum(part["engine_bytes"] for part in parts.values())
    assert "not measured on a GPU" in plan["notes"][0]
    assert plan["notes"][-1] == "planned; not run on a GPU"


def test_an_engine_for_the_shape_gives_the_builders_figure_and_judges_the_estimate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: see the README")
    bundle = make_bundle(tmp_path / "b")
    before = report(capsys, str(bundle), "--size", "64")
    assert main(["build", str(bundle), "--size", "64", "--target", "sm89", "--components", "unet", "--json"]) == 0
    [engine] = json.loads(capsys.readouterr().out)["engines"]
    unet = next(
        part for part in report(capsys, str(bundle), "--size", "64")["components"] if part["component"] == "unet"
    )
    assert (unet["activation_source"], unet["activation_bytes"]) == ("builder", engine["activation_bytes"])
    assert unet["engine_bytes"] == engine["engine_bytes"]
    estimate = next(part for part in before["components"] if part["component"] == "unet")["activation_bytes"]
    assert unet["estimate_error"] == pytest.approx(estimate / engine["activation_bytes"] - 1)
    assert abs(unet["estimate_error"]) < 0.15
    # Of another size, or of rows that are not left open, the engine says nothing.
    for words in (["--size", "128"], ["--size", "64", "--guidance", "on"]):
        other = report(capsys, str(bundle), *words)["components"]
        assert {part["activation_source"] for part in other} == {"estimate"}
    assert [build.work.component for build in recorded_builds(cache)] == ["unet"]


def test_where_nothing_fits_it_says_by_how_much_and_what_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = str(make_bundle(tmp_path / "b"))
    words = ["--size", "1024", "--batch", "4"]
    needed = min(policy["peak_bytes"] for policy in report(capsys, bundle, *words, "--vram", "1GB")["policies"])
    plan = report(capsys, bundle, *words, "--vram", f"{(needed - 1) // 2**20}MiB")
    assert plan["fits"] is None
    assert 0 < min(-policy["spare_bytes"] for policy in plan["policies"]) <= 2**20
    ways = {way["what"].split()[0]: way for way in plan["ways_to_fit"]}
    assert ways
    assert all(way["fits"] and way["spare_bytes"] >= 0 for way in ways.values())
    assert main(["plan", bundle, *words, "--vram", f"{(needed - 1) // 2**20}MiB"]) == 0
    out = capsys.readouterr().out
    assert "nothing fits" in out
    assert "would fit" in out


def test_for_full_tensorrt_it_says_what_was_not_compared_and_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = report(capsys, str(make_bundle(tmp_path / "b")), "--flavour", "tensorrt")
    assert any("not compared with a build" in note for note in plan["notes"])
    assert (plan["build_seconds"], plan["build_peak_bytes"]) == (None, None)


def test_the_table_has_every_component_and_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(make_bundle(tmp_path / "b"))]) == 0
    out = capsys.readouterr().out
    words = ("text_encoder", "unet", "vae_decoder", "all", "swap", "stream", "from 4 GiB", "not run on a GPU")
    assert [word for word in words if word not in out] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vram", "rtx 4061"], "a card such as RTX 4060"),
        (["--vram", "8"], "expected a size such as 8GB"),
        (["--size", "100"], "multiples of 8"),
        (["--precision", "int8"], "expected unet in int8, found fp16. Run: latentrt calibrate"),
        (["--flavour", "onnx"], "expected auto, tensorrt or tensorrt_rtx"),
    ],
)
def test_errors_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["plan", str(make_bundle(tmp_path / "b")), *words, "--json"]) == 2
    assert said in json.loads(capsys.readouterr().out)["error"]
