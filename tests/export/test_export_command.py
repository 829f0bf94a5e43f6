from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from latentrt.runtime.cli import main
from latentrt.runtime.manifest import load_manifest


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny.bundle"))


def test_json_is_one_object_with_every_graph(
    bundle: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tiny_checkpoint), "-o", str(bundle), "--json"]) == 0
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert printed.err == ""
    assert content["bundle"] == str(bundle)
    manifest = load_manifest(bundle)
    assert len(content["artifacts"]) == len(manifest.artifacts) == 8
    for line in content["artifacts"]:
        artifact = manifest.artifact(line["component"], line["precision"])
        assert artifact is not None
        assert line["parity"] == artifact.parity
        assert line["size"] == sum(manifest.files[name].size for name in artifact.files)
        assert line["status"] == "up to date"
        assert line["nodes"] > 50


def test_the_table_names_every_graph(bundle: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tiny_checkpoint), "-o", str(bundle), "--precision", "fp16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if " fp16 " in line]
    assert [row[:2] for row in rows] == [
        [name, "fp16"] for name in ("text_encoder", "unet", "vae_decoder", "vae_encoder")
    ]
    assert not any(" fp32 " in line for line in lines)
    assert "up to date" in lines[1]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["CHECKPOINT", "-o", "OUT", "--precision", "int8"], 2, "latentrt calibrate"),
        (["CHECKPOINT", "-o", "OUT", "--precision", ""], 2, "fp32, fp16"),
        (["CHECKPOINT", "-o", "OUT", "--opset", "9"], 2, "got 9"),
        (["CHECKPOINT"], 2, "output"),
        (["nowhere", "-o", "OUT"], 1, "expected a diffusers checkpoint"),
    ],
)
def test_errors_are_one_message_and_a_code(
    words: list[str],
    code: int,
    said: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"CHECKPOINT": str(tiny_checkpoint), "OUT": str(tmp_path / "out"), "nowhere": str(tmp_path / "nowhere")}
    assert main(["export", *(names.get(word, word) for word in words)]) == code
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_an_error_in_json_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "out"), "--json"]) == 1
    assert "model_index.json" in json.loads(capsys.readouterr().out)["error"]


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    assert "latentrt export examples/shapes -o shapes.bundle" in capsys.readouterr().out
