"""Fixtures of all folders: the shapes checkpoint, and its bundle, exported once per session."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    import onnx_ir as ir
    from families import Sources

if "PYTEST_XDIST_WORKER" in os.environ:
    # One worker a core: each with as many threads as there are cores would be in the others' way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
# Helpers that tests share; importlib mode leaves these folders out of sys.path.
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "export")]


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_works() -> None:
    """A shell that starts the tests in the background ignores SIGINT for them, and Python then does too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Make a folder once, whichever of pytest-xdist's workers is the first to ask for it.

    `once(name, make)` calls `make` with a path that does not exist yet, and returns that path.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    shared.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, mark = shared / name, shared / f"{name}.made"
        with FileLock(shared / f"{name}.lock"):
            if not mark.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                mark.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def shapes_checkpoint() -> Path:
    """The trained checkpoint of the repository."""
    return ROOT / "examples" / "shapes"


@pytest.fixture(scope="session")
def shapes_bundle(shapes_checkpoint: Path, once: Once) -> Path:
    """The shapes checkpoint exported in fp32 and fp16 by the command that a user runs. Tests must not change it."""
    from latentrt.runtime.cli import main

    def export(bundle: Path) -> None:
        assert main(["export", str(shapes_checkpoint), "-o", str(bundle), "--precision", "fp32,fp16", "--json"]) == 0

    return once("shapes.bundle", export)


@pytest.fixture(scope="session")
def family_sources(once: Once) -> Callable[[str], Sources]:
    """The folders of a tiny checkpoint of a family, by its name in `families`. Tests must not change them."""

    @functools.cache
    def sources(name: str) -> Sources:
        from families import sources_in, write_sources

        return sources_in(once(f"{name}.sources", lambda folder: write_sources(name, folder)))

    return sources


@pytest.fixture(scope="session", autouse=True)
def traced_graphs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where exports keep traced graphs: pytest's cache, as long as the exporter's sources are the same."""
    digest = hashlib.sha256()
    for source in sorted((ROOT / "export").glob("*.py")):
        digest.update(source.read_bytes())
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("traced-graphs") if cache is not None else tmp_path_factory.mktemp("traced-graphs")
    for old in folder.iterdir():
        if old.name != digest.hexdigest():
            shutil.rmtree(old, ignore_errors=True)
    own = Path(folder / digest.hexdigest())
    own.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTRT_CACHE", str(own))
        yield own


@pytest.fixture(scope="session")
def family_bundle(family_sources: Callable[[str], Sources], once: Once) -> Callable[[str], Path]:
    """A tiny checkpoint of a family as a bundle in fp32, by its name in `families`. Tests must not change it.

    An architecture is traced once, also when several families share it; its graph is compared with PyTorch every time.
    """

    @functools.cache
    def bundle(name: str) -> Path:
        from latentrt.export.checkpoint import open_checkpoint
        from latentrt.export.exporter import export_checkpoint

        sources = family_sources(name)
        checkpoint = open_checkpoint(sources.path, controlnets=sources.controlnets, taesd=sources.taesd)
        return once(f"{name}.bundle", lambda folder: export_checkpoint(checkpoint, folder, precisions=["fp32"]))

    return bundle


@pytest.fixture(scope="session")
def tiny_checkpoint(once: Once) -> Path:
    """A tiny random Stable Diffusion checkpoint. Shared: copy it before changing anything."""
    from latentrt.export.networks import libraries_quiet

    with libraries_quiet():
        from tiny import save_tiny_checkpoint

        return once("tiny", save_tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_networks(tiny_checkpoint: Path) -> dict[str, Any]:
    """The networks of the tiny checkpoint, without weights in memory."""
    from latentrt.export.checkpoint import open_checkpoint
    from latentrt.export.networks import open_network

    return {name: open_network(part) for name, part in open_checkpoint(tiny_checkpoint).parts.items()}


@pytest.fixture(scope="session")
def tiny_loaded(tiny_checkpoint: Path) -> Iterator[Any]:
    """The tiny checkpoint as a diffusers pipeline, loaded by latentrt, ready to draw."""
    from latentrt.export.checkpoint import open_checkpoint
    from latentrt.export.networks import open_network, weights_at_hand
    from latentrt.export.reference_pipeline import reference_pipeline

    checkpoint = open_checkpoint(tiny_checkpoint)
    networks = {name: open_network(part) for name, part in checkpoint.parts.items()}
    pipeline = reference_pipeline(checkpoint, networks)
    with weights_at_hand(*networks.values()):
        yield pipeline


@pytest.fixture(scope="session")
def tiny_cases(tiny_loaded: Any) -> dict[str, list[Any]]:
    """Parity cases of the tiny checkpoint."""
    from latentrt.export.real_inputs import capture_cases

    return capture_cases(tiny_loaded)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, once: Once) -> Path:
    """The tiny checkpoint exported in fp32 and fp16. Shared: copy it before changing anything."""
    from latentrt.export.exporter import export_checkpoint

    return once("tiny.bundle", lambda folder: export_checkpoint(tiny_checkpoint, folder))


@pytest.fixture
def exports_from_bundle(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make torch.onnx's part take no time: every fp32 graph is the shared bundle's, edited by the test if it likes."""
    import onnx_ir as ir

    from latentrt.export import graph_builder

    def install(edit: Callable[[str, ir.Model], None] = lambda name, model: None) -> None:
        def load(component: Any, *, opset: int, cache: Path | None = None) -> ir.Model:
            model = ir.load(tiny_bundle / component.spec.name / "model.onnx")
            edit(component.spec.name, model)
            return model

        monkeypatch.setattr(graph_builder, "to_onnx", load)

    return install
