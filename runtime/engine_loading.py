"""From an engine file to an engine on the device: checked before it is deserialized, and held to its sidecar after."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .cuda_device import Device, out_of_memory
from .engine_choice import HeldEngine
from .engine_refit import fill
from .errors import ArtifactError, BackendError
from .kernel_cache import KernelCache
from .specs import ModelSpec, TensorSpec
from .thin_engine import restore_engine
from .trt_flavour import import_flavour
from .trt_log import error_text, last_errors, shared_logger

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


@dataclass(eq=False)
class LoadedEngine:
    """An engine on the device, weights and all.

    Attributes:
        trt: the module of its flavour.
        engine: TensorRT's ICudaEngine.
        spec: its inputs and outputs.
        graphs: whether its contexts will be captured.
        kernels: where kernels compiled here are kept; None for full TensorRT, which compiles none.
    """

    held: HeldEngine
    trt: Any
    engine: Any
    spec: ModelSpec
    graphs: bool
    kernels: KernelCache | None

    @property
    def activation_bytes(self) -> int:
        """Scratch memory of a context, over all profiles."""
        return int(self.engine.device_memory_size_v2)

    @property
    def weight_bytes(self) -> int | None:
        """Weights that it keeps on the device; None for engines whose sidecar does not say."""
        stated = self.held.sidecar.weight_bytes
        if stated is None or self.held.sidecar.flavour != "tensorrt":
            return stated
        # Of those that it streams, what its budget does not hold stays on the host.
        return stated - int(self.engine.streamable_weights_size) + int(self.engine.weight_streaming_budget_v2)

    def new_context(self) -> Any:
        """An execution context that gets its activation memory from outside.

        Raises:
            BackendError: TensorRT could not make one.
        """
        strategy = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self.kernels is None:
            context = self.engine.create_execution_context(strategy)
        else:
            config = self.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if self.graphs:
                # By default a new shape runs on fallback kernels until its own are compiled in the background. A graph
                # that is captured meanwhile would run the fallback for good.
                config.dynamic_shapes_kernel_specialization_strategy = (
                    self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
                )
            self.kernels.attach(config)
            context = self.engine.create_execution_context(config)
        if context is None:
            raise BackendError(f"{self.spec.name}: TensorRT made no execution context: {last_errors(self.trt)}")
        return context


def load_engine(
    held: HeldEngine,
    device: Device,
    *,
    graphs: bool,
    kernels: KernelCache | None,
    weight_budget: int | None = None,
) -> LoadedEngine:
    """Deserialize an engine whose sidecar says that it can be used here; one without weights gets those of its graph.

    Args:
        held: its file compared with the manifest.
        weight_budget: bytes of weights to keep on the device, the others are copied there when their layer runs; None
            keeps all. Full TensorRT only.

    Raises:
        ArtifactError: TensorRT cannot read the file, or it is not what its sidecar says.
        BackendError: the flavour is not installed, or the engine cannot do what was asked for.
        OutOfDeviceMemory: its weights do not fit.
    """
    trt = import_flavour(held.sidecar.flavour)
    device.activate()
    name, weights = held.record.component, held.sidecar.weight_bytes or 0
    if weight_budget is None and device.memory()[0] < weights:
        raise out_of_memory(device, weights, f"{name}: weights")
    logger = shared_logger(trt)
    logger.messages.clear()
    runtime = trt.Runtime(logger)
    if "version_compatible" in held.sidecar.compatibility and held.sidecar.flavour == "tensorrt":
        # Such an engine brings the runtime of its own version along.
        runtime.engine_host_code_allowed = True
    with _mapped(held) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        said = error_text(logger.messages)
        if "memory" in said.lower():
            raise out_of_memory(device, weights, f"{name}: weights")
        raise ArtifactError(f"{held.path}: expected an engine that TensorRT reads, and it said: {said}. {_again(held)}")
    _check_tensors(held, trt, engine)
    _check_profiles(held, engine)
    if held.sidecar.stripped:
        fill(trt, engine, held.graph, logger, component=name)
    if weight_budget is not None:
        _stream_weights(held, engine, weight_budget)
    return LoadedEngine(held, trt, engine, held.spec, graphs, kernels)


@contextmanager
def _mapped(held: HeldEngine) -> Iterator[memoryview]:
    """The engine's bytes: the file's, without a copy of their own in memory, or those that a thin file makes."""
    with held.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        view = memoryview(content)
        try:
            yield restore_engine(view, held.graph) if held.sidecar.thin else view
        finally:
            view.release()


def _check_tensors(held: HeldEngine, trt: Any, engine: Any) -> None:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    stated = {
        **dict.fromkeys((spec.name for spec in held.sidecar.inputs), trt.TensorIOMode.INPUT),
        **dict.fromkeys((spec.name for spec in held.sidecar.outputs), trt.TensorIOMode.OUTPUT),
    }
    modes = {name: engine.get_tensor_mode(name) for name in names}
    if modes != stated:
        raise _differs(held, f"inputs and outputs {sorted(stated)}", str(sorted(modes)))
    for spec in (*held.sidecar.inputs, *held.sidecar.outputs):
        found = _found_spec(engine, spec.name)
        if found.dtype != spec.dtype or not _fits(spec, found):
            raise _differs(held, f"{spec.name} {spec.dtype} {spec.shape}", f"{found.dtype} {found.shape}")
        if engine.get_tensor_location(spec.name) != trt.TensorLocation.DEVICE:
            raise BackendError(
                f"{held.path}: expected tensors on the device, got {spec.name} on the host. "
                "Run it with --backend onnxruntime."
            )


def _found_spec(engine: Any, name: str) -> TensorSpec:
    dtype = engine.get_tensor_dtype(name).name
    return TensorSpec(name, _DTYPES.get(dtype, dtype), tuple(int(size) for size in engine.get_tensor_shape(name)))


def _fits(stated: TensorSpec, found: TensorSpec) -> bool:
    """Whether an engine's tensor can be the sidecar's: -1 stands for what the sidecar gives a name."""
    return len(stated.shape) == len(found.shape) and all(
        want == size or (not isinstance(want, int)) for want, size in zip(stated.shape, found.shape, strict=True)
    )


def _check_profiles(held: HeldEngine, engine: Any) -> None:
    count = engine.num_optimization_profiles
    if count != len(held.sidecar.profiles):
        raise _differs(held, f"{len(held.sidecar.profiles)} profiles", str(count))
    for index, profile in enumerate(held.sidecar.profiles):
        for name, shapes in profile.items():
            found = tuple(tuple(int(size) for size in dims) for dims in engine.get_tensor_profile_shape(name, index))
            if found != (shapes.min, shapes.opt, shapes.max):
                raise _differs(held, f"shapes {shapes} for {name}", str(found))


def _differs(held: HeldEngine, stated: str, found: str) -> ArtifactError:
    return ArtifactError(f"{held.path}: expected what its sidecar states, {stated}, got {found}. {_again(held)}")


def _again(held: HeldEngine) -> str:
    return f"Run: latentrt build {held.bundle} --components {held.record.component} --force"


def _stream_weights(held: HeldEngine, engine: Any, budget: int) -> None:
    name = held.record.component
    if held.sidecar.flavour != "tensorrt":
        raise BackendError(
            f"{name}: expected an engine of full TensorRT to stream weights, got {held.sidecar.flavour}. "
            "Choose another residency policy, such as swap."
        )
    streamable = int(engine.streamable_weights_size)
    if streamable <= 0:
        raise BackendError(
            f"{name}: expected an engine built for weight streaming, got one that is not. "
            f"Run: latentrt build {held.bundle} --components {name} --flavour tensorrt --weight-streaming"
        )
    engine.weight_streaming_budget_v2 = min(max(budget, 0), streamable)
