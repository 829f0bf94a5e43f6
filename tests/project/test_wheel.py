"""The wheel holds exactly the tracked files of the four folders, and installs one ONNX Runtime at most."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDERS = ("export", "runtime", "calibrate", "benchmarks")


@pytest.fixture(scope="session")
def wheel(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Built once for all of pytest-xdist's workers: two builds at once would share setuptools' folder."""

    def build(out: Path) -> None:
        # Where setuptools keeps the modules of earlier builds, also those that are gone.
        shutil.rmtree(ROOT / "build/lib", ignore_errors=True)
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
        subprocess.run(command, check=True, capture_output=True, text=True)

    return next(once("wheel", build).glob("*.whl"))


def test_holds_what_git_tracks(wheel: Path) -> None:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS]
    listed = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    tracked = [name for name in listed if name.count("/") == 1]  # not the scripts and results of benchmarks/
    held = {n.removeprefix("latentrt/") for n in zipfile.ZipFile(wheel).namelist() if n.startswith("latentrt/")}
    assert held == set(tracked)


def requirements(wheel: Path) -> list[Requirement]:
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return [Requirement(r) for r in Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])]


def installed_for(wheel: Path, *extras: str) -> set[str]:
    """What pip and uv install: the distribution without extras, and what each extra adds."""
    environments = [{"extra": extra} for extra in ("", *extras)]
    names = set()
    for requirement in requirements(wheel):
        if requirement.marker is None or any(requirement.marker.evaluate(e) for e in environments):
            names.add(requirement.name)
            if requirement.name == "latentrt":
                names |= installed_for(wheel, *requirement.extras)
    return names


@pytest.mark.parametrize(
    ("extras", "runtime"),
    [
        (("cpu",), "onnxruntime"),
        (("gpu",), "onnxruntime-gpu"),
        (("gpu", "export", "tensorrt", "calibrate"), "onnxruntime-gpu"),
        (("cpu", "export", "tensorrt-rtx"), "onnxruntime"),
        (("dev",), "onnxruntime"),
    ],
)
def test_one_onnxruntime(wheel: Path, extras: tuple[str, ...], runtime: str) -> None:
    found = {name for name in installed_for(wheel, *extras) if name.startswith("onnxruntime")}
    assert found == {runtime}


@pytest.mark.parametrize("extra", ["export", "calibrate", "tensorrt", "tensorrt-rtx"])
def test_no_other_extra_brings_one(wheel: Path, extra: str) -> None:
    assert not [name for name in installed_for(wheel, extra) if name.startswith("onnxruntime")]


def test_the_runtime_alone_needs_no_pytorch(wheel: Path) -> None:
    assert not installed_for(wheel) & {"torch", "diffusers", "transformers", "onnx"}
