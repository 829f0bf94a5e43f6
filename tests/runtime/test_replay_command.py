"""A picture made again from its own file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentrt.runtime.cli import main
from latentrt.runtime.picture_metadata import read_metadata

PROMPT = "a (small:1.2) red circle on a blue background"


@pytest.fixture(scope="module")
def made(shapes_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures with as many settings as fit: the second has seed 8."""
    folder = tmp_path_factory.mktemp("made")
    words = ["--sampler", "Euler a", "--schedule", "karras", "--steps", "4", "--guidance", "4", "--seed", "7"]
    words += ["--batch", "2", "--negative", "green", "--eta", "0.7", "--clip-skip", "1", "--rng", "cuda"]
    words += ["--guidance-rescale", "0.3", "--guidance-interval", "0-0.8", "--width", "96", "--height", "64"]
    assert main(["generate", str(shapes_bundle), PROMPT, "-o", str(folder / "p.png"), *words]) == 0
    return folder


def replayed(
    capsys: pytest.CaptureFixture[str], picture: Path, bundle: Path, *words: str
) -> tuple[int, dict[str, object]]:
    capsys.readouterr()
    code = main(["replay", str(picture), "--bundle", str(bundle), "--json", *words])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("index", [0, 1])
def test_the_same_to_the_bit(
    made: Path, shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], index: int
) -> None:
    """Picture 0 exactly. Picture 1 was drawn in a batch; the backend may sum in another order when it is alone."""
    picture = made / f"p-0{index}.png"
    code, report = replayed(capsys, picture, shapes_bundle, "-o", str(tmp_path / "again.png"))
    with Image.open(picture) as before, Image.open(tmp_path / "again.png") as after:
        difference = np.abs(np.asarray(before).astype(int) - np.asarray(after).astype(int))
    assert difference.max() <= 1
    assert report["same"] is bool(difference.max() == 0)
    assert code == (0 if report["same"] else 1)
    assert set(report["differences"]) <= {"pixels"}  # type: ignore[call-overload]


def test_one_picture_alone_is_the_same_to_the_bit(
    shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "p.png"
    assert main(["generate", str(shapes_bundle), PROMPT, "-o", str(target), "--steps", "3", "--seed", "5"]) == 0
    assert replayed(capsys, target, shapes_bundle) == (0, {"same": True, "differences": {}})


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_lossy_file_replays_to_the_pixels_before_compression(
    shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    target = tmp_path / f"p{suffix}"
    assert main(["generate", str(shapes_bundle), PROMPT, "-o", str(target), "--steps", "2"]) == 0
    assert replayed(capsys, target, shapes_bundle)[0] == 0


def test_image_to_image_needs_its_picture(
    shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)).save(source)
    words = ["--image", str(source), "--strength", "0.5", "--steps", "4"]
    assert main(["generate", str(shapes_bundle), PROMPT, "-o", str(target), *words]) == 0
    assert replayed(capsys, target, shapes_bundle)[0] == 0
    moved = source.rename(tmp_path / "moved.png")
    capsys.readouterr()
    assert main(["replay", str(target), "--bundle", str(shapes_bundle)]) == 2
    assert "--image" in capsys.readouterr().err
    assert replayed(capsys, target, shapes_bundle, "--image", str(moved))[0] == 0


def test_a_difference_is_told(
    made: Path, shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = replayed(capsys, made / "p-00.png", shapes_bundle, "--precision", "fp16")
    assert code == 1
    assert report["same"] is False
    assert "precision" in report["differences"]  # type: ignore[operator]
    assert "PSNR" in report["differences"]["pixels"]  # type: ignore[index]
    capsys.readouterr()
    assert main(["replay", str(made / "p-00.png"), "--bundle", str(shapes_bundle), "--precision", "fp16"]) == 1
    assert "not the same" in capsys.readouterr().out


def test_another_bundle_is_told(
    made: Path, shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text encoder's fp16 graph does not matter to an fp32 picture, but the bundle is not the same any more."""
    other = tmp_path / "b"
    shutil.copytree(shapes_bundle, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["files"]["text_encoder/model.fp16.onnx"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    _, report = replayed(capsys, made / "p-00.png", other)
    assert "bundle" in report["differences"]  # type: ignore[operator]


def test_a_picture_of_another_program_is_refused(
    shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    assert main(["replay", str(plain), "--bundle", str(shapes_bundle)]) == 1
    assert "expected a record of latentrt, found none" in capsys.readouterr().err


def test_the_file_says_how_it_was_made(made: Path) -> None:
    metadata = read_metadata(made / "p-01.png")
    assert metadata.record is not None
    assert metadata.record["request"]["seed"] == 8
    assert metadata.record["precision"] == "fp32"
    assert metadata.parameters is not None
    for part in ("Negative prompt: green", "Seed: 8", "Clip skip: 2", "RNG: GPU", "Eta: 0.7", "Size: 96x64"):
        assert part in metadata.parameters


def test_a_textual_inversion_is_part_of_the_record(
    shapes_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import save_file

    width = json.loads((shapes_bundle / "text_encoder" / "config.json").read_text())["hidden_size"]
    word, target = tmp_path / "zorb.safetensors", tmp_path / "p.png"
    save_file({"emb_params": np.random.default_rng(0).standard_normal((2, width)).astype(np.float32)}, word)
    words = ["--embedding", str(word), "--steps", "2"]
    assert main(["generate", str(shapes_bundle), "a zorb circle", "-o", str(target), *words]) == 0
    assert replayed(capsys, target, shapes_bundle, "--embedding", str(word))[0] == 0
    code, report = replayed(capsys, target, shapes_bundle)
    assert code == 1
    assert "textual_inversions" in report["differences"]  # type: ignore[operator]
