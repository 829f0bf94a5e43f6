"""Which backend runs a component: chosen by what the bundle holds and the machine has, or forced by the caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .bundle import DRAWING, Bundle, pipeline_files
from .errors import BackendError, UsageError
from .onnx_cuda import PROVIDERS, CudaOptions, why_no_cuda
from .precisions import CPU_KERNELS, OPTIMIZED, QUANTIZED, TARGETS_OF
from .session import OnnxSession
from .specs import Array, Session
from .trt_flavour import FLAVOURS

if TYPE_CHECKING:
    from .engine_choice import HeldEngine
    from .engine_host import EngineHost

_LARGE = 256 << 20
# What runs once a prompt or a picture, and not every step.
_ONCE = ("text_encoder", "unet_prompt", "vae_", "safety_checker")

BACKENDS = ("auto", "onnxruntime", "cuda", *FLAVOURS)

Changes = Callable[[Path], Mapping[str, Array]]


def no_changes(graph: Path) -> Mapping[str, Array]:
    """The weights that the graph has."""
    return {}


@dataclass(frozen=True)
class GraphChoice:
    """Which graph of a component ONNX Runtime takes here: `Artifact.target`, and why, for people."""

    target: str
    reason: str


@dataclass(frozen=True)
class EnginesChoice:
    """The engines that a component runs from here, and why these, or why from none, for people."""

    engines: tuple[HeldEngine, ...]
    reason: str


def open_session(
    bundle: Bundle,
    component: str,
    precision: str,
    *,
    backend: str = "auto",
    cuda: CudaOptions | None = None,
    host: EngineHost | None = None,
    verify: bool = False,
    changes: Changes = no_changes,
) -> Session:
    """A session for a component of the bundle.

    `auto` takes engines where the bundle holds some that can be used here, and ONNX Runtime for shapes that they do not
    hold; without engines ONNX Runtime, with its CUDA provider where that can be used, otherwise on the CPU. A flavour
    of TensorRT is for the networks that draw; what else a run needs takes ONNX Runtime where no engine was built.

    Args:
        cuda: how ONNX Runtime's CUDA provider is used, where it is.
        host: what the engines of a pipeline share.
        verify: compare the graph with the manifest before it is read in an engine's place.
        changes: weights that take the place of a graph's, given its .onnx file, whenever one is opened.

    Raises:
        UsageError: no such backend, or the bundle lacks the component in that precision.
        BackendError: the backend cannot be used here; says why.
        ArtifactError: a file is missing, truncated or damaged.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}.")
    chosen = choose_backend(bundle, component, precision, backend=backend, host=host)
    if backend in FLAVOURS and not chosen.engines and component in DRAWING:
        raise BackendError(chosen.reason)

    def open_graph() -> Session:
        return _open_graph(bundle, component, precision, backend, cuda, changes)

    if not chosen.engines or bundle.manifest is None:
        return open_graph()
    from .engine_host import EngineHost
    from .engine_session import EngineSession

    def instead() -> Session:
        if verify:
            target = choose_graph(bundle, component, precision, backend=backend).target
            bundle.check(pipeline_files(bundle, precision, [component], target))
        return open_graph()

    return EngineSession(
        chosen.engines, bundle.manifest, host or EngineHost(), fallback=instead if backend == "auto" else None
    )


def choose_backend(
    bundle: Bundle, component: str, precision: str, *, backend: str = "auto", host: EngineHost | None = None
) -> EnginesChoice:
    """The engines of a component that can be used on this machine with a backend.

    Args:
        host: knows the machine; a new look is taken without one.
    """
    flavours = FLAVOURS if backend == "auto" else tuple(name for name in FLAVOURS if name == backend)
    engines = bundle.manifest.engines if bundle.manifest is not None else ()
    if not any((e.component, e.precision) == (component, precision) and e.flavour in flavours for e in engines):
        named, flavour = ("TensorRT", "") if backend == "auto" else (backend, f" --flavour {backend}")
        return EnginesChoice(
            (),
            f"{bundle.path}: expected a {named} engine for {component} in {precision}, found none. "
            f"Run: latentrt build {bundle.path} --precision {precision}{flavour}",
        )
    from .cuda_driver import BINDINGS, why_no_bindings
    from .engine_choice import choose_engines
    from .engine_host import EngineHost
    from .engine_sidecar import describe_profiles

    choice = choose_engines(bundle, component, precision, (host or EngineHost()).machine, flavours=flavours)
    if not choice.usable:
        more = len(choice.refused) - 1
        rest = f" ({more} more cannot be used either: latentrt doctor {bundle.path})" if more else ""
        return EnginesChoice((), f"{choice.refused[0]}{rest}")
    if backend == "auto" and (why := why_no_bindings()):
        return EnginesChoice((), f"{choice.usable[0].path}: {why}. Run: {BINDINGS}")
    held = "; ".join(f"{e.sidecar.flavour} engine for {describe_profiles(e.sidecar)}" for e in choice.usable)
    return EnginesChoice(choice.usable, held)


def default_precision(bundle: Bundle, *, backend: str, host: EngineHost | None = None) -> str:
    """The precision to draw in where none is asked for: of usable engines of the U-Net, else the best that is whole.

    With a flavour of TensorRT also that of engines which cannot be used here, so that the reason is told, and without
    any the one that `latentrt build` takes.

    Args:
        bundle: holds all that drawing takes in at least one precision.
    """
    held = bundle.precisions()
    flavours = FLAVOURS if backend == "auto" else (backend,)
    engines = bundle.manifest.engines if bundle.manifest is not None else ()
    built = {engine.precision for engine in engines if engine.component == "unet" and engine.flavour in flavours}
    candidates = [name for name in held if bundle.precision_of("unet", name) in built]
    for name in candidates:
        if choose_backend(bundle, "unet", str(bundle.precision_of("unet", name)), backend=backend, host=host).engines:
            return name
    if backend in FLAVOURS:
        return next(iter([*candidates, *(name for name in held if name == "fp16")]), held[0])
    return held[0]


def _open_graph(
    bundle: Bundle, component: str, precision: str, backend: str, cuda: CudaOptions | None, changes: Changes
) -> Session:
    if backend == "cuda" and (reason := why_no_cuda()):
        raise BackendError(f"backend cuda: expected a GPU that ONNX Runtime can use, but {reason}")
    if precision == "bf16" and provider_of(backend) == "cpu":
        raise BackendError(
            f"{component}: expected another precision than bf16, for which ONNX Runtime has no kernels on the CPU. Use "
            f"--precision fp32, or build engines: latentrt build {bundle.path} --precision bf16"
        )
    target = choose_graph(bundle, component, precision, backend=backend).target
    path = bundle.graph(component, precision, target)
    if provider_of(backend) == "cuda":
        told = cuda or CudaOptions()
        gives_back = told.gives_back and component.startswith(_ONCE)
        return OnnxSession(path, providers=PROVIDERS, arena=not gives_back, cuda=told, weights=changes(path))
    keeps = _keeps_memory(bundle, component, precision, target)
    # A large graph optimized for the CPU opens at once as it is, its weights in the mapped file. ONNX Runtime makes a
    # small one faster in a moment, by laying its convolutions out for the processor; and of one that was quantized, its
    # int8 kernels are what it makes of it.
    mapped = target == "cpu" and precision not in QUANTIZED and _is_large(bundle, component, precision, target)
    return OnnxSession(path, arena=keeps, optimize=not mapped, weights=changes(path))


def choose_graph(bundle: Bundle, component: str, precision: str, *, backend: str = "auto") -> GraphChoice:
    """The graph of a component that ONNX Runtime takes: the best that the bundle holds of those for its provider."""
    provider = provider_of(backend)
    name = f"onnxruntime {provider.upper()}"
    if bundle.manifest is None:
        return GraphChoice("", "the folder has no manifest: it holds one graph for every runtime")
    held = [t for t in TARGETS_OF[provider] if bundle.manifest.artifact(component, precision, t) is not None]
    if held:
        remedy = f". Faster with: latentrt optimize {bundle.path} --target cpu --precision {precision}"
        slower = precision in QUANTIZED and held[0] != CPU_KERNELS
        return GraphChoice(held[0], f"made for {name}{remedy if slower else ''}")
    reason = f"for every runtime: the bundle holds none made for {name} in {precision}"
    # Of quantized graphs, only those that calibration made for the CPU can be laid out for its kernels.
    if precision in OPTIMIZED[provider] and precision not in QUANTIZED:
        reason += f". Run: latentrt optimize {bundle.path} --target {provider}"
    return GraphChoice("", reason)


def provider_of(backend: str) -> str:
    """The provider of ONNX Runtime that a backend means here: `cpu` or `cuda`."""
    return "cuda" if backend == "cuda" or (backend != "onnxruntime" and why_no_cuda() is None) else "cpu"


def _keeps_memory(bundle: Bundle, component: str, precision: str, target: str) -> bool:
    """Whether a network keeps its memory between runs: a large one that runs every step.

    What runs once a prompt or a picture gives it back. A small network's is quickly had again, and an arena, which
    grows by powers of two, would be a good part of the process.
    """
    return not component.startswith(_ONCE) and _is_large(bundle, component, precision, target)


def _is_large(bundle: Bundle, component: str, precision: str, target: str) -> bool:
    """Whether a network's files are of _LARGE bytes or more."""
    artifact = bundle.manifest.artifact(component, precision, target) if bundle.manifest else None
    if artifact is None:
        path = bundle.graph(component, precision)
        files = list(path.parent.glob(f"{path.name}*"))
    else:
        files = [bundle.path / name for name in artifact.files]
    return sum(file.stat().st_size for file in files) >= _LARGE
