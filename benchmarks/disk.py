"""What a row takes on the disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentrt.runtime.backends import choose_graph
from latentrt.runtime.bundle import Bundle, open_bundle
from latentrt.runtime.trt_flavour import FLAVOURS

from .cases import OURS
from .results_file import Disk, Row


def with_disk(rows: Sequence[Row], bundle_path: Path) -> tuple[Row, ...]:
    """Rows with the bytes of what they load; peers have zeros, because it is another's files that they read.

    Graphs are those that ONNX Runtime takes on the row's device, with their weights; for a row that runs engines, the
    graphs that these were built from. Engines are all of the row's flavour in its precisions, whatever their shapes.

    Raises:
        ArtifactError: the folder is no bundle.
    """
    bundle = open_bundle(bundle_path)
    whole = sum(path.stat().st_size for path in bundle.path.rglob("*") if path.is_file())
    return tuple(
        row if row.skipped is not None else dataclasses.replace(row, disk=_disk_of(row, bundle, whole)) for row in rows
    )


def _disk_of(row: Row, bundle: Bundle, whole: int) -> Disk:
    if row.case.subject.system != OURS:
        return Disk(graphs=0, engines=0, bundle=0)
    held = {name: precision for name, precision in row.precisions.items() if precision in bundle.held(name)}
    return Disk(graphs=_graph_bytes(row, bundle, held), engines=_engine_bytes(row, bundle, held), bundle=whole)


def _graph_bytes(row: Row, bundle: Bundle, held: Mapping[str, str]) -> int:
    flavour, backend = _flavour(row), "cuda" if row.on_gpu else "onnxruntime"
    files: set[Path] = set()
    for component, precision in held.items():
        if bundle.manifest is None:
            files.update(path for path in (bundle.path / component).glob("model.onnx*") if path.is_file())
            continue
        target = "" if flavour else choose_graph(bundle, component, precision, backend=backend).target
        artifact = bundle.manifest.artifact(component, precision, target)
        files.update(bundle.path / name for name in (artifact.files if artifact else ()))
    return sum(path.stat().st_size for path in files)


def _engine_bytes(row: Row, bundle: Bundle, held: Mapping[str, str]) -> int:
    flavour = _flavour(row)
    if flavour is None or bundle.manifest is None:
        return 0
    engines = [
        engine
        for engine in bundle.manifest.engines
        if engine.flavour == flavour and held.get(engine.component) == engine.precision
    ]
    return sum(bundle.manifest.files[name].size for engine in engines for name in (engine.path, engine.sidecar))


def _flavour(row: Row) -> str | None:
    """The TensorRT that ran the row, which a backend's name for people begins with."""
    first = row.backend.split(" ")[0]
    return first if first in FLAVOURS else None
