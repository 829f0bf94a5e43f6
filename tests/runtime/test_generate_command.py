"""The commands as a user types them: exit codes, messages, files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt.runtime.cli import main

PROMPT = "a small red circle on a blue background"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_draws_what_the_python_api_draws(
    shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from latentrt.runtime import Pipeline

    target = tmp_path / "out.png"
    code, out, _ = run(
        capsys, "generate", str(shapes_bundle), PROMPT, "-o", str(target), "--sampler", "DPM++ 2M",
        "--schedule", "karras", "--steps", "4", "--guidance", "5", "--seed", "42", "--json",
    )  # fmt: skip
    assert code == 0
    report = json.loads(out)
    assert report["pictures"] == [{"path": str(target), "prompt": PROMPT, "seed": 42}]
    assert report["backend"] == "onnxruntime CPU"
    wanted = Pipeline.load(shapes_bundle)(PROMPT, sampler="dpmpp_2m", schedule="karras", steps=4, guidance=5.0, seed=42)
    with Image.open(target) as image:
        np.testing.assert_array_equal(np.asarray(image), wanted.images[0])


def test_several_pictures_get_numbers(shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue star\n")
    code, _, _ = run(
        capsys, "generate", str(shapes_bundle), "--prompts", str(prompts), "--batch", "2", "--steps", "1",
        "-o", str(tmp_path / "p.png"),
    )  # fmt: skip
    assert code == 0
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [f"p-0{i}.png" for i in range(4)]


def test_a_warm_up_draws_a_step_of_the_size_and_changes_no_picture(
    shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentrt.runtime import Pipeline

    warmed: list[dict[str, Any]] = []
    warm_up = Pipeline.warm_up

    def noted(pipe: Pipeline, **settings: Any) -> None:
        warmed.append(settings)
        warm_up(pipe, **settings)

    monkeypatch.setattr(Pipeline, "warm_up", noted)
    words = ["generate", str(shapes_bundle), PROMPT, "--steps", "2", "--width", "64", "--height", "64", "--json"]
    for name, option in (("cold", []), ("warm", ["--warm-up", "--guidance", "3"])):
        code, out, _ = run(capsys, *words, "-o", str(tmp_path / f"{name}.png"), "--guidance", "3", *option)
        assert code == 0
        assert json.loads(out)["warm_up_seconds"] >= 0
    assert warmed == [{"width": 64, "height": 64, "guidance": 3.0, "batch": 1}]
    cold, warm = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("cold", "warm"))
    np.testing.assert_array_equal(warm, cold)


def test_quiet_where_nobody_watches(shapes_bundle: Path, tmp_path: Path) -> None:
    """No progress bar in a log, and nothing but JSON on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "latentrt.runtime.cli", "generate", str(shapes_bundle), PROMPT, "--steps", "1",
         "-o", str(tmp_path / "o.png"), "--json"], capture_output=True, text=True, check=True,
    )  # fmt: skip
    json.loads(done.stdout)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--steps", "0"], 2, "got 0"),
        (["--sampler", "DPM+ 2M"], 2, "DPM++ 2M"),
        (["--width", "100"], 2, "Use 96 or 104"),
        (["--batch", "0"], 2, "at least 1"),
        (["--steps", "many"], 2, "valid integer"),
        (["--no-such-option"], 2, "--no-such-option"),
        (["--precision", "int8"], 2, "int8"),
        (["--backend", "abacus"], 2, "abacus"),
        (["-o", "nowhere/out.png"], 2, "nowhere"),
        (["-o", "out.gif"], 2, ".png"),
        (["--sampler-option", "churn"], 2, "NAME=VALUE"),
        (["--sampler", "Euler", "--sampler-option", "s_chrun=1"], 2, "s_churn"),
        (["--control", "a.png@x"], 2, "FILE@SCALE"),
        (["--guidance-interval", "0.8-0.2"], 2, "rising"),
        (["--strength", "1.5"], 2, "strength"),
        (["--mask", "m.png"], 2, "image"),
        (["--rng", "dice"], 2, "dice"),
        (["--crop", "3"], 2, "two numbers"),
        (["--prompts", "missing.txt"], 2, "both or neither"),
    ],
)
def test_usage_errors(
    shapes_bundle: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, message: str
) -> None:
    found, out, err = run(capsys, "generate", str(shapes_bundle), PROMPT, *words)
    assert found == code
    assert message in err
    assert out == ""
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_an_error_as_json(shapes_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "generate", str(shapes_bundle), PROMPT, "--steps", "0", "--json")
    assert code == 2
    assert json.loads(out)["exit_code"] == 2
    assert err == ""


def test_debug_gives_the_traceback(shapes_bundle: Path) -> None:
    with pytest.raises(ValueError, match="num_inference_steps"):
        main(["generate", str(shapes_bundle), PROMPT, "--steps", "0", "--debug"])


@pytest.mark.parametrize("name", ["unet/model.onnx", "vae_decoder/model.fp16.onnx"])
def test_verify_names_the_changed_file(
    shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(shapes_bundle, bundle)
    assert run(capsys, "verify", str(bundle))[0] == 0
    with (bundle / name).open("r+b") as stream:
        stream.seek(1000)
        byte = stream.read(1)
        stream.seek(1000)
        stream.write(bytes([byte[0] ^ 1]))
    code, _, err = run(capsys, "verify", str(bundle))
    assert code == 1
    assert name in err
    code, out, _ = run(capsys, "verify", str(bundle), "--json")
    assert code == 1
    assert name in json.loads(out)["problems"][0]
    precision = "fp16" if "fp16" in name else "fp32"
    code, _, err = run(capsys, "generate", str(bundle), PROMPT, "--precision", precision)
    assert code == 1
    assert name in err


def test_a_truncated_graph_is_named(shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(shapes_bundle, bundle)
    os.truncate(bundle / "unet" / "model.onnx", 5000)
    code, _, err = run(capsys, "generate", str(bundle), PROMPT)
    assert code == 1
    assert "unet/model.onnx" in err
    assert "got 5000" in err


def test_a_newer_bundle_is_refused(shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(shapes_bundle, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    for command in (["generate", str(bundle), PROMPT], ["verify", str(bundle)], ["inspect", str(bundle)]):
        code, _, err = run(capsys, *command)
        assert code == 1
        assert "99" in err
        assert "upgrade" in err


def test_a_full_disk_is_one_message(
    shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    target = tmp_path / "o.png"
    code, _, err = run(capsys, "generate", str(shapes_bundle), PROMPT, "--steps", "1", "-o", str(target))
    assert code == 1
    assert "full disk" in err
    assert str(target) in err
    assert list(tmp_path.iterdir()) == []


def test_an_engine_of_another_machine_says_why(shapes_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "generate", str(shapes_bundle), PROMPT, "--backend", "tensorrt_rtx")
    assert code == 1
    assert "latentrt build" in err


def test_cancelling_exits_with_130(
    shapes_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("latentrt.runtime.drawing.denoise", cancel)
    code, _, err = run(capsys, "generate", str(shapes_bundle), PROMPT)
    assert code == 130
    assert "cancelled" in err


def test_inspect_as_json_is_the_manifest(shapes_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", str(shapes_bundle), "--json")
    assert code == 0
    assert json.loads(out) == json.loads((shapes_bundle / "manifest.json").read_text())


def test_inspect_for_people_names_every_graph(shapes_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", str(shapes_bundle))
    assert code == 0
    for name in ("text_encoder/model.onnx", "unet/model.fp16.onnx", "vae_decoder/model.onnx", "vae_encoder/model.onnx"):
        assert name in out


@pytest.mark.parametrize("command", ["export", "build", "generate", "replay", "inspect", "verify", "doctor"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"latentrt {command}" in " ".join(out.split())
    assert "--json" in out
