"""Fixtures of all folders: the shapes checkpoint, and its bundle, exported once per session."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_works() -> None:
    """A shell that starts the tests in the background ignores SIGINT for them, and Python then does too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shapes_checkpoint() -> Path:
    """The trained checkpoint of the repository."""
    return ROOT / "examples" / "shapes"


@pytest.fixture(scope="session")
def shapes_bundle(shapes_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes checkpoint exported in fp32 and fp16 by the command that a user runs. Tests must not change it."""
    from latentrt.runtime.cli import main

    bundle = tmp_path_factory.mktemp("bundle") / "shapes.bundle"
    assert main(["export", str(shapes_checkpoint), "-o", str(bundle), "--precision", "fp32,fp16", "--json"]) == 0
    return bundle
