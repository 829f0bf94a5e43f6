"""Engines in a bundle: when one can be kept, why not, and how a new one gets in without half of it ever showing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.engine_sidecar import EngineSidecar, read_sidecar, sidecar_json
from latentrt.runtime.errors import ArtifactError, BuildError
from latentrt.runtime.manifest import (
    EngineRecord,
    FileRecord,
    Manifest,
    changed_inputs,
    problem_of,
    record_of,
    scratch_path,
    update_manifest,
    write_scratch,
)

from .scratch_files import link_or_copy


@dataclass(frozen=True)
class StoredEngine:
    """An engine that is in a bundle.

    Attributes:
        sidecar: as written.
        files: by name relative to the bundle.
        dropped: engines of the same component, made from an older graph, that were removed.
    """

    sidecar: EngineSidecar
    files: Mapping[str, FileRecord]
    dropped: tuple[str, ...] = ()


def engine_name(key: str) -> str:
    """The file name of an engine."""
    return f"{key[:16]}.engine"


def engine_path(component: str, key: str) -> str:
    """Where an engine lies, relative to the bundle; `companions` lie beside it."""
    return f"{component}/engines/{engine_name(key)}"


def companions(path: str) -> tuple[str, str]:
    """The sidecar and the layer report of an engine; engines of older versions have no report."""
    stem = path.removesuffix(".engine")
    return f"{stem}.json", f"{stem}.layers.json"


def graph_hashes(manifest: Manifest, component: str, precision: str) -> dict[str, str]:
    """SHA-256 of a component's graph and its external data by file, as the manifest states them."""
    artifact = manifest.artifact(component, precision)
    return {} if artifact is None else {name: manifest.files[name].sha256 for name in artifact.files}


def held_engine(bundle: Path, manifest: Manifest, key: str) -> EngineSidecar | None:
    """The sidecar of the engine with this key, or None if the bundle has none.

    Raises:
        ArtifactError: a file of it is missing, truncated or changed.
    """
    record = next((engine for engine in manifest.engines if engine.key == key), None)
    if record is None:
        return None
    for name in _files(manifest, record):
        if problem := problem_of(bundle, manifest, name):
            raise ArtifactError(problem)
    return read_sidecar(bundle / record.sidecar)


def _files(manifest: Manifest, record: EngineRecord) -> list[str]:
    return [name for name in (record.path, *companions(record.path)) if name in manifest.files]


def nearest_engine(
    bundle: Path,
    manifest: Manifest,
    made_from: Mapping[str, Any],
    shared: Iterable[EngineSidecar] = (),
    *,
    but: Collection[str] = (),
) -> tuple[str, tuple[str, ...]] | None:
    """The most similar engine of the component and precision: where it lies, and what differs from it.

    Args:
        made_from: everything that the wanted engine's key is the hash of.
        shared: engines of the cache, which are looked at where the bundle has none.
        but: keys of engines that are not meant.
    """
    wanted = (made_from["component"], made_from["precision"])
    own = [(record.path, sidecar) for record, sidecar in _sidecars(bundle, manifest, wanted[0])]
    others = [(f"{engine_path(wanted[0], sidecar.key)} of the cache", sidecar) for sidecar in shared]
    for candidates in (own, others):
        differences = [
            (place, tuple(changed_inputs(sidecar.made_from, made_from)))
            for place, sidecar in candidates
            if (sidecar.component, sidecar.precision) == wanted and sidecar.key not in but
        ]
        if differences:
            return min(differences, key=lambda found: len(found[1]))
    return None


def _sidecars(bundle: Path, manifest: Manifest, component: str) -> list[tuple[EngineRecord, EngineSidecar]]:
    found = []
    for record in manifest.engines:
        if record.component == component:
            with suppress(ArtifactError):  # verify reports it; a rebuild must not be stopped by it
                found.append((record, read_sidecar(bundle / record.sidecar)))
    return found


def store_engine(bundle: Path, sidecar: EngineSidecar, plan: memoryview | bytes, layer_report: str) -> StoredEngine:
    """Put an engine, its sidecar and its layer report into the bundle, and drop engines made from an older graph.

    Args:
        sidecar: `engine_bytes`, `engine_sha256` and `layer_report` are filled in here.
        layer_report: content of the report.

    Raises:
        BuildError: the graph was exported anew during the build.
        OSError: the disk is full or the folder cannot be written.
    """
    path = engine_path(sidecar.component, sidecar.key)
    side_path, report_path = companions(path)
    (bundle / path).parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as cleanup:
        parts: dict[str, tuple[Path, FileRecord]] = {}

        def write(name: str, data: memoryview | bytes) -> FileRecord:
            scratch, record = write_scratch(bundle / name, data)
            cleanup.callback(scratch.unlink, missing_ok=True)
            parts[name] = (scratch, record)
            return record

        engine = write(path, plan)
        write(report_path, layer_report.encode())
        sidecar = dataclasses.replace(
            sidecar,
            engine_bytes=engine.size,
            engine_sha256=engine.sha256,
            layer_report=Path(report_path).name,
        )
        write(side_path, sidecar_json(sidecar))
        return _move_in(bundle, sidecar, parts)


def adopt_engine(bundle: Path, sidecar: EngineSidecar, folder: Path, files: Mapping[str, FileRecord]) -> StoredEngine:
    """Put an engine that lies in another folder into the bundle: as hard links where it can be, else as copies.

    Args:
        sidecar: of the engine.
        folder: where its files lie, under the names that they have in a bundle.
        files: what they must be.

    Raises:
        ArtifactError: a file is not what it must be.
        BuildError: the graph was exported anew meanwhile.
        OSError: the disk is full or the folder cannot be written.
    """
    target = Path(engine_path(sidecar.component, sidecar.key)).parent
    (bundle / target).mkdir(parents=True, exist_ok=True)
    with ExitStack() as cleanup:
        parts: dict[str, tuple[Path, FileRecord]] = {}
        for name, expected in files.items():
            final = bundle / target / name
            scratch = scratch_path(final)
            cleanup.callback(scratch.unlink, missing_ok=True)
            try:
                link_or_copy(folder / name, scratch)
            except OSError as err:
                # The scratch file's name would mean nothing to the reader of the message.
                if err.filename == str(scratch):
                    raise OSError(err.errno, err.strerror, str(final)) from err
                raise
            if (found := record_of(scratch)) != expected:
                raise ArtifactError(
                    f"{folder / name}: expected {expected.size} bytes with SHA-256 {expected.sha256[:16]}…, got "
                    f"{found.size} with {found.sha256[:16]}…."
                )
            parts[(target / name).as_posix()] = (scratch, expected)
        return _move_in(bundle, sidecar, parts)


def _move_in(bundle: Path, sidecar: EngineSidecar, parts: Mapping[str, tuple[Path, FileRecord]]) -> StoredEngine:
    """Give scratch files their names and the manifest the engine; what it replaces goes."""
    path = engine_path(sidecar.component, sidecar.key)
    record = EngineRecord(
        component=sidecar.component,
        precision=sidecar.precision,
        path=path,
        sidecar=companions(path)[0],
        key=sidecar.key,
        flavour=sidecar.flavour,
        targets=sidecar.targets,
    )
    files = {name: file for name, (_, file) in parts.items()}
    dropped: list[EngineRecord] = []
    gone: set[str] = set()

    def change(manifest: Manifest) -> Manifest:
        if graph_hashes(manifest, sidecar.component, sidecar.precision) != sidecar.onnx:
            raise BuildError(
                f"{sidecar.component}: expected the graph that the build started from, got one exported since. "
                "Run the same command again."
            )
        dropped.extend(_outdated(bundle, manifest, sidecar))
        replaced = [engine for engine in manifest.engines if engine.key == record.key]
        gone.update(name for old in (*dropped, *replaced) for name in _files(manifest, old) if name not in files)
        # Under the lock, so that two builds of one key cannot mix one's engine with the other's hash. A crash
        # between these lines leaves files that no manifest names, which are never loaded.
        for name, (scratch, _) in parts.items():
            os.replace(scratch, bundle / name)
        kept = [engine for engine in manifest.engines if engine not in (*dropped, *replaced)]
        left = {name: file for name, file in manifest.files.items() if name not in gone}
        return dataclasses.replace(manifest, files={**left, **files}, engines=(*kept, record))

    update_manifest(bundle, change)
    for name in gone:
        (bundle / name).unlink(missing_ok=True)
    return StoredEngine(sidecar, files, tuple(old.path for old in dropped))


def _outdated(bundle: Path, manifest: Manifest, sidecar: EngineSidecar) -> list[EngineRecord]:
    return [
        record
        for record, held in _sidecars(bundle, manifest, sidecar.component)
        if record.precision == sidecar.precision and held.onnx != sidecar.onnx and record.key != sidecar.key
    ]
