"""What this machine can run and why not the rest. Every probe that fails becomes a line with its reason."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from .backends import choose_graph
from .bundle import Bundle
from .cuda_driver import BINDINGS, why_no_bindings
from .engine_choice import examine_engine
from .errors import LatentrtError
from .machine import Machine, core_count, cpu_features, disk_bytes, memory_bytes, probe_machine
from .manifest import load_manifest
from .onnx_cuda import judge_cuda
from .session import import_onnxruntime
from .trt_flavour import (
    DATA_CENTRE_SMS,
    FLAVOURS,
    import_flavour,
    install_command,
    installed_version,
    supported_sms,
)

T = TypeVar("T")
U = TypeVar("U")
# Distributions that all install a module called onnxruntime, over each other.
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-rocm")
EXPORT_MODULES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "safetensors", "accelerate")


@dataclass(frozen=True)
class Backend:
    """One way to run a bundle.

    Attributes:
        usable: the machine has what it needs.
        detail: what was found; why not, if it is not usable.
        remedy: what to do about it.
    """

    name: str
    usable: bool
    version: str | None
    detail: str
    remedy: str | None = None


@dataclass(frozen=True)
class Extra:
    """An optional set of packages: which are missing and the command that installs them."""

    name: str
    missing: tuple[str, ...]
    command: str | None


@dataclass(frozen=True)
class EngineStatus:
    """Whether an engine of a bundle can be used here, or why not."""

    path: str
    component: str
    precision: str
    targets: tuple[str, ...]
    usable: bool
    reason: str | None


@dataclass(frozen=True)
class GraphStatus:
    """Which graph of a component in a precision ONNX Runtime takes here, and why."""

    path: str
    component: str
    precision: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Everything `latentrt doctor` found."""

    facts: Mapping[str, Any]
    machine: Machine
    backends: tuple[Backend, ...]
    extras: tuple[Extra, ...]
    problems: tuple[str, ...]
    engines: tuple[EngineStatus, ...] = field(default_factory=tuple)
    graphs: tuple[GraphStatus, ...] = ()

    @property
    def can_generate(self) -> bool:
        """At least one backend can be used."""
        return any(backend.usable for backend in self.backends)


def examine(bundle: Path | None = None, *, machine: Machine | None = None) -> Report:
    """Look at this machine, and at a bundle's graphs and engines if one is given.

    Args:
        bundle: whose graphs and engines to judge.
        machine: what decides about engines; probed by default.

    Raises:
        ArtifactError: the bundle is none.
    """
    problems: list[str] = []

    def probe(name: str, function: Callable[[], T], default: U) -> T | U:
        try:
            return function()
        except Exception as err:
            problems.append(f"{name}: could not be read ({type(err).__name__}: {err}).")
            return default

    machine = (
        probe("GPUs", probe_machine, Machine(why_no_gpu="it could not be looked for")) if machine is None else machine
    )
    free, total = probe("memory", memory_bytes, (None, None))
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "latentrt": probe("latentrt", lambda: metadata.version("latentrt"), None),
        "numpy": probe("numpy", lambda: metadata.version("numpy"), None),
        "cores": probe("cores", core_count, None),
        "cpu_features": list(probe("processor features", cpu_features, ())),
        "memory_free_bytes": free,
        "memory_total_bytes": total,
        "disk_free_bytes": probe("disk of the current folder", lambda: disk_bytes(Path.cwd()), None),
        "temp_free_bytes": probe("disk of the temporary folder", lambda: disk_bytes(Path(tempfile.gettempdir())), None),
    }
    backends = (
        *probe("onnxruntime", partial(onnxruntime_backends, machine), (_unseen("onnxruntime"),)),
        *(probe(name, partial(tensorrt_backend, name, machine), _unseen(name)) for name in FLAVOURS),
    )
    problems += probe("onnxruntime distributions", conflicts, [])
    return Report(
        facts=facts,
        machine=machine,
        backends=backends,
        extras=probe("extras", extras, ()),
        engines=() if bundle is None else engine_statuses(bundle, machine),
        graphs=() if bundle is None else probe("graphs", partial(graph_statuses, bundle), ()),
        problems=tuple(problems),
    )


def _unseen(name: str) -> Backend:
    return Backend(name, usable=False, version=None, detail="could not be looked at: see the problems")


def conflicts() -> list[str]:
    """Distributions that overwrite each other's files."""
    held = [name for name in ONNXRUNTIMES if installed_version(name) is not None]
    if len(held) < 2:
        return []
    problem = (
        f"{' and '.join(held)} are installed together and overwrite each other. "
        f"Run: pip uninstall -y {' '.join(held)}, then pip install 'latentrt[cpu]' or pip install 'latentrt[gpu]'."
    )
    return [problem]


def onnxruntime_backends(machine: Machine) -> tuple[Backend, Backend]:
    """ONNX Runtime on the CPU and on CUDA."""
    try:
        ort = import_onnxruntime()
    except LatentrtError as err:
        cpu = Backend("onnxruntime CPU", False, None, str(err), "pip install 'latentrt[cpu]'")
        cuda = Backend("onnxruntime CUDA", False, None, "onnxruntime is not usable", "pip install 'latentrt[gpu]'")
        return cpu, cuda
    version = str(ort.__version__)
    providers = [str(name) for name in ort.get_available_providers()]
    has_cpu = "CPUExecutionProvider" in providers
    listed = ", ".join(name.removesuffix("ExecutionProvider") for name in providers)
    cpu = Backend("onnxruntime CPU", has_cpu, version, f"providers: {listed}")
    if "CUDAExecutionProvider" not in providers:
        swap = "pip uninstall -y onnxruntime && pip install 'latentrt[gpu]'" if machine.gpus else None
        detail = "this build of onnxruntime has no CUDA provider"
        if not machine.gpus:
            detail += f", and {machine.why_no_gpu or 'there is no GPU'}"
        return cpu, Backend("onnxruntime CUDA", False, version, detail, swap)
    if not machine.gpus:
        detail = f"the CUDA provider is installed, but {machine.why_no_gpu or 'there is no GPU'}"
        return cpu, Backend("onnxruntime CUDA", False, version, detail)
    if reason := judge_cuda(ort, lambda: machine):
        return cpu, Backend("onnxruntime CUDA", False, version, reason)
    return cpu, Backend("onnxruntime CUDA", True, version, f"on {machine.gpus[0].name}")


def tensorrt_backend(flavour: str, machine: Machine) -> Backend:
    """Whether engines of a flavour can run here, and whether they can at least be built."""

    def backend(*, usable: bool, version: str | None, detail: str, remedy: str | None = None) -> Backend:
        return Backend(flavour, usable, version, detail, remedy)

    try:
        module = import_flavour(flavour)
    except LatentrtError as err:
        held = machine.packages.get(flavour)
        detail = "not installed" if held is None else str(err)
        return backend(usable=False, version=None, detail=detail, remedy=install_command(flavour))
    version = str(module.__version__)
    sms = supported_sms(module, flavour)
    builds = f"builds ahead of time for {', '.join(sms)}; " if sms else ""
    package = machine.packages.get(flavour)
    if not machine.gpus:
        detail = f"{builds}runs nothing here: {machine.why_no_gpu or 'there is no GPU'}"
        return backend(usable=False, version=version, detail=detail)
    gpu = machine.gpus[0]
    if sms and gpu.sm not in sms:
        remedy = install_command("tensorrt") if gpu.sm in DATA_CENTRE_SMS else f"pip install -U '{flavour}'"
        detail = f"{builds}{gpu.name} is {gpu.sm}, which {flavour} {version} does not support"
        return backend(usable=False, version=version, detail=detail, remedy=remedy)
    if package and package.cuda_major and machine.cuda and machine.cuda[0] < package.cuda_major:
        detail = f"needs a driver for CUDA {package.cuda_major}; this one supports {machine.cuda[0]}.{machine.cuda[1]}"
        return backend(usable=False, version=version, detail=detail, remedy="Update the NVIDIA driver.")
    if reason := why_no_bindings():
        return backend(usable=False, version=version, detail=f"{builds}to run engines {reason}", remedy=BINDINGS)
    detail = f"{builds}engines for {gpu.sm} can run on {gpu.name}"
    return backend(usable=True, version=version, detail=detail)


def extras() -> tuple[Extra, ...]:
    """The optional sets of packages and what each still lacks."""
    needs: Mapping[str, tuple[str, ...]] = {
        "cpu or gpu": ("onnxruntime",),
        "export": EXPORT_MODULES,
        "tensorrt": ("tensorrt",),
        "tensorrt-rtx": ("tensorrt_rtx",),
    }
    found = []
    for name, modules in needs.items():
        missing = tuple(module for module in modules if find_spec(module) is None)
        command = f"pip install 'latentrt[{name.split()[0]}]'" if missing else None
        found.append(Extra(name, missing, command))
    return tuple(found)


def engine_statuses(bundle: Path, machine: Machine) -> tuple[EngineStatus, ...]:
    """Whether each engine of a bundle can be used on a machine.

    Args:
        bundle: its folder.
        machine: where the engines would run.

    Raises:
        ArtifactError: the folder is no bundle.
    """
    manifest = load_manifest(bundle)
    statuses = []
    for record in manifest.engines:
        _, reason = examine_engine(bundle, manifest, record, machine)
        statuses.append(
            EngineStatus(record.path, record.component, record.precision, record.targets, reason is None, reason)
        )
    return tuple(statuses)


def graph_statuses(bundle: Path) -> tuple[GraphStatus, ...]:
    """Which of a bundle's graphs ONNX Runtime takes on this machine.

    Raises:
        ArtifactError: the folder is no bundle.
        BackendError: ONNX Runtime is not usable.
    """
    manifest = load_manifest(bundle)
    opened = Bundle(bundle, manifest)
    statuses = []
    for plain in (artifact for artifact in manifest.artifacts if not artifact.target):
        choice = choose_graph(opened, plain.component, plain.precision)
        taken = manifest.artifact(plain.component, plain.precision, choice.target) or plain
        statuses.append(GraphStatus(taken.path, plain.component, plain.precision, choice.reason))
    return tuple(statuses)
