"""Which backend runs a component: chosen by what the bundle holds and the machine has, or forced by the caller."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from .bundle import Bundle
from .errors import BackendError, UsageError
from .session import OnnxSession
from .specs import Session

_LARGE = 256 << 20

BACKENDS = ("auto", "onnxruntime", "cuda", "tensorrt", "tensorrt_rtx")


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
    path = bundle.graph(component, precision)
    if backend == "cuda" or (backend == "auto" and _cuda_usable()):
        return OnnxSession(path, providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    return OnnxSession(path, arena=_keeps_memory(component, path))


def _keeps_memory(component: str, path: Path) -> bool:
    """Whether a network keeps its memory between runs: a large one that runs every step.

    What runs once a picture gives it back. A small network's is quickly had again, and an arena, which grows by powers
    of two, would be a good part of the process.
    """
    if component.startswith(("text_encoder", "vae_")):
        return False
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) >= _LARGE


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
