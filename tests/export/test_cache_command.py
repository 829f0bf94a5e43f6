from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from engine_bundle import build_once, make_bundle

from latentrt.export.engine_cache import LIMIT_VARIABLE, entry_folders, key_lock
from latentrt.export.trace_cache import cached, default_cache
from latentrt.runtime.cache_folder import VARIABLE
from latentrt.runtime.cli import main
from latentrt.runtime.manifest import check_files, load_manifest

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'latentrt[tensorrt-rtx]'")

TRACED = {
    "component": "unet",
    "module": "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel",
    "parameters": {"conv_in.weight": [320, 4, 3, 3], "conv_in.bias": [320]},
    "opset": 20,
}
DAY = 86400


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
    build_once(monkeypatch)
    return tmp_path / "cache"


@pytest.fixture
def bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A bundle with two engines, which the cache keeps too, and beside them a traced graph."""
    bundle = make_bundle(tmp_path / "bundle")
    words = ["--target", "sm89", "--size", "64", "--components", "text_encoder,vae_decoder", "--json"]
    assert main(["build", str(bundle), *words]) == 0
    cached(default_cache(), TRACED, lambda: b"graph")
    capsys.readouterr()
    return bundle


def told(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    assert main(["cache", *words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_list_says_what_everything_is_of_and_what_it_takes(
    bundle: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = told(capsys, "list")
    engines = {record.key: record for record in load_manifest(bundle).engines}
    items = {item["key"]: item for item in report["items"]}
    assert items.keys() == {*engines, *(path.stem for path in default_cache().glob("*.onnx"))}
    for key, record in engines.items():
        names = (record.path, record.sidecar)
        assert items[key]["size"] >= sum((bundle / name).stat().st_size for name in names)
        assert (items[key]["kind"], items[key]["alone"], items[key]["problem"]) == ("engine", 0, None)
        assert items[key]["what"].startswith(f"{record.component} fp16 for sm89, ")
        assert items[key]["what"].endswith("built for tiny")
        assert 0 <= items[key]["days_since_use"] < 0.1
    (trace,) = [item for item in report["items"] if item["kind"] == "traced graph"]
    assert trace["what"] == "unet (UNet2DConditionModel, 0.0 M weights), opset 20"
    assert report["size_bytes"] == sum(item["size"] for item in items.values())
    shutil.rmtree(bundle)
    alone = {item["key"]: item["alone"] for item in told(capsys, "list")["items"]}
    assert alone == {key: item["size"] for key, item in items.items()}
    assert main(["cache", "list"]) == 0
    out = capsys.readouterr().out
    for text in ("vae_decoder fp16 for sm89", "UNet2DConditionModel", "just now", LIMIT_VARIABLE):
        assert text in out


def test_an_empty_cache_is_no_error_and_is_not_made(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, "list")["items"] == []
    assert told(capsys, "prune")["removed"] == []
    assert main(["cache", "list"]) == 0
    assert "nothing is kept here yet" in capsys.readouterr().out
    assert not cache.exists()


def test_prune_all_leaves_the_bundle_whole(bundle: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    report = told(capsys, "prune", "--all")
    assert len(report["removed"]) == 3
    assert told(capsys, "list")["items"] == []
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before
    check_files(bundle, load_manifest(bundle), load_manifest(bundle).files)


def _age(cache: Path, component: str, days: float) -> str:
    (folder,) = [path for path in entry_folders(cache) if _component(path) == component]
    os.utime(folder / "entry.json", (time.time() - days * DAY,) * 2)
    return folder.name


def _component(folder: Path) -> str:
    return str(json.loads((folder / f"{folder.name[:16]}.json").read_text())["component"])


def test_prune_takes_what_was_not_used_for_long_and_what_is_too_much(
    bundle: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = _age(cache, "text_encoder", 40), _age(cache, "vae_decoder", 20)
    assert told(capsys, "prune")["removed"] == []
    assert told(capsys, "prune", "--keep-gb", "0")["removed"] == []  # they take no room of their own
    assert [item["key"] for item in told(capsys, "prune", "--older-than", "30")["removed"]] == [old]
    shutil.rmtree(bundle)
    report = told(capsys, "prune", "--keep-gb", "0")
    assert [item["key"] for item in report["removed"]] == [new]
    assert report["freed_bytes"] == report["removed"][0]["size"] > 10_000
    assert [item["kind"] for item in told(capsys, "list")["items"]] == ["traced graph"]


def test_prune_without_options_takes_what_is_damaged(
    bundle: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = _age(cache, "vae_decoder", 0)
    (cache / "engines" / key / "entry.json").write_text("{")
    (trace,) = default_cache().glob("*.json")
    trace.unlink()
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out.count("damaged: ") == 2
    assert main(["cache", "prune"]) == 0
    out = capsys.readouterr().out
    assert f"removed engine {key[:16]}: " in out
    assert f"removed traced graph {trace.stem[:16]}: " in out
    assert {item["problem"] for item in told(capsys, "list")["items"]} == {None}


def test_an_engine_in_use_stays(bundle: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = _age(cache, "vae_decoder", 0)
    with key_lock(cache, key):
        report = told(capsys, "prune", "--all")
    assert report["in_use"] == [key]
    assert [item["key"] for item in told(capsys, "list")["items"]] == [key]


@pytest.mark.parametrize("words", [["--keep-gb", "nan"], ["--keep-gb", "-1"], ["--older-than", "inf"]])
def test_numbers_that_cannot_be_are_usage_errors(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a number from 0" in told(capsys, "prune", *words, code=2)["error"]
