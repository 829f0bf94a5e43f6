"""Build a bundle's engines: which, from what, for which GPUs and shapes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.runtime.bundle import DRAWING, Bundle, open_bundle
from latentrt.runtime.engine_sidecar import EngineSidecar, ShapeProfile
from latentrt.runtime.errors import UsageError
from latentrt.runtime.latents import vae_factor
from latentrt.runtime.machine import Machine, probe_machine
from latentrt.runtime.manifest import Manifest, check_files, key_of, load_manifest
from latentrt.runtime.specs import TensorSpec

from .engine_builder import VERBOSITY, BuiltEngine, build_engine
from .engine_graph import check_types, graph_tensors, load_graph
from .engine_log import Progress
from .engine_memory import tensor_bytes
from .engine_profiles import ShapeRequest, largest_sizes, parse_range, parse_sizes, profile_of
from .engine_store import engine_path, graph_hashes, reusable, store_engine, why_rebuilt
from .engine_targets import Targets, choose_flavour, parse_targets, resolve_current

AHEAD_OF_TIME = "built ahead of time; not run on a GPU"


@dataclass(frozen=True)
class BuildOptions:
    """What `latentrt build` is asked for, in the words of its command line.

    Attributes:
        target: `sm86,sm89` (an engine each), `sm86+sm89` (one for both) or `current`.
        precision: of the graphs; for fp16 the mixed one of a component whose fp16 graph would overflow.
        batch, size, text_chunks: `4`, `1..8` or `1..4..8` (min..opt..max).
        components: which; None for all that text-to-image uses.
        flavour: auto, tensorrt or tensorrt_rtx.
        workspace_mib: limit of the builder's scratch memory.
        force: build even what is up to date.
    """

    target: str = "current"
    precision: str = "fp16"
    batch: str = "1"
    size: str | None = None
    text_chunks: str = "1"
    components: tuple[str, ...] | None = None
    flavour: str = "auto"
    workspace_mib: int | None = None
    force: bool = False


@dataclass(frozen=True)
class EngineResult:
    """One engine of a build.

    Attributes:
        path: relative to the bundle.
        built: False if the engine was up to date.
        changed: what differs from the nearest engine that was there before.
        dropped: engines made from an older graph that were removed.
    """

    sidecar: EngineSidecar
    path: str
    built: bool
    changed: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Setting:
    """What all engines of one call share."""

    bundle: Bundle
    manifest: Manifest
    options: BuildOptions
    machine: Machine
    flavour: str
    trt: Any
    request: ShapeRequest
    factor: int


@dataclass(frozen=True)
class _Job:
    """One engine to be built or kept; `made_from` is what its key is the hash of."""

    component: str
    precision: str
    targets: Targets
    graph: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: Mapping[str, ShapeProfile]
    made_from: Mapping[str, Any]


def build_engines(
    path: Path,
    options: BuildOptions,
    *,
    machine: Machine | None = None,
    progress: Callable[[str], Progress] = lambda _title: lambda _name, _part: None,
) -> list[EngineResult]:
    """Build the engines of a bundle; those that are up to date are kept.

    Args:
        machine: what this machine has; probed by default.
        progress: called with a title before each engine; what it returns receives phase and part done.

    Raises:
        UsageError: an option is not possible.
        ArtifactError: the bundle or a graph in it is damaged.
        BackendError: the TensorRT that is needed is not installed or has no GPU.
        BuildError: a graph is refused, a build fails, or an engine is not of its precision.
    """
    machine = probe_machine() if machine is None else machine
    bundle = open_bundle(path)
    if bundle.manifest is None:
        raise UsageError(f"{path}: expected a latentrt bundle, got a folder without a manifest. Run: latentrt export")
    if options.workspace_mib is not None and not options.workspace_mib >= 1:
        raise UsageError(f"workspace: expected at least 1 MiB, got {options.workspace_mib}.")
    components = _components(bundle, bundle.manifest, options)
    engines = resolve_current(parse_targets(options.target), machine)
    flavour, trt = choose_flavour(options.flavour, engines, machine)
    request, factor = _shapes(bundle, options)
    setting = _Setting(bundle, bundle.manifest, options, machine, flavour, trt, request, factor)
    # Every graph is checked before the first build, which may take minutes.
    jobs = [job for component, precision in components.items() for job in _jobs(setting, component, precision, engines)]
    return [_run(setting, job, progress) for job in jobs]


def _components(bundle: Bundle, manifest: Manifest, options: BuildOptions) -> dict[str, str]:
    """The components to build, each with the precision of its graph."""
    graphs = {name: bundle.precision_of(name, options.precision) for name in bundle.components()}
    held = {name: precision for name, precision in graphs.items() if precision is not None}
    if options.components is None:
        wanted = [name for name in held if name in DRAWING]
    else:
        wanted = list(dict.fromkeys(options.components))
    if missing := [name for name in wanted if name not in held]:
        raise UsageError(
            f"{bundle.path}: expected {missing[0]} in {options.precision}, found {', '.join(held) or 'no component'}. "
            f"Run: latentrt export CHECKPOINT -o {bundle.path} --precision {options.precision}"
        )
    if not wanted:
        precisions = sorted({a.precision for a in manifest.artifacts})
        raise UsageError(
            f"{bundle.path}: expected graphs in {options.precision}, found {', '.join(precisions) or 'none'}. "
            f"Run: latentrt export CHECKPOINT -o {bundle.path} --precision {options.precision}"
        )
    return {name: held[name] for name in wanted}


def _shapes(bundle: Bundle, options: BuildOptions) -> tuple[ShapeRequest, int]:
    factor = vae_factor(bundle.config("vae_decoder/config.json"))
    sample_size = bundle.config("unet/config.json").get("sample_size")
    native = sample_size * factor if isinstance(sample_size, int) else None
    if options.size is None and native is None:
        raise UsageError("size: expected --size, because the U-Net's config states no sample_size.")
    height, width = parse_sizes(options.size or str(native), factor=factor, native=native)
    chunks = parse_range("text-chunks", options.text_chunks)
    request = ShapeRequest(parse_range("batch", options.batch), height, width, text_chunks=chunks)
    return request, factor


def _jobs(setting: _Setting, component: str, precision: str, engines: Iterable[Targets]) -> list[_Job]:
    graph = setting.bundle.graph(component, precision)
    onnx = graph_hashes(setting.manifest, component, precision)
    check_files(setting.bundle.path, setting.manifest, onnx)
    model = load_graph(graph)
    check_types(component, model)
    initializers = {tensor.name for tensor in model.graph.initializer}
    inputs = graph_tensors(value for value in model.graph.input if value.name not in initializers)
    profiles = profile_of(component, inputs, setting.request, factor=setting.factor)
    made_from = {
        "component": component,
        "precision": precision,
        "onnx": onnx,
        "flavour": setting.flavour,
        "flavour_version": setting.trt.__version__,
        # Full TensorRT picks its kernels by timing them on one model of GPU.
        "gpu_name": setting.machine.gpus[0].name if setting.flavour == "tensorrt" else None,
        "platform": setting.machine.platform if setting.flavour == "tensorrt" else None,
        # Through JSON, so that it equals what a sidecar gives back.
        "profiles": json.loads(json.dumps({name: dataclasses.asdict(profile) for name, profile in profiles.items()})),
        "options": {"workspace_mib": setting.options.workspace_mib, "profiling_verbosity": VERBOSITY},
    }
    return [
        _Job(
            component=component,
            precision=precision,
            targets=targets,
            graph=graph,
            inputs=inputs,
            outputs=graph_tensors(model.graph.output),
            profiles=profiles,
            made_from={**made_from, "targets": list(targets)},
        )
        for targets in engines
    ]


def _run(setting: _Setting, job: _Job, progress: Callable[[str], Progress]) -> EngineResult:
    bundle, key = setting.bundle.path, key_of(job.made_from)
    manifest = load_manifest(bundle)
    held = None if setting.options.force else reusable(bundle, manifest, key)
    if held is not None:
        return EngineResult(sidecar=held, path=engine_path(job.component, key), built=False)
    changed = why_rebuilt(bundle, manifest, job.component, job.made_from)
    built = build_engine(
        setting.trt,
        job.graph,
        component=job.component,
        precision=job.precision,
        targets=job.targets if setting.flavour == "tensorrt_rtx" else (),
        profiles=job.profiles,
        workspace_mib=setting.options.workspace_mib,
        on_gpu=bool(setting.machine.gpus) and setting.machine.gpus[0].sm in job.targets,
        progress=progress(f"{job.component} {job.precision} {'+'.join(job.targets)}"),
    )
    sidecar, dropped = store_engine(bundle, _sidecar(setting, job, built), built.plan)
    return EngineResult(
        sidecar=sidecar,
        path=engine_path(job.component, key),
        built=True,
        changed=tuple(changed),
        dropped=tuple(dropped),
    )


def _sidecar(setting: _Setting, job: _Job, built: BuiltEngine) -> EngineSidecar:
    package, request = setting.machine.packages.get(setting.flavour), setting.request
    return EngineSidecar(
        component=job.component,
        precision=job.precision,
        key=key_of(job.made_from),
        flavour=setting.flavour,
        flavour_version=setting.trt.__version__,
        cuda_major=None if package is None else package.cuda_major,
        targets=job.targets,
        gpu_name=job.made_from["gpu_name"],
        platform=setting.machine.platform,
        onnx=job.made_from["onnx"],
        flags=built.flags,
        profiles=job.profiles,
        inputs=job.inputs,
        outputs=job.outputs,
        precisions=built.precisions,
        build_seconds=round(built.seconds, 3),
        engine_bytes=0,
        engine_sha256="",
        weight_bytes=built.memory.get("weight_bytes"),
        activation_bytes=built.memory.get("activation_bytes"),
        tensor_bytes=tensor_bytes(job.inputs, job.outputs, job.profiles, largest_sizes(request, setting.factor)),
        obtained=built.obtained,
        made_from=job.made_from,
        inspected_layers=built.inspected_layers,
    )
