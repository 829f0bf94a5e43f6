"""Which graphs have been compared with PyTorch thoroughly: their next checkpoint needs a quick look only."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .component import Component
from .half_builder import LARGE_BYTES
from .reference_run import LARGE, QUICK, THOROUGH, Effort
from .to_onnx import graph_key


def effort_for(check: str, graphs: Iterable[tuple[Component, str]], *, opset: int, cache: Path) -> Effort:
    """How much an export's reference run draws.

    Args:
        check: full, quick or auto.
        graphs: components and the precisions that they are exported in.
        opset: of the export.
        cache: folder of traced graphs.
    """
    graphs = list(graphs)
    large = any(4 * component.parameters > LARGE_BYTES for component, _ in graphs)
    proven = all(_proof(component, precision, opset, cache).exists() for component, precision in graphs)
    if check == "quick" or (check == "auto" and large and proven):
        return QUICK
    return LARGE if large else THOROUGH


def note_proven(component: Component, precision: str, effort: Effort, *, opset: int, cache: Path) -> None:
    """Remember that a graph passed a thorough comparison. A cache that cannot be written costs time, no more."""
    if effort.variations:
        with suppress(OSError):
            _proof(component, precision, opset, cache).touch()


def _proof(component: Component, precision: str, opset: int, cache: Path) -> Path:
    return cache / f"{graph_key(component, opset)}.{precision}.proven"
