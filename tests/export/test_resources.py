from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from exports import failing

from latentrt.export import resources
from latentrt.export.exporter import export_checkpoint
from latentrt.export.graph_files import EXTERNAL_DATA_BYTES
from latentrt.export.resources import Needs, available_memory, check_resources, needs_of
from latentrt.runtime.errors import UsageError
from latentrt.runtime.manifest import load_manifest


def test_the_estimate_is_what_a_bundle_takes(shapes_bundle: Path) -> None:
    manifest = load_manifest(shapes_bundle)
    graphs = [artifact for artifact in manifest.artifacts if not artifact.target]
    needs = needs_of(
        [(artifact.component, artifact.precision) for artifact in graphs], {a.component: a.parameters for a in graphs}
    )
    real = sum(manifest.files[name].size for artifact in graphs for name in artifact.files)
    assert real == pytest.approx(needs.disk, rel=0.05)


def test_memory_is_for_one_graph_at_a_time_and_disk_for_all() -> None:
    parameters = {"unet": 10**9, "vae_decoder": 10**8}
    graphs = [("unet", "fp32"), ("unet", "fp16"), ("vae_decoder", "bf16"), ("vae_decoder", "mixed")]
    needs = needs_of(graphs, parameters)
    assert needs.disk == 4 * 10**9 + 2 * 10**9 + 2 * 10**8 + 2 * 10**8
    assert 5 * 10**9 < needs.memory < 6 * 10**9
    assert str(needs) == "about 6.4 GB of disk and 5.5 GB of memory"
    assert needs_of([], parameters).disk == 0


def test_weights_in_the_file_of_another_graph_count_once() -> None:
    names = ("unet", "unet_control", "unet_prompt", "unet_cached")
    for count, copies in ((EXTERNAL_DATA_BYTES, 1), (1000, 4)):
        needs = needs_of([(name, "fp32") for name in names], dict.fromkeys(names, count))
        assert needs.disk == copies * 4 * count
    # They lie beside it when they are checked, so a bundle's has to be copied.
    parameters = dict.fromkeys(names, EXTERNAL_DATA_BYTES)
    later = needs_of([("unet_prompt", "fp16"), ("unet_cached", "fp16")], parameters)
    assert later.disk == 2 * EXTERNAL_DATA_BYTES


@pytest.mark.parametrize(("free", "message"), [(10**9 - 1, "expected 1.0 GB of free disk, got 1.0 GB"), (10**9, None)])
def test_a_disk_that_is_too_small(
    free: int, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    target = tmp_path / "not" / "there"
    if message is None:
        check_resources(Needs(disk=10**9, memory=0), target)
    else:
        with pytest.raises(UsageError, match=message):
            check_resources(Needs(disk=10**9, memory=0), target)
    assert asked == [tmp_path]


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(resources, "_MEMINFO", meminfo)
    meminfo.write_text("MemTotal:       24626184 kB\nMemFree:        1 kB\nMemAvailable:   1000000 kB\nHugePages: 0\n")
    assert available_memory() == 1_024_000_000
    check_resources(Needs(disk=0, memory=1_024_000_000), tmp_path)
    with pytest.raises(UsageError, match=r"expected 2\.0 GB of available memory, got 1\.0 GB. .*fp16"):
        check_resources(Needs(disk=0, memory=2_000_000_000), tmp_path)


@pytest.mark.parametrize("content", [None, "MemTotal: 1 kB\n"])
def test_a_system_that_does_not_say_is_not_refused(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "_MEMINFO", tmp_path / "meminfo")
    if content is not None:
        (tmp_path / "meminfo").write_text(content)
    assert available_memory() is None
    check_resources(Needs(disk=0, memory=10**15), tmp_path)


def test_an_export_that_cannot_end_does_not_begin(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr("latentrt.export.export_run.capture_cases", failing(AssertionError("began")))
    with pytest.raises(UsageError, match=r"x\.bundle: expected 0\.0 GB of free disk, got 0\.0 GB"):
        export_checkpoint(
            tiny_checkpoint, tmp_path / "x.bundle", report=lambda message, share: said.append((message, share))
        )
    assert said[-1] == ("needs about 0.0 GB of disk and 1.5 GB of memory", 0.0)
    assert not list(tmp_path.iterdir())
