"""Build a bundle's engines: which, from what, for which GPUs and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from latentrt.runtime.bundle import Bundle, open_bundle
from latentrt.runtime.cache_folder import cache_folder
from latentrt.runtime.engine_refit import no_refit
from latentrt.runtime.errors import UsageError
from latentrt.runtime.machine import Machine, probe_machine
from latentrt.runtime.manifest import Manifest, check_files, load_manifest
from latentrt.runtime.precisions import QUANTIZED

from .build_options import BuildOptions, wanted_components, wanted_shapes
from .build_rates import BuildWork
from .cache_contents import sweep_cache
from .engine_cache import cache_root, limit_bytes
from .engine_config import EngineConfig
from .engine_flavour import check_supported
from .engine_forecast import check_disk, describe_forecasts, forecast, memory_warning
from .engine_graph import check_types, graph_tensors, load_graph, stored_bytes
from .engine_log import Progress
from .engine_making import EngineJob, EngineResult, Workshop, is_at_hand, make_engine
from .engine_profiles import ShapeRequest, profiles_of
from .engine_store import graph_hashes
from .engine_targets import Targets, choose_flavour, parse_targets, resolve_current
from .scratch_files import sweep_scratch

AHEAD_OF_TIME = "built ahead of time; not run on a GPU"
# Part of every key; counted up with each change of what `engine_flavour.configure` makes of the same config.
BUILDER_REVISION = 1


def build_engines(
    path: Path,
    options: BuildOptions,
    *,
    machine: Machine | None = None,
    progress: Callable[[str], Progress] = lambda _title: lambda _name, _part: None,
    announce: Callable[[str], None] = lambda _text: None,
) -> list[EngineResult]:
    """Build the engines of a bundle; those that are up to date are kept, and those that the cache has are taken.

    Args:
        machine: what this machine has; probed by default.
        progress: called with a title before each build; what it returns receives phase and part done.
        announce: told at once what the builds are expected to take, and what stands in their way.

    Raises:
        UsageError: an option is not possible, or the disk is too small.
        ArtifactError: the bundle or a graph in it is damaged.
        BackendError: the TensorRT that is needed is not installed or has no GPU.
        BuildError: a graph is refused, a build fails, or an engine is not of its precision.
    """
    machine = probe_machine() if machine is None else machine
    bundle = open_bundle(path)
    if bundle.manifest is None:
        raise UsageError(f"{path}: expected a latentrt bundle, got a folder without a manifest. Run: latentrt export")
    components = wanted_components(bundle, options)
    engines = resolve_current(parse_targets(options.target), machine)
    flavour, trt = choose_flavour(options.flavour, engines, machine)
    requests, factor = wanted_shapes(bundle, options)
    cache = cache_root(options.cache)
    if cache is None and options.cache != "off":
        announce(f"{cache_folder()}: cannot be written, so engines are kept in the bundle only.")
    shop = Workshop(
        bundle=bundle,
        machine=machine,
        flavour=flavour,
        trt=trt,
        cache=cache,
        cache_limit=0 if cache is None else limit_bytes(cache),
        force=options.force,
        progress=progress,
        announce=announce,
        pixels_per_latent=factor,
    )
    # Every graph is checked before the first build, which may take minutes.
    jobs = [
        job
        for component, precision in components.items()
        for job in _jobs(shop, bundle.manifest, options, component, precision, requests, engines)
    ]
    for component in components:
        sweep_scratch(path / component / "engines")
    if cache is not None:
        sweep_cache(cache)
    _prepare(shop, jobs)
    asked = {job.key for job in jobs}
    return [make_engine(shop, job, asked=asked) for job in jobs]


def _prepare(shop: Workshop, jobs: Iterable[EngineJob]) -> None:
    """What is to be known, and refused, before the first build starts."""
    manifest = load_manifest(shop.bundle.path)
    builds = [job for job in jobs if not is_at_hand(shop, manifest, job)]
    for job in builds:
        check_supported(shop.trt, job.config)
    forecasts = [job.forecast for job in builds]
    if forecasts:
        check_disk(forecasts, shop.bundle.path)
        shop.announce(describe_forecasts(forecasts))
        if warning := memory_warning(forecasts):
            shop.announce(warning)


def _jobs(
    shop: Workshop,
    manifest: Manifest,
    options: BuildOptions,
    component: str,
    precision: str,
    requests: Iterable[ShapeRequest],
    engines: Iterable[Targets],
) -> list[EngineJob]:
    graph = shop.bundle.graph(component, precision)
    onnx = graph_hashes(manifest, component, precision)
    check_files(shop.bundle.path, manifest, onnx)
    model = load_graph(graph)
    check_types(component, model)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = graph_tensors(value for value in model.graph.input if value.name not in initializers)
    profiles = profiles_of(component, inputs, requests, factor=shop.pixels_per_latent)
    full = shop.flavour == "tensorrt"
    surroundings = {
        "onnx": onnx,
        "flavour": shop.flavour,
        "flavour_version": shop.trt.__version__,
        # Full TensorRT picks its kernels by timing them on one model of GPU.
        "gpu_name": shop.machine.gpus[0].name if full else None,
        "platform": shop.machine.platform if full else None,
        "builder_revision": BUILDER_REVISION,
    }
    refit, refittable = _refit(shop.bundle, options, component, precision)
    timing_cache = _timing_cache(shop, options)
    jobs = []
    for targets in engines:
        config = EngineConfig(
            component=component,
            precision=precision,
            profiles=profiles,
            targets=targets,
            workspace_mib=options.workspace_mib,
            optimization_level=options.optimization_level,
            version_compatible=options.version_compatible,
            hardware_compatibility=options.hardware_compatibility,
            tiling=options.tiling,
            weight_streaming=options.weight_streaming,
            narrow=options.narrow,
            strip=options.strip,
            refit=refit,
            refittable=refittable,
            timing_cache=timing_cache,
        )
        work = BuildWork(
            flavour=shop.flavour,
            component=component,
            parameters=sum(math.prod(tensor.dims) for tensor in initializers.values()),
            weight_bytes=sum(stored_bytes(tensor) for tensor in initializers.values()),
            nodes=len(model.graph.node),
            targets=len(targets),
            profiles=len(profiles),
        )
        jobs.append(
            EngineJob(
                config=config,
                graph=graph,
                inputs=inputs,
                outputs=graph_tensors(model.graph.output),
                made_from={**config.made_from(), **surroundings},
                work=work,
                forecast=forecast(work, shop.cache, stripped=config.strip),
            )
        )
    return jobs


def _refit(bundle: Bundle, options: BuildOptions, component: str, precision: str) -> tuple[str, tuple[str, ...]]:
    """The mode of refit and the weights for `--refit`; none of a component that LoRAs do not change.

    Raises:
        UsageError: no such mode, or the component is quantized. TensorRT does not equalize scales in engines that can
            be refitted, which costs speed, and new weights would need new scales anyway.
    """
    if options.refit != "none" and precision in QUANTIZED:
        raise UsageError(no_refit(component, precision, bundle.path))
    if options.refit != "lora":
        if options.refit not in ("none", "all"):
            raise UsageError(f"refit: expected none, lora or all, got {options.refit!r}.")
        return options.refit, ()
    from .lora_bundle import lora_targets

    names = lora_targets(bundle, component, precision)
    return ("individual", names) if names else ("none", ())


def _timing_cache(shop: Workshop, options: BuildOptions) -> Path | None:
    """The file of kernel timings; those of one GPU and version are of no use to another."""
    if options.timing_cache == "off":
        return None
    if options.timing_cache != "auto":
        return Path(options.timing_cache)
    if shop.flavour != "tensorrt" or shop.cache is None:
        return None
    gpu = re.sub(r"\W+", "-", shop.machine.gpus[0].name)
    return shop.cache / "timings" / f"{shop.trt.__version__}-{gpu}.bin"
