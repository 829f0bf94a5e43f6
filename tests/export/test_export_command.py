"""`latentrt export`: what it prints, where, and with which exit code. What it makes: test_export_sources, …_changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from tiny import COMPONENTS

from latentrt.runtime.cli import main
from latentrt.runtime.manifest import load_manifest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny.bundle"))


def cells(table: str) -> list[list[str]]:
    """The rows of the tables in an output."""
    lines = (line for line in table.splitlines() if line.startswith("│"))
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_json_is_one_object_with_every_graph(
    bundle: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tiny_checkpoint), "-o", str(bundle), "--json"]) == 0
    printed = capsys.readouterr()
    content = json.loads(printed.out)
    assert printed.err == ""
    assert content.pop("bundle") == str(bundle)
    artifacts = content.pop("artifacts")
    assert content == {"optimized": [], "left_out": [], "notes": []}
    manifest = load_manifest(bundle)
    assert len(artifacts) == len(manifest.artifacts) == 8
    for line in artifacts:
        artifact = manifest.artifact(line["component"], line["precision"])
        assert artifact is not None
        assert line["parity"] == artifact.parity
        assert line["parameters"] == artifact.parameters > 1000
        assert line["size"] == sum(manifest.files[name].size for name in artifact.files)
        assert (line["status"], line["reason"], line["seconds"]) == ("up to date", "", 0.0)
        assert line["nodes"] > 50


def test_the_table_names_every_graph(bundle: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tiny_checkpoint), "-o", str(bundle), "--precision", "fp16"]) == 0
    printed = capsys.readouterr()
    manifest = load_manifest(bundle)
    expected = []
    for name in COMPONENTS:
        artifact = manifest.artifact(name, "fp16")
        assert artifact is not None
        size = sum(manifest.files[file].size for file in artifact.files)
        parity = f"{artifact.parity['worst_relative_l2']:.2e}"
        largest = f"{artifact.parity['nearest_overflow'][0]['max_abs']:.4g}"
        expected.append([name, "fp16", f"{size / 1e6:.1f} MB", parity, largest, "up to date"])
    assert [[*row[:3], *row[4:]] for row in cells(printed.out)] == expected
    assert printed.out.splitlines()[-1] == f"bundle: {bundle}"
    assert printed.err == ""


def test_graphs_beside_those_of_every_runtime(
    bundle: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--uint8-vae, --prompt-keys and --target, made from graphs that the bundle holds already; --check as it says."""
    options = ["--precision", "fp32", "--uint8-vae", "--prompt-keys", "--target", "cpu", "--check", "quick"]
    words = ["export", str(tiny_checkpoint), "-o", str(bundle), *options]
    assert main([*words, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    derived = ["unet_prompt", "unet_cached", "vae_decoder_uint8"]
    assert {line["component"]: line["status"] for line in content["artifacts"]} == {
        **dict.fromkeys(COMPONENTS, "up to date"),
        **dict.fromkeys(derived, "exported"),
    }
    checks = {line["component"]: line["parity"]["check"] for line in content["artifacts"]}
    assert checks == {**dict.fromkeys(COMPONENTS, "full"), **dict.fromkeys(derived, "quick")}
    optimized = {(line["component"], line["target"]): line["status"] for line in content["optimized"]}
    assert {(name, "cpu") for name in COMPONENTS} <= optimized.keys()
    assert set(optimized.values()) == {"optimized"}
    assert main(words) == 0
    rows = cells(capsys.readouterr().out)
    assert [row[:2] for row in rows[:7]] == [[name, "fp32"] for name in (*COMPONENTS, *derived)]
    assert {(row[0], row[1]) for row in rows[7:]} == {(name, "fp32 for cpu") for name, _ in optimized}
    assert {row[-1] for row in rows} == {"up to date"}


def test_a_repository_of_the_hub(
    bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commit is a note on stderr and in the manifest, which goes by the repository's name."""
    files = [file.relative_to(tiny_checkpoint).as_posix() for file in tiny_checkpoint.rglob("*") if file.is_file()]
    asked = []

    def snapshot_download(repo_id: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision))
        return str(tiny_checkpoint)

    def model_info(repo_id: str, *, revision: str | None) -> SimpleNamespace:
        asked.append((repo_id, str(revision)))
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in files])

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=model_info))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert main(["export", "owner/tiny-sd@v2", "-o", str(bundle), "--json"]) == 0
    printed = capsys.readouterr()
    assert asked == [("owner/tiny-sd", "v2"), ("owner/tiny-sd", COMMIT)]
    assert printed.err == f"tiny-sd: commit {COMMIT} of owner/tiny-sd on the hub\n"
    assert json.loads(printed.out)["notes"] == [f"commit {COMMIT} of owner/tiny-sd on the hub"]
    manifest = load_manifest(bundle)
    assert manifest.name == "tiny-sd"
    assert manifest.source["hub"] == {"repo_id": "owner/tiny-sd", "commit": COMMIT}


def test_what_failed_goes_on_from_what_was_finished(
    bundle: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A note says where finished graphs are, also beside an error in JSON."""
    kept = bundle.parent / f".{bundle.name}.unfinished-1"
    kept.mkdir()
    words = ["export", str(tiny_checkpoint), "-o", str(bundle), "--precision", "int8", "--json"]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert "latentrt calibrate" in json.loads(printed.out)["error"]
    assert printed.err == f"finished graphs are kept in {kept}: the same command goes on from there\n"


def test_an_error_in_json_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "out"), "--json"]) == 1
    assert "model_index.json" in json.loads(capsys.readouterr().out)["error"]


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    assert "latentrt export examples/shapes -o shapes.bundle" in capsys.readouterr().out
