"""What all engines of a pipeline share on a GPU, and how they are loaded there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal
from weakref import WeakSet

from .cache_folder import cache_folder
from .cuda_device import Device
from .cuda_lanes import Lanes
from .engine_choice import HeldEngine
from .engine_loading import load_engine
from .engine_sidecar import EngineSidecar
from .kernel_cache import KernelCache
from .machine import Machine, probe_machine
from .manifest import Manifest, check_files
from .residency_plan import ComponentMemory, residency
from .tensorrt_session import TensorRTSession
from .work_times import WorkTimes


def _first_gpu() -> Device:
    from .cuda_driver import CudaDevice

    return CudaDevice()


@dataclass(frozen=True)
class EngineMemory:
    """What engines take of a GPU's memory, in bytes.

    Attributes:
        weights: of those that are open; None where one does not say.
        activation: blocks of the lanes.
        io: buffers of inputs and outputs.
    """

    weights: int | None
    activation: int
    io: int


@dataclass(eq=False, kw_only=True)
class EngineHost:
    """The GPU and its lanes, opened with the first engine.

    Attributes:
        lanes: how many calls may run at the same time, each with activation memory of its own.
        graphs: capture CUDA graphs.
        weight_budget: bytes of the U-Net's weights that stay on the device, with weight streaming; `room` for as many
            as the device has room for, None for all.
        open_device: opens the GPU.
        look: at the machine.
        times: what the GPU takes for the engines' calls, while it is on.
    """

    lanes: int = 1
    graphs: bool = True
    weight_budget: int | Literal["room"] | None = None
    open_device: Callable[[], Device] = _first_gpu
    look: Callable[[], Machine] = probe_machine
    times: WorkTimes = field(default_factory=WorkTimes)
    _sessions: WeakSet[TensorRTSession] = field(default_factory=WeakSet, init=False, repr=False)
    _whole: set[tuple[str, int, int]] = field(default_factory=set, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @cached_property
    def machine(self) -> Machine:
        """What decides whether an engine can be used here."""
        return self.look()

    @cached_property
    def device(self) -> Device:
        """The GPU.

        Raises:
            BackendError: cuda-bindings is not installed, or there is none.
        """
        return self.open_device()

    @cached_property
    def shared(self) -> Lanes:
        """The lanes of all engines."""
        return Lanes(self.device, self.lanes, times=self.times)

    @property
    def memory(self) -> EngineMemory:
        """What the engines that are open take now."""
        sessions = list(self._sessions)
        if not sessions:
            return EngineMemory(0, 0, 0)
        weights = [session.weight_bytes for session in sessions]
        known = [nbytes for nbytes in weights if nbytes is not None]
        return EngineMemory(
            weights=sum(known) if len(known) == len(weights) else None,
            activation=self.shared.nbytes,
            io=sum(session.io_bytes for session in sessions),
        )

    def open(self, held: HeldEngine, manifest: Manifest) -> TensorRTSession:
        """Load an engine.

        Raises:
            ArtifactError: its file was changed, cannot be read, or is not what its sidecar says.
            BackendError: the flavour or cuda-bindings is not installed, or the engine cannot do what was asked for.
            OutOfDeviceMemory: it does not fit.
        """
        with self._lock:  # TensorRT's log is one for all, and so is the bus that weights come over
            return self._load(held, manifest)

    def _load(self, held: HeldEngine, manifest: Manifest) -> TensorRTSession:
        sidecar, kernels = held.sidecar, None
        if sidecar.flavour == "tensorrt_rtx":
            kernels = KernelCache(
                cache_folder() / "jit",
                version=sidecar.flavour_version,
                gpu=self.device.name,
                key=sidecar.engine_sha256,
            )
        self._check(held, manifest)
        loaded = load_engine(
            held,
            self.device,
            graphs=self.graphs,
            kernels=kernels,
            weight_budget=self._budget(held.record.component, sidecar),
        )
        session = TensorRTSession(loaded, device=self.device, lanes=self.shared)
        self._sessions.add(session)
        return session

    def _budget(self, component: str, sidecar: EngineSidecar) -> int | None:
        """Bytes of an engine's weights that stay on the device: of the U-Net as `residency_plan` has it."""
        if component != "unet":
            return None
        if self.weight_budget != "room":
            return self.weight_budget
        part = ComponentMemory(
            component,
            weights=sidecar.weight_bytes or 0,
            activation=(sidecar.activation_bytes or 0) * self.lanes,
            tensors=(sidecar.tensor_bytes or 0) * self.lanes,
        )
        # Of the memory that is free, CUDA has had its own already.
        return residency("stream", [part], context=0, memory=self.device.memory()[0]).budget

    def _check(self, held: HeldEngine, manifest: Manifest) -> None:
        """Compare an engine with the manifest: it runs code. Once, as long as its file stays what it was."""
        check_files(held.bundle, manifest, [held.record.path], hashes=False)
        stat = held.path.stat()
        key = (held.record.path, stat.st_size, stat.st_mtime_ns)
        if key not in self._whole:
            check_files(held.bundle, manifest, [held.record.path, held.record.sidecar])
            self._whole.add(key)
