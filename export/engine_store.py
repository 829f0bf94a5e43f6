"""Engines in a bundle: when one can be kept, why not, and how a new one gets in without half of it ever showing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrt.runtime.engine_sidecar import EngineSidecar, read_sidecar, sidecar_json
from latentrt.runtime.errors import ArtifactError, BuildError
from latentrt.runtime.manifest import (
    EngineRecord,
    Manifest,
    changed_inputs,
    problem_of,
    update_manifest,
    write_scratch,
)


def engine_path(component: str, key: str) -> str:
    """Where an engine lies, relative to the bundle; its sidecar has the suffix .json."""
    return f"{component}/engines/{key[:16]}.engine"


def graph_hashes(manifest: Manifest, component: str, precision: str) -> dict[str, str]:
    """SHA-256 of a component's graph and its external data by file, as the manifest states them."""
    artifact = manifest.artifact(component, precision)
    return {} if artifact is None else {name: manifest.files[name].sha256 for name in artifact.files}


def reusable(bundle: Path, manifest: Manifest, key: str) -> EngineSidecar | None:
    """The sidecar of the engine with this key, if both files are whole."""
    record = next((engine for engine in manifest.engines if engine.key == key), None)
    if record is None or any(problem_of(bundle, manifest, name) for name in (record.path, record.sidecar)):
        return None
    return read_sidecar(bundle / record.sidecar)


def why_rebuilt(bundle: Path, manifest: Manifest, component: str, made_from: Mapping[str, Any]) -> list[str]:
    """What differs from the most similar engine of the component and precision; empty if it has none yet."""
    sidecars = [sidecar for _, sidecar in _sidecars(bundle, manifest, component)]
    held = [sidecar for sidecar in sidecars if sidecar.precision == made_from["precision"]]
    differences = [changed_inputs(sidecar.made_from, made_from) for sidecar in held]
    nearest = min(differences, key=len, default=[])
    return nearest or (["the engine's files were missing or changed"] if differences else [])


def _sidecars(bundle: Path, manifest: Manifest, component: str) -> list[tuple[EngineRecord, EngineSidecar]]:
    found = []
    for record in manifest.engines:
        if record.component == component:
            try:
                found.append((record, read_sidecar(bundle / record.sidecar)))
            except ArtifactError:
                continue  # verify reports it; a rebuild must not be stopped by it
    return found


def store_engine(bundle: Path, sidecar: EngineSidecar, plan: memoryview | bytes) -> tuple[EngineSidecar, list[str]]:
    """Put an engine and its sidecar into the bundle, and drop engines of the same component made from an older graph.

    Args:
        sidecar: `engine_bytes` and `engine_sha256` are filled in here.

    Returns:
        The sidecar as written, and the paths of the engines that were dropped, relative to the bundle.

    Raises:
        BuildError: the graph was exported anew during the build.
        OSError: the disk is full or the folder cannot be written.
    """
    path = engine_path(sidecar.component, sidecar.key)
    side_path = str(Path(path).with_suffix(".json").as_posix())
    scratches: list[Path] = []
    dropped: list[EngineRecord] = []
    (bundle / path).parent.mkdir(parents=True, exist_ok=True)
    try:
        engine_scratch, engine_file = write_scratch(bundle / path, plan)
        scratches.append(engine_scratch)
        sidecar = dataclasses.replace(sidecar, engine_bytes=engine_file.size, engine_sha256=engine_file.sha256)
        side_scratch, side_file = write_scratch(bundle / side_path, sidecar_json(sidecar))
        scratches.append(side_scratch)
        record = EngineRecord(
            component=sidecar.component,
            precision=sidecar.precision,
            path=path,
            sidecar=side_path,
            key=sidecar.key,
            flavour=sidecar.flavour,
            targets=sidecar.targets,
        )

        def change(manifest: Manifest) -> Manifest:
            if graph_hashes(manifest, sidecar.component, sidecar.precision) != sidecar.onnx:
                raise BuildError(
                    f"{sidecar.component}: expected the graph that the build started from, got one exported since. "
                    "Run the same command again."
                )
            dropped.extend(_outdated(bundle, manifest, sidecar))
            # Under the lock, so that two builds of one key cannot mix one's engine with the other's hash. A crash
            # between these lines leaves files that no manifest names, which are never loaded.
            os.replace(engine_scratch, bundle / path)
            os.replace(side_scratch, bundle / side_path)
            gone = {name for old in dropped for name in (old.path, old.sidecar)}
            files = {name: file for name, file in manifest.files.items() if name not in gone}
            kept = [engine for engine in manifest.engines if engine.key != record.key and engine not in dropped]
            return dataclasses.replace(
                manifest, files={**files, path: engine_file, side_path: side_file}, engines=(*kept, record)
            )

        update_manifest(bundle, change)
    finally:
        for scratch in scratches:
            scratch.unlink(missing_ok=True)
    for old in dropped:
        (bundle / old.path).unlink(missing_ok=True)
        (bundle / old.sidecar).unlink(missing_ok=True)
    return sidecar, [old.path for old in dropped]


def _outdated(bundle: Path, manifest: Manifest, sidecar: EngineSidecar) -> list[EngineRecord]:
    return [
        record
        for record, held in _sidecars(bundle, manifest, sidecar.component)
        if record.precision == sidecar.precision and held.onnx != sidecar.onnx and record.key != sidecar.key
    ]
