from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_bundle import make_bundle

from latentrt.runtime.cache_folder import VARIABLE
from latentrt.runtime.cli import main

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'latentrt[tensorrt-rtx]'")

SHAPES = ["--target", "sm86,sm89", "--batch", "1..2", "--size", "64"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))


def test_json_is_one_object_with_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "b")
    assert main(["build", str(bundle), *SHAPES, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert [(e["component"], e["targets"], e["status"]) for e in report["engines"]] == [
        (component, [sm], "built") for component in ("text_encoder", "unet", "vae_decoder") for sm in ("sm86", "sm89")
    ]
    for engine in report["engines"]:
        assert Path(engine["path"]).stat().st_size == engine["engine_bytes"]
        assert engine["weight_shares"] == engine["flops_shares"] == {"Half": 1.0}
        assert engine["layer_report"] is not None
        assert engine["note"] == "built ahead of time; not run on a GPU"
    assert set(report["planned_vram_bytes"]) == {"sm86", "sm89"}
    assert main(["build", str(bundle), *SHAPES, "--json"]) == 0
    assert {e["status"] for e in json.loads(capsys.readouterr().out)["engines"]} == {"up to date"}


def test_the_table_says_what_was_made_and_what_it_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "b")
    assert main(["build", str(bundle), *SHAPES, "--components", "unet"]) == 0
    out = capsys.readouterr().out
    sizes = "sizes: 64x64 pixels, 1..4 rows of 77 tokens (an image takes one row, with guidance two)"
    for text in ("unet", "sm89", "Half 100%", sizes, "planned VRAM on sm86", "built ahead of time; not run on a GPU"):
        assert text in out
    assert out.count(".engine") == 2


def test_an_engine_without_its_weights_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "b")
    words = ["--target", "sm89", "--components", "unet", "--size", "64", "--cache", "off", "--strip"]
    assert main(["build", str(bundle), *words]) == 0
    assert "without its weights: those of the bundle's graph are put in when it is loaded" in capsys.readouterr().out
    assert main(["build", str(bundle), *words, "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert (engine["thin"], engine["stripped"], engine["status"]) == (True, False, "up to date")


def test_a_second_try_is_said_with_what_was_tried_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "b")
    words = [
        "--target",
        "sm89",
        "--components",
        "unet",
        "--size",
        "64,128",
        "--batch",
        "1,2",
        "--workspace",
        "1",
        "--guidance",
        "on",
    ]
    assert main(["build", str(bundle), *words, "--cache", "off"]) == 0
    out = capsys.readouterr().out
    assert "64x64 pixels, 2 rows of 77 tokens; 64x64 pixels, 4 rows of 77 tokens; 128x128 pixels, 2 rows" in out
    assert "a build with workspace_mib 1, profiles 4 failed after" in out
    assert "a layer needs more scratch memory than --workspace allows" in out
    assert main(["build", str(bundle), *words, "--cache", "off", "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert engine["status"] == "up to date"
    assert (engine["profiles"], [attempt["settings"]["workspace_mib"] for attempt in engine["attempts"]]) == (4, [1])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--target", "sm90"], 2, "expected one of sm75"),
        (["--target", "sm86", "--size", "100"], 2, "multiples of 8"),
        (["--target", "sm86", "--components", "lora"], 2, "expected lora in fp16"),
        (["--target", "sm86", "--level", "6"], 2, "level: expected 0 (quick build) to 5"),
        (["--target", "sm86", "--tiling", "most"], 2, "tiling: expected none, fast, moderate or full"),
        (["--target", "sm86", "--hardware-compatibility", "ampere_plus"], 2, "--target sm86+sm89+sm120"),
        (["--target", "sm86", "--version-compatible"], 2, "version-compatible: expected full TensorRT"),
        (["--target", "sm86", "--timing-cache", "t.bin"], 2, "timing-cache: expected full TensorRT"),
        (["--target", "sm86", "--flavour", "tensorrt"], 1, "tensorrt: expected a GPU"),
    ],
)
def test_errors_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    bundle = make_bundle(tmp_path / "b")
    if "tensorrt" in words:
        pytest.importorskip("tensorrt_rtx")
    assert main(["build", str(bundle), *words, "--json"]) == code
    assert said in json.loads(capsys.readouterr().out)["error"]


def test_a_folder_that_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(tmp_path), "--target", "sm89"]) == 1
    assert "expected a latentrt bundle" in capsys.readouterr().err
