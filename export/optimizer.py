"""Add graphs for ONNX Runtime's providers to a bundle: which, from what, and when one can be kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from latentrt.runtime.bundle import Bundle, open_bundle
from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.manifest import (
    Artifact,
    FileRecord,
    Manifest,
    changed_inputs,
    check_files,
    key_of,
    load_manifest,
    problem_of,
    record_of,
)
from latentrt.runtime.precisions import CPU_KERNELS, OPTIMIZED, QUANTIZED, how_to_make

from .bundle_cases import bundle_cases
from .ort_fusions import TARGETS
from .ort_targets import TargetGraph, build_kernels, build_target, target_path
from .parity import Case
from .staging import commit, staging_folder

# Raised whenever the same graph and tools would give other graphs than before.
REVISION = 1


@dataclass(frozen=True)
class Optimized:
    """One line of the summary.

    Attributes:
        status: "optimized" or "up to date".
        reason: why it was made: "new", "forced", a damaged file, or the inputs that changed.
        own_size: bytes of the files that no other graph has.
        nodes: of the graph.
        source_nodes: of the graph that it was made from.
    """

    artifact: Artifact
    status: str
    reason: str
    own_size: int
    nodes: int
    source_nodes: int


@dataclass(frozen=True)
class _Job:
    source: Artifact
    target: str
    path: str
    inputs: Mapping[str, Any]
    reason: str | None

    @property
    def identity(self) -> tuple[str, str, str]:
        return self.source.component, self.source.precision, self.target


def optimize_bundle(
    path: Path,
    targets: Sequence[str],
    *,
    precision: str | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda message: None,
) -> list[Optimized]:
    """Make a bundle's graphs for ONNX Runtime's CPU or CUDA provider; those that are up to date are kept.

    Each is compared with the bundle's graphs for every runtime on inputs of a sampling run, before any file of the
    bundle changes. A quantized one, for the CPU's integer kernels, has to give the bits of the graph that calibration
    made.

    Args:
        targets: of `ort_fusions.TARGETS`.
        precision: of the graphs; by default fp32 for the CPU and fp16 for CUDA.
        force: make again what is up to date.
        report: called with a line on what begins.

    Raises:
        UsageError: no such target, a precision that it does not take, or one that the bundle lacks.
        ArtifactError: the bundle or a graph in it is damaged.
        ExportError: a graph does not compute what its source does; the bundle is as it was.
    """
    check_targets(targets)
    bundle = open_bundle(path)
    manifest = bundle.manifest
    if manifest is None:
        raise UsageError(f"{path}: expected a latentrt bundle, got a folder without a manifest. Run: latentrt export")
    jobs = [job for target in dict.fromkeys(targets) for job in _jobs(bundle, manifest, target, precision, force=force)]
    pending = [job for job in jobs if job.reason]
    if pending:
        report("sampling for real inputs")
        cases = bundle_cases(path, manifest)
        with staging_folder(path) as folder:
            made = [_make(path, manifest, folder, job, cases[job.source.component], report) for job in pending]
            report("moving the graphs into place")
            _put_in(path, folder, manifest, made)
    final = load_manifest(path)
    return [_line(path, final, job) for job in jobs]


def check_targets(targets: Iterable[str]) -> None:
    """Hold targets to those that there are.

    Raises:
        UsageError: names the first that is none.
    """
    for target in targets:
        if target not in TARGETS:
            raise UsageError(f"target: expected one or more of {', '.join(TARGETS)}, got {target!r}.")


def _jobs(bundle: Bundle, manifest: Manifest, target: str, precision: str | None, *, force: bool) -> list[_Job]:
    allowed = OPTIMIZED[target]
    if precision is not None and precision not in allowed:
        raise UsageError(f"precision: expected one of {', '.join(allowed)} for {target}, got {precision!r}.")
    wanted = (precision,) if precision else allowed
    jobs = []
    for component in bundle.components():
        # Calibration has made the one in float32 types, which the CPU takes, with that target already.
        sources = (manifest.artifact(component, name, target if name in QUANTIZED else "") for name in wanted)
        source = next((artifact for artifact in sources if artifact is not None), None)
        if source is not None:
            jobs.append(_job(bundle.path, manifest, source, CPU_KERNELS if source.target else target, force=force))
    if not jobs:
        raise UsageError(
            f"{bundle.path}: expected graphs in {' or '.join(wanted)}{' for the CPU' if precision in QUANTIZED else ''}"
            f", found none. Run: {how_to_make(bundle.path, 'unet', wanted[0])}"
        )
    return jobs


def _job(path: Path, manifest: Manifest, source: Artifact, target: str, *, force: bool) -> _Job:
    inputs = {
        "component": source.component,
        "precision": source.precision,
        "target": target,
        "made_from": {name: manifest.files[name].sha256 for name in source.files},
        "tools": {"onnx-ir": version("onnx-ir"), "revision": str(REVISION)},
    }
    held = manifest.artifact(source.component, source.precision, target)
    reason = None
    if held is None:
        reason = "new"
    elif force:
        reason = "forced"
    elif held.key != key_of(inputs):
        reason = "changed: " + ", ".join(changed_inputs(held.inputs, inputs))
    else:
        reason = next((problem for name in held.files if (problem := problem_of(path, manifest, name))), None)
    if reason:
        check_files(path, manifest, source.files)
    return _Job(source, target, target_path(source.path, source.precision, target), inputs, reason)


def _make(
    path: Path, manifest: Manifest, folder: Path, job: _Job, cases: Sequence[Case], report: Callable[[str], None]
) -> Artifact:
    source = job.source
    report(f"{source.component}: {source.precision} for {job.target}")
    made = _built(path / source.path, folder / job.path, job, cases)
    parent = Path(job.path).parent
    return dataclasses.replace(
        source,
        path=job.path,
        files=tuple((parent / file.name).as_posix() for file in made.files),
        key=key_of(job.inputs),
        inputs=job.inputs,
        parity=made.parity,
        target=job.target,
    )


def _built(graph: Path, path: Path, job: _Job, cases: Sequence[Case]) -> TargetGraph:
    names = {"component": job.source.component, "precision": job.source.precision}
    if job.target != CPU_KERNELS:
        return build_target(job.target, graph, path, cases, **names)
    made = build_kernels(graph, path, cases, **names)
    # Its distance from the fp32 graph is that of the graph whose bits it gives.
    return dataclasses.replace(made, parity={**job.source.parity, **made.parity})


def _put_in(path: Path, folder: Path, manifest: Manifest, made: Sequence[Artifact]) -> None:
    """Move new graphs into the bundle, in the place of those for the same target."""
    staged: dict[str, tuple[Path, FileRecord]] = {
        name: (folder / name, record_of(folder / name))
        for artifact in made
        for name in artifact.files
        if (folder / name).exists()
    }
    replaced = {(a.component, a.precision, a.target) for a in made}

    def change(before: Manifest | None) -> Manifest:
        for artifact in made:
            for name, sha256 in artifact.inputs["made_from"].items():
                record = before.files.get(name) if before else None
                if record is None or record.sha256 != sha256:
                    raise ArtifactError(f"{path / name}: it was exported anew meanwhile. Run the same command again.")
        assert before is not None
        kept = [a for a in before.artifacts if (a.component, a.precision, a.target) not in replaced]
        owned = {name for a in before.artifacts for name in a.files} - {n for a in (*kept, *made) for n in a.files}
        files = {name: record for name, record in before.files.items() if name not in owned}
        # Each beside the graph that it was made from.
        order = list(dict.fromkeys((a.component, a.precision) for a in kept))
        artifacts = sorted([*kept, *made], key=lambda a: order.index((a.component, a.precision)))
        return dataclasses.replace(before, artifacts=tuple(artifacts), files=files)

    commit(path, staged, change)


def _line(path: Path, manifest: Manifest, job: _Job) -> Optimized:
    artifact = manifest.artifact(*job.identity)
    if artifact is None:
        raise ArtifactError(f"{path}: another export changed {job.source.component} meanwhile. Run the command again.")
    own = set(artifact.files) - set(job.source.files)
    return Optimized(
        artifact=artifact,
        status="optimized" if job.reason else "up to date",
        reason=job.reason or "",
        own_size=sum(manifest.files[name].size for name in own),
        nodes=len(ir.load(path / artifact.path).graph),
        source_nodes=len(ir.load(path / job.source.path).graph),
    )
