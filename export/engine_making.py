"""One engine: kept where it is up to date, taken from the cache, or built; by one process at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any

from latentrt.runtime.bundle import Bundle
from latentrt.runtime.engine_sidecar import EngineSidecar
from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.machine import Machine
from latentrt.runtime.manifest import Manifest, key_of, load_manifest
from latentrt.runtime.specs import TensorSpec

from .build_rates import BuildFacts, BuildWork, record_build
from .cache_contents import ENGINE, cache_items, chosen_for_removal, remove_items
from .engine_builder import BuiltEngine, build_engine
from .engine_cache import CachedEngine, cached_engines, drop_engine, find_engine, keep_engine, key_lock, note_use
from .engine_config import EngineConfig
from .engine_forecast import Forecast, PeakMemory, with_remaining
from .engine_log import Progress
from .engine_memory import tensor_bytes
from .engine_store import StoredEngine, adopt_engine, engine_path, held_engine, nearest_engine, store_engine

BUILT, FROM_CACHE, UP_TO_DATE = "built", "from the cache", "up to date"


@dataclass(frozen=True)
class EngineResult:
    """One engine of a build.

    Attributes:
        path: relative to the bundle.
        status: `BUILT`, `FROM_CACHE` or `UP_TO_DATE`.
        changed: what differs from the nearest engine that was there before.
        nearest: where that engine lies; if None, `changed` is what is wrong with the one of this key.
        dropped: engines made from an older graph that were removed.
        notes: what else is to be said.
    """

    sidecar: EngineSidecar
    path: str
    status: str
    changed: tuple[str, ...] = ()
    nearest: str | None = None
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def built(self) -> bool:
        """Whether this call built it."""
        return self.status == BUILT

    @property
    def reason(self) -> str | None:
        """Why it was not simply kept, for people; None where there was nothing to keep."""
        if not self.changed:
            return None
        if self.nearest is None:
            return f"the one that was there could not be used: {self.changed[0]}"
        # A word for all sizes, of which there are many.
        names = dict.fromkeys("profiles" if name.startswith("profiles.") else name for name in self.changed)
        return f"differs from the nearest engine before it, {self.nearest}, in: {', '.join(names)}"


@dataclass(frozen=True)
class Workshop:
    """What the engines of one call share.

    Attributes:
        cache: the cache's folder, or None.
        cache_limit: bytes that its engines may take.
        force: build even what is up to date.
        progress: called with a title before each build; what it returns receives phase and part done.
        announce: told what is to be known at once.
        pixels_per_latent: along one side.
    """

    bundle: Bundle
    machine: Machine
    flavour: str
    trt: Any
    cache: Path | None
    cache_limit: int
    force: bool
    progress: Callable[[str], Progress]
    announce: Callable[[str], None]
    pixels_per_latent: int


@dataclass(frozen=True)
class EngineJob:
    """One engine to be had.

    Attributes:
        graph: the .onnx file.
        inputs, outputs: of the graph.
        made_from: what the engine's key is the hash of.
        work: what decides about time and memory of the build.
        forecast: what a build would take.
    """

    config: EngineConfig
    graph: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    made_from: Mapping[str, Any]
    work: BuildWork
    forecast: Forecast
    key: str = field(init=False)

    def __post_init__(self) -> None:
        """Hash what it is made from."""
        object.__setattr__(self, "key", key_of(self.made_from))

    @property
    def title(self) -> str:
        """For people: `unet fp16 sm86+sm89`."""
        return f"{self.config.component} {self.config.precision} {'+'.join(self.config.targets)}"


def is_at_hand(shop: Workshop, manifest: Manifest, job: EngineJob) -> bool:
    """Whether an engine will probably not have to be built: bundle or cache name it. Its files are not looked at."""
    if shop.force:
        return False
    held = any(engine.key == job.key for engine in manifest.engines)
    if held or shop.cache is None:
        return held
    try:
        return find_engine(shop.cache, job.key) is not None
    except ArtifactError:
        return False


def make_engine(shop: Workshop, job: EngineJob, *, asked: Collection[str] = ()) -> EngineResult:
    """Have an engine in the bundle.

    Args:
        asked: keys of all engines that were asked for with it: a miss is explained by others.

    Raises:
        BuildError: the graph is refused, the build fails, or the graph was exported anew meanwhile.
        OSError: the disk is full or the bundle cannot be written.
        KeyboardInterrupt: Ctrl-C, also while another process builds it.
    """

    def wait() -> None:
        shop.announce(f"{job.title}: another process is at work on this engine; waiting for it.")

    path, bundle = engine_path(job.config.component, job.key), shop.bundle.path
    with key_lock(bundle if shop.cache is None else shop.cache, job.key, on_wait=wait):
        manifest = load_manifest(bundle)
        notes: list[str] = []
        nearest: str | None = None
        changed: tuple[str, ...] = ()
        if not shop.force:
            try:
                held = held_engine(bundle, manifest, job.key)
                if held is not None:
                    return EngineResult(held, path, UP_TO_DATE)
            except ArtifactError as err:
                changed = (str(err),)
            taken = _take(shop, job, notes)
            if taken is not None:
                return EngineResult(taken.sidecar, path, FROM_CACHE, changed, None, taken.dropped, tuple(notes))
            if not changed:
                nearest, changed = _nearest(shop, manifest, job, asked)
        stored = _build(shop, job)
        notes += _keep(shop, job, stored, manifest.name)
        return EngineResult(stored.sidecar, path, BUILT, changed, nearest, stored.dropped, tuple(notes))


def _nearest(
    shop: Workshop, manifest: Manifest, job: EngineJob, asked: Collection[str]
) -> tuple[str | None, tuple[str, ...]]:
    shared: list[CachedEngine] = [] if shop.cache is None else cached_engines(shop.cache)
    found = nearest_engine(shop.bundle.path, manifest, job.made_from, [entry.sidecar for entry in shared], but=asked)
    return (None, ()) if found is None else found


def _take(shop: Workshop, job: EngineJob, notes: list[str]) -> StoredEngine | None:
    """The engine out of the cache, if it is there and whole; a damaged one goes."""
    if shop.cache is None:
        return None
    try:
        entry = find_engine(shop.cache, job.key)
        if entry is None:
            return None
        stored = adopt_engine(shop.bundle.path, entry.sidecar, entry.folder, entry.files)
    except ArtifactError as err:
        drop_engine(shop.cache, job.key)
        notes.append(f"dropped a damaged engine from the cache: {err}")
        return None
    note_use(entry)
    return stored


def _build(shop: Workshop, job: EngineJob) -> StoredEngine:
    progress = with_remaining(shop.progress(job.title), job.forecast.seconds)
    on_gpu = bool(shop.machine.gpus) and shop.machine.gpus[0].sm in job.config.targets
    with PeakMemory() as peak:
        built = build_engine(shop.trt, job.graph, job.config, on_gpu=on_gpu, progress=progress)
    stored = store_engine(shop.bundle.path, _sidecar(shop, job, built), built.plan, built.layer_report)
    if shop.cache is not None:
        size = stored.sidecar.engine_bytes
        record_build(shop.cache, BuildFacts(job.work, round(built.seconds, 3), size, peak.bytes))
    return stored


def _keep(shop: Workshop, job: EngineJob, stored: StoredEngine, source: str) -> list[str]:
    """Put a new engine into the cache; what was used longest ago, or is damaged, makes room."""
    if shop.cache is None:
        return []
    if stored.sidecar.attempts:
        return ["not kept in the cache: it was built with less than was asked for"]
    try:
        keep_engine(shop.cache, job.key, shop.bundle.path, stored.files, source)
        items = [item for item in cache_items(shop.cache) if item.kind == ENGINE]
        chosen = chosen_for_removal(items, now=time(), keep_bytes=shop.cache_limit)
        gone = remove_items(shop.cache, chosen, locked=job.key)
    except OSError as err:
        return [f"not kept in the cache: {err.filename or shop.cache}: {err.strerror or err}"]
    return [
        f"removed from the cache, to keep it small: {item.what}"
        if item.problem is None
        else f"dropped a damaged engine from the cache: {item.problem}"
        for item in gone
    ]


def _sidecar(shop: Workshop, job: EngineJob, built: BuiltEngine) -> EngineSidecar:
    package, config = shop.machine.packages.get(shop.flavour), built.config
    return EngineSidecar(
        component=config.component,
        precision=config.precision,
        key=job.key,
        flavour=shop.flavour,
        flavour_version=shop.trt.__version__,
        cuda_major=None if package is None else package.cuda_major,
        targets=config.targets,
        gpu_name=job.made_from["gpu_name"],
        platform=shop.machine.platform,
        onnx=job.made_from["onnx"],
        flags=built.flags,
        profiles=config.profiles,
        inputs=job.inputs,
        outputs=job.outputs,
        precisions=built.precisions,
        build_seconds=round(built.seconds, 3),
        engine_bytes=0,
        engine_sha256="",
        weight_bytes=built.memory.get("weight_bytes"),
        activation_bytes=built.memory.get("activation_bytes"),
        tensor_bytes=tensor_bytes(job.inputs, job.outputs, config.profiles),
        obtained=built.obtained,
        made_from=job.made_from,
        inspected_layers=built.inspected_layers,
        flops=built.flops,
        refit=config.refit,
        refittable=built.refittable,
        stripped=config.strip,
        thin=built.thin,
        compatibility=config.compatibility,
        attempts=built.attempts,
        pixels_per_latent=shop.pixels_per_latent,
    )
