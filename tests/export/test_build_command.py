from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_bundle import make_bundle

from latentrt.runtime.cli import main

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'latentrt[tensorrt-rtx]'")

SHAPES = ["--target", "sm86,sm89", "--batch", "1..2", "--size", "64"]


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
        assert engine["weight_shares"] == {"Half": 1.0}
        assert engine["note"] == "built ahead of time; not run on a GPU"
    assert set(report["planned_vram_bytes"]) == {"sm86", "sm89"}
    assert main(["build", str(bundle), *SHAPES, "--json"]) == 0
    assert {e["status"] for e in json.loads(capsys.readouterr().out)["engines"]} == {"up to date"}


def test_the_table_says_what_was_made_and_what_it_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "b")
    assert main(["build", str(bundle), *SHAPES, "--components", "unet"]) == 0
    out = capsys.readouterr().out
    for text in ("unet", "sm89", "fp16 (Half 100%)", "planned VRAM on sm86", "built ahead of time; not run on a GPU"):
        assert text in out
    assert out.count(".engine") == 2


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--target", "sm90"], 2, "expected one of sm75"),
        (["--target", "sm86", "--size", "100"], 2, "multiples of 8"),
        (["--target", "sm86", "--components", "lora"], 2, "expected lora in fp16"),
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
