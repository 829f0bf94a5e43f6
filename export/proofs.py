"""Which graphs have been compared with PyTorch thoroughly: their next checkpoint needs a quick look only, or none."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from latentrt.runtime.errors import UsageError

from .component import Component
from .half_builder import LARGE_BYTES
from .reference_run import LARGE, NONE, QUICK, THOROUGH, Effort
from .to_onnx import graph_key


def effort_for(check: str, graphs: Iterable[tuple[Component, str]], *, opset: int, cache: Path) -> Effort:
    """How much an export's reference run draws.

    Args:
        check: full, quick, none or auto.
        graphs: components and the precisions that they are exported in.
        opset: of the export.
        cache: folder of traced graphs.

    Raises:
        UsageError: `none` was asked for, and a graph is not proven in just its precision. One whose fp16 was made
            mixed is not: what to keep in float32 is found by running it.
    """
    graphs = list(graphs)
    if check == "none":
        for component, precision in graphs:
            if not _proof(component, precision, opset, cache).exists():
                raise UsageError(
                    f"check: expected {component.spec.name} in {precision} to have passed a full check with other "
                    "weights of this architecture, found none such. Export with --check auto."
                )
        return NONE
    large = any(4 * component.parameters > LARGE_BYTES for component, _ in graphs)
    proven = all(
        any(_proof(component, made, opset, cache).exists() for made in _may_become(precision))
        for component, precision in graphs
    )
    if check == "quick" or (check == "auto" and large and proven):
        return QUICK
    return LARGE if large else THOROUGH


def note_proven(component: Component, precision: str, effort: Effort, *, opset: int, cache: Path) -> None:
    """Remember that a graph passed a thorough comparison. A cache that cannot be written costs time, no more.

    Args:
        precision: that it was made in.
    """
    if effort.variations:
        with suppress(OSError):
            _proof(component, precision, opset, cache).touch()


def _may_become(precision: str) -> tuple[str, ...]:
    return (precision, "mixed") if precision == "fp16" else (precision,)


def _proof(component: Component, precision: str, opset: int, cache: Path) -> Path:
    return cache / f"{graph_key(component, opset)}.{precision}.proven"
