from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

# The tests share tiny.py, and importlib mode leaves this folder out of sys.path.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion checkpoint. Shared: copy it before changing anything."""
    from latentrt.export.checkpoint_weights import libraries_quiet

    with libraries_quiet():
        from tiny import save_tiny_checkpoint

        return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def tiny_loaded(tiny_checkpoint: Path) -> Any:
    """The tiny checkpoint as a diffusers pipeline, loaded by latentrt."""
    from latentrt.export.checkpoint import open_checkpoint
    from latentrt.export.checkpoint_weights import load_pipeline

    return load_pipeline(open_checkpoint(tiny_checkpoint))


@pytest.fixture(scope="session")
def tiny_cases(tiny_loaded: Any) -> dict[str, list[Any]]:
    """Parity cases of the tiny checkpoint."""
    from latentrt.export.real_inputs import capture_cases

    return capture_cases(tiny_loaded)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint exported in fp32 and fp16. Shared: copy it before changing anything."""
    from latentrt.export.exporter import export_checkpoint

    bundle = tmp_path_factory.mktemp("bundle") / "tiny.bundle"
    export_checkpoint(tiny_checkpoint, bundle)
    return bundle


@pytest.fixture
def exports_from_bundle(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make torch.onnx's part take no time: every fp32 graph is the shared bundle's, edited by the test if it likes."""
    from latentrt.export import graph_builder

    def install(edit: Callable[[str, ir.Model], None] = lambda name, model: None) -> None:
        def load(component: Any, *, opset: int) -> ir.Model:
            model = ir.load(tiny_bundle / component.spec.name / "model.onnx")
            edit(component.spec.name, model)
            return model

        monkeypatch.setattr(graph_builder, "to_onnx", load)

    return install
