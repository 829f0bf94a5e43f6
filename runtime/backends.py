"""Which backend runs a component: chosen by what the bundle holds and the machine has, or forced by the caller."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .bundle import Bundle
from .errors import BackendError, UsageError
from .session import OnnxSession
from .specs import Session

_LARGE = 256 << 20

BACKENDS = ("auto", "onnxruntime", "cuda", "tensorrt", "tensorrt_rtx")


@dataclass(frozen=True)
class GraphChoice:
    """Which graph of a component ONNX Runtime takes here: `Artifact.target`, and why, for people."""

    target: str
    reason: str


def open_session(bundle: Bundle, component: str, precision: str, *, backend: str = "auto") -> Session:
    """A session for a component of the bundle.

    `auto` is ONNX Runtime with its CUDA provider where the installed build offers it, otherwise on the CPU.

    Raises:
        UsageError: no such backend, or the bundle lacks the component in that precision.
        BackendError: the backend cannot be used here; says why.
        ArtifactError: a file is missing, truncated or damaged.
    """
    if backend not in BACKENDS:
        raise UsageError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}.")
    if backend in ("tensorrt", "tensorrt_rtx"):
        raise BackendError(why_no_engine(bundle, component, precision, backend))
    if precision == "bf16" and provider_of(backend) == "cpu":
        raise BackendError(
            f"{component}: expected another precision than bf16, for which ONNX Runtime has no kernels on the CPU. Use "
            f"--precision fp32, or build engines: latentrt build {bundle.path} --precision bf16"
        )
    target = choose_graph(bundle, component, precision, backend=backend).target
    path = bundle.graph(component, precision, target)
    if provider_of(backend) == "cuda":
        return OnnxSession(path, providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    keeps = _keeps_memory(bundle, component, precision, target)
    # A graph made for the CPU is rewritten already: as it is, it opens at once and its weights stay in the mapped file.
    return OnnxSession(path, arena=keeps, optimize=target != "cpu")


def choose_graph(bundle: Bundle, component: str, precision: str, *, backend: str = "auto") -> GraphChoice:
    """The graph of a component that ONNX Runtime takes: the one made for its provider, if the bundle holds it."""
    provider = provider_of(backend)
    name = f"onnxruntime {provider.upper()}"
    if bundle.manifest is None:
        return GraphChoice("", "the folder has no manifest: it holds one graph for every runtime")
    if bundle.manifest.artifact(component, precision, provider) is not None:
        return GraphChoice(provider, f"made for {name}")
    reason = f"for every runtime: the bundle holds none made for {name} in {precision}"
    if provider == "cuda" or precision == "fp32":
        reason += f". Run: latentrt optimize {bundle.path} --target {provider}"
    return GraphChoice("", reason)


def provider_of(backend: str) -> str:
    """The provider of ONNX Runtime that a backend means here: `cpu` or `cuda`."""
    return "cuda" if backend == "cuda" or (backend == "auto" and _cuda_usable()) else "cpu"


def _keeps_memory(bundle: Bundle, component: str, precision: str, target: str) -> bool:
    """Whether a network keeps its memory between runs: a large one that runs every step.

    What runs once a prompt or a picture gives it back. A small network's is quickly had again, and an arena, which
    grows by powers of two, would be a good part of the process.
    """
    if component.startswith(("text_encoder", "unet_prompt", "vae_", "safety_checker")):
        return False
    artifact = bundle.manifest.artifact(component, precision, target) if bundle.manifest else None
    if artifact is None:
        path = bundle.graph(component, precision)
        files = list(path.parent.glob(f"{path.name}*"))
    else:
        files = [bundle.path / name for name in artifact.files]
    return sum(file.stat().st_size for file in files) >= _LARGE


@cache
def _cuda_usable() -> bool:
    from .machine import probe_machine
    from .session import import_onnxruntime

    # The CPU build is told apart at once; only a CUDA build makes it worth looking for a GPU.
    if "CUDAExecutionProvider" not in import_onnxruntime().get_available_providers():
        return False
    return bool(probe_machine().gpus)


def why_no_engine(bundle: Bundle, component: str, precision: str, flavour: str) -> str:
    """Why this component does not run from a TensorRT engine here: the sidecars' reasons, or that none was built."""
    from .engine_sidecar import read_sidecar, why_unusable
    from .machine import probe_machine

    engines = [
        e
        for e in (bundle.manifest.engines if bundle.manifest else ())
        if (e.component, e.precision, e.flavour) == (component, precision, flavour)
    ]
    if not engines:
        return (
            f"{bundle.path}: expected a {flavour} engine for {component} in {precision}, found none. "
            f"Run: latentrt build {bundle.path} --precision {precision}"
        )
    machine = probe_machine()
    for engine in engines:
        reason = why_unusable(read_sidecar(bundle.path / engine.sidecar), machine)
        if reason is None:
            return (
                f"{bundle.path / engine.path}: fits this machine, but this version of latentrt does not run engines "
                "yet. Use --backend auto."
            )
    return f"{bundle.path / engines[-1].path}: {reason}"
