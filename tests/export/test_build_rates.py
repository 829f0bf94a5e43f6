from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from latentrt.export.build_rates import (
    FILE,
    BuildFacts,
    BuildWork,
    expected_engine_bytes,
    expected_peak_bytes,
    expected_seconds,
    record_build,
    recorded_builds,
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "plan-activation.json"
UNET = BuildWork("tensorrt_rtx", "unet", parameters=859_520_964, weight_bytes=1_719_042_944, nodes=1501)
VAE = BuildWork("tensorrt_rtx", "vae_decoder", parameters=49_490_199, weight_bytes=98_980_398, nodes=291)
SDXL = BuildWork("tensorrt_rtx", "unet", parameters=2_567_463_684, weight_bytes=5_134_928_896, nodes=4011)


@pytest.mark.parametrize(
    ("case", "work", "seconds"),
    [
        ("unet 512 batch 1 sm89 guidance both", UNET, 23.0),
        ("vae_decoder 512 batch 1 sm89 guidance on", VAE, 1.6),
    ],
)
def test_the_shipped_rates_are_near_the_builds_they_came_from(case: str, work: BuildWork, seconds: float) -> None:
    # Seconds of the same builds on a quiet machine; those of the results were taken beside other work.
    assert expected_seconds(work) == pytest.approx(seconds, rel=0.1)
    built = json.loads(RESULTS.read_text())["cases"][case]["builder"]
    assert expected_peak_bytes(work) == pytest.approx(built["peak_bytes"], rel=0.1)
    assert expected_engine_bytes(work) == pytest.approx(built["engine_bytes"], rel=0.01)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_memory_and_disk_of_int8_builds_go_by_its_own_bytes(family: str, precision: str) -> None:
    """By parameters, an int8 build of SD 1.5 would be foretold with 1.5 times its memory."""
    built = json.loads((RESULTS.parent / "build-cpu.json").read_text())["families"][family][f"{precision} sm89"]
    fp16 = UNET if family == "sd1" else SDXL
    work = dataclasses.replace(fp16, weight_bytes=built["weight_bytes"])
    assert expected_peak_bytes(work) == pytest.approx(built["peak_bytes"], rel=0.1)
    assert expected_engine_bytes(work) == pytest.approx(built["engine_bytes"], rel=0.02)


def test_a_build_on_this_machine_corrects_them(tmp_path: Path) -> None:
    shipped = expected_seconds(UNET)
    assert shipped is not None
    for factor in (3.0, 2.0, 2.0):
        record_build(tmp_path, BuildFacts(UNET, factor * shipped, 1, peak_bytes=10**10))
    other = expected_seconds(SDXL)
    assert other is not None
    assert expected_seconds(SDXL, tmp_path) == pytest.approx(2 * other)
    assert expected_peak_bytes(UNET, tmp_path) == 10**10


def test_what_was_never_measured_is_not_known_until_it_was(tmp_path: Path) -> None:
    work = BuildWork("tensorrt", "unet", parameters=10**8, weight_bytes=2 * 10**8, nodes=500)
    record_build(tmp_path, BuildFacts(UNET, 40.0, 1))
    assert (expected_seconds(work, tmp_path), expected_peak_bytes(work, tmp_path)) == (None, None)
    record_build(tmp_path, BuildFacts(work, 600.0, 1))
    assert expected_seconds(work, tmp_path) == pytest.approx(600.0)
    assert expected_peak_bytes(work, tmp_path) is None


def test_every_profile_is_compiled_anew() -> None:
    once, twice = (expected_seconds(dataclasses.replace(UNET, profiles=count)) for count in (1, 2))
    assert once is not None
    assert twice == pytest.approx(2 * once, rel=0.02)


WRONG_TYPE = json.dumps([dataclasses.asdict(BuildFacts(UNET, 40.0, 1)) | {"seconds": "many"}])


@pytest.mark.parametrize("content", ["", "{", "[1]", '[{"work": {}}]', '{"a": 1}', WRONG_TYPE])
def test_a_damaged_file_is_as_none_and_is_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    assert recorded_builds(tmp_path) == []
    record_build(tmp_path, BuildFacts(UNET, 40.0, 7))
    assert recorded_builds(tmp_path) == [BuildFacts(UNET, 40.0, 7)]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    record_build(tmp_path / "file", BuildFacts(UNET, 40.0, 7))
    assert expected_seconds(UNET, tmp_path / "file") == expected_seconds(UNET)
