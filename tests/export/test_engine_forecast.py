from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from engine_bundle import make_bundle

from latentrt.export import engine_forecast
from latentrt.export.build_options import BuildOptions
from latentrt.export.build_rates import BuildWork, recorded_builds
from latentrt.export.engine_forecast import (
    Forecast,
    PeakMemory,
    check_disk,
    describe_forecasts,
    duration,
    forecast,
    memory_warning,
    with_remaining,
)
from latentrt.export.engine_jobs import build_engines
from latentrt.export.engine_log import Progress
from latentrt.runtime.cache_folder import VARIABLE
from latentrt.runtime.errors import UsageError
from latentrt.runtime.machine import Machine, probe_machine

UNET = BuildWork("tensorrt_rtx", "unet", parameters=859_520_964, weight_bytes=1_719_000_000, nodes=2400)
NO_GPU = Machine(packages=probe_machine().packages, why_no_gpu="tests build ahead of time", platform="linux_x86_64")


def test_stable_diffusions_unet_is_foretold_from_the_measured_builds() -> None:
    """15 to 52 s and 6.2 GB were measured on 2 cores, and an engine of 1741 MB from 1719 MB of weights."""
    found = forecast(UNET, None)
    assert found.seconds is not None
    assert 15 < found.seconds < 52
    assert found.peak_bytes is not None
    assert 5e9 < found.peak_bytes < 8e9
    assert 1_719_000_000 < found.disk_bytes < 1_900_000_000
    assert forecast(UNET, None, stripped=True).disk_bytes < 150_000_000
    assert forecast(dataclasses.replace(UNET, flavour="tensorrt"), None).seconds is None


def test_what_is_left_goes_by_what_was_expected_and_starts_again_with_another_attempt() -> None:
    said: list[tuple[str, float]] = []
    clock = iter([100.0, 110.0, 130.0, 141.0, 150.0, 160.0, 170.0])
    report = with_remaining(lambda phase, part: said.append((phase, part)), 40, lambda: next(clock))
    for part in (0.0, 0.8, 0.8, 0.0, 0.5, 1.0):
        report("Building", part)
    assert said == [
        ("Building, about 30 s left", 0.0),
        ("Building, about 10 s left", 0.8),
        ("Building, expected to take 40 s", 0.8),
        ("Building, about 40 s left", 0.0),
        ("Building, about 30 s left", 0.5),
        ("Building", 1.0),
    ]


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 89, 100, 3599, 3700)] == [
        "0 s",
        "89 s",
        "2 min",
        "1 h 0 min",
        "1 h 2 min",
    ]


def test_one_line_for_all_builds() -> None:
    known = [Forecast(40, 6_100_000_000, 1_750_000_000), Forecast(5, 900_000_000, 250_000_000)]
    assert describe_forecasts(known) == "2 engines to build: about 45 s, up to 6.1 GB of memory, 2.00 GB of disk"
    unknown = describe_forecasts([*known[:1], Forecast(None, None, 0)])
    assert "a time that no earlier build on this machine tells" in unknown


def test_too_little_memory_is_said_and_too_little_disk_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = [Forecast(1, 8 * 10**9, 3 * 10**9), Forecast(1, 2 * 10**9, 2 * 10**9)]
    monkeypatch.setattr(engine_forecast, "memory_bytes", lambda: (8 * 10**9, 24 * 10**9))
    monkeypatch.setattr(engine_forecast, "disk_bytes", lambda folder: 5 * 10**9)
    assert memory_warning(needed) is None
    check_disk(needed, tmp_path)
    monkeypatch.setattr(engine_forecast, "memory_bytes", lambda: (8 * 10**9 - 1, 24 * 10**9))
    monkeypatch.setattr(engine_forecast, "disk_bytes", lambda folder: 5 * 10**9 - 1)
    assert "expected to need 8.0 GB, and 8.0 GB are available" in str(memory_warning(needed))
    with pytest.raises(UsageError, match=r"expected 5\.00 GB of free disk for the engines, got 5\.00 GB"):
        check_disk(needed, tmp_path)


def test_memory_is_counted_from_where_the_build_starts() -> None:
    before = np.ones(40_000_000)  # 320 MB that are gone again
    del before
    with PeakMemory() as first:
        held = np.ones(10_000_000)
    with PeakMemory() as second:
        pass
    if first.bytes is None or second.bytes is None:
        pytest.skip("this system does not count the peak of memory anew")
    assert first.bytes - second.bytes < 40e6
    assert first.bytes > held.nbytes


def test_a_build_says_first_what_it_will_take_and_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'latentrt[tensorrt-rtx]'")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(engine_forecast, "memory_bytes", lambda: (10**6, 10**9))
    bundle = make_bundle(tmp_path / "bundle")
    options = BuildOptions(target="sm89", components=("unet", "vae_decoder"), size="64")
    told: list[str] = []

    def build() -> list[bool]:
        return [result.built for result in build_engines(bundle, options, machine=NO_GPU, announce=told.append)]

    assert build() == [True, True]
    assert told[0].startswith("2 engines to build: about ")
    assert told[1].startswith("memory: the build is expected to need ")
    builds = recorded_builds(tmp_path / "cache")
    assert [build.work.component for build in builds] == ["unet", "vae_decoder"]
    assert [build.work.parameters for build in builds] == [288 + 288 + 512 + 1 + 2 + 3, 192 * 4 * 9]
    assert all(build.seconds > 0 and build.engine_bytes > 10_000 for build in builds)
    told.clear()
    assert build() == [False, False]
    assert told == []


def test_a_disk_that_is_too_small_is_found_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'latentrt[tensorrt-rtx]'")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    bundle = make_bundle(tmp_path / "bundle")
    titles: list[str] = []

    def progress(title: str) -> Progress:
        titles.append(title)
        return lambda _phase, _part: None

    monkeypatch.setattr(engine_forecast, "disk_bytes", lambda folder: 1000)
    with pytest.raises(UsageError, match="of free disk for the engines"):
        build_engines(bundle, BuildOptions(target="sm89", size="64"), machine=NO_GPU, progress=progress)
    assert titles == []
