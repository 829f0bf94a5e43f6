"""TensorRT in ONNX Runtime: engines that are computed on the CPU, from and to the addresses that a context was given.

An engine's file is JSON that says which graph of a bundle it is. What TensorRT leaves undefined raises `Misuse`.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from fake_cuda import GARBAGE, FakeDevice, Misuse
from onnx import numpy_helper

from latentrt.runtime.backends import open_session
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.session import OnnxSession

DTYPES = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "uint8": "UINT8", "bool": "BOOL"}
_NUMPY = {name: numpy for numpy, name in DTYPES.items()}

DataType = enum.Enum("DataType", list(DTYPES.values()))  # type: ignore[misc]
TensorIOMode = enum.Enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
TensorLocation = enum.Enum("TensorLocation", ["DEVICE", "HOST"])
Allocation = enum.Enum("Allocation", ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"])
Specialization = enum.Enum("Specialization", ["LAZY", "EAGER", "NONE"])
Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])


class ILogger:
    Severity = Severity

    def log(self, severity: Any, text: str) -> None:
        raise NotImplementedError


class FakeTensorRT:
    """The module: what `import_flavour` returns.

    `compiled` counts kernels that no runtime cache held; a call takes `seconds` of the GPU.
    """

    Builder = object
    ILogger = ILogger
    TensorIOMode, TensorLocation = TensorIOMode, TensorLocation
    ExecutionContextAllocationStrategy = Allocation
    DynamicShapesKernelSpecializationStrategy = Specialization

    def __init__(self, device: FakeDevice, name: str = "tensorrt_rtx", version: str = "1.7.1.116") -> None:
        self.__name__, self.__version__ = name, version
        self.device = device
        self.compiled = 0
        self.deserialized = 0
        self.capturable = True
        self.refuses_capture = False
        self.seconds = 0.0

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda content: self._engine(bytes(content), logger))

    def Refitter(self, engine: FakeEngine, logger: Any) -> FakeRefitter:
        return FakeRefitter(engine)

    def Weights(self, dtype: Any, pointer: int, size: int) -> Any:
        return np.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint8)), (size * np.dtype(_NUMPY[dtype.name]).itemsize,)
        ).view(_NUMPY[dtype.name])

    def _engine(self, content: bytes, logger: Any) -> FakeEngine | None:
        self.deserialized += 1
        try:
            stated = json.loads(content)
        except ValueError:
            logger.log(Severity.ERROR, "IRuntime::deserializeCudaEngine: the engine is corrupt")
            return None
        if self.__name__ == "tensorrt_rtx" and stated["weight_bytes"] > self.device.memory()[0]:
            logger.log(Severity.ERROR, "Requested amount of GPU memory could not be allocated")
            return None
        return FakeEngine(self, stated)


class FakeEngine:
    """An engine; its weights are on the device until the last reference to it is gone."""

    def __init__(self, trt: FakeTensorRT, stated: dict[str, Any]) -> None:
        self.trt, self.stated = trt, stated
        self.name = stated["component"]
        bundle = open_bundle(Path(stated["bundle"]))
        self.graph = bundle.graph(stated["component"], stated["precision"])
        self.model = onnx.load(self.graph)
        opened = open_session(bundle, stated["component"], stated["precision"], backend="onnxruntime")
        self.spec = opened.spec
        self.compute: Callable[[dict[str, Any]], dict[str, Any]] = _no_weights if stated["stripped"] else opened
        self.tensors = [*self.spec.inputs, *self.spec.outputs]
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(stated["profiles"])
        self.device_memory_size_v2 = stated["activation_bytes"]
        self.streamable_weights_size = stated["weight_bytes"] if trt.__name__ == "tensorrt" else 0
        self._on_device = 0
        if trt.__name__ == "tensorrt_rtx":
            self.weight_streaming_budget_v2 = stated["weight_bytes"]

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._on_device

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        self.trt.device.weights += budget - self._on_device
        self._on_device = budget

    def __del__(self) -> None:
        self.trt.device.weights -= getattr(self, "_on_device", 0)

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index].name

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if self.spec.input(name) else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[DTYPES[self.tensor(name).dtype]]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self.tensor(name).shape]

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        shapes = self.stated["profiles"][profile][name]
        return [shapes["min"], shapes["opt"], shapes["max"]]

    def tensor(self, name: str) -> Any:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig(self.trt)

    def create_execution_context(self, how: Any) -> FakeContext:
        if self.trt.__name__ == "tensorrt":
            # What is not streamed goes to the device with the first context.
            self.weight_streaming_budget_v2 = self._on_device or self.stated["weight_bytes"]
            return FakeContext(self, how, None)
        return FakeContext(self, how.strategy, how)


def _no_weights(feeds: dict[str, Any]) -> dict[str, Any]:
    raise Misuse("an engine without weights ran")


class FakeConfig:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt
        self.strategy: Any = Allocation.STATIC
        self.dynamic_shapes_kernel_specialization_strategy: Any = Specialization.LAZY
        self.cache: FakeRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache(self._trt.__version__)

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeRuntimeCache:
    """Names of kernels; contents of another version are refused."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.kernels: set[str] = set()

    def serialize(self) -> bytes:
        return json.dumps([self.version, sorted(self.kernels)]).encode()

    def deserialize(self, content: bytes) -> bool:
        try:
            version, kernels = json.loads(content)
        except ValueError:
            return False
        if version == self.version:
            self.kernels |= set(kernels)
        return bool(version == self.version)


class FakeContext:
    """An execution context. Each change makes a captured graph of it undefined."""

    def __init__(self, engine: FakeEngine, strategy: Any, config: FakeConfig | None) -> None:
        if strategy is not Allocation.USER_MANAGED:
            raise Misuse("a context with activation memory of its own")
        self.engine, self.config = engine, config
        self.trt, self.device = engine.trt, engine.trt.device
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.block = (0, 0)
        self.revision = 0
        self.warm = False

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._changed()
        self.profile = profile
        return profile < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._changed()
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile or 0)
        self.shapes[name] = shape
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def infer_shapes(self) -> list[str]:
        return [spec.name for spec in self.engine.spec.inputs if spec.name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        if self.engine.compute is _no_weights:
            raise Misuse("a context of an engine without weights")
        zeros = {spec.name: np.zeros(self.shapes[spec.name], spec.dtype) for spec in self.engine.spec.inputs}
        return tuple(self.engine.compute(zeros)[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._changed()
        self.addresses[name] = address
        return address % 256 == 0

    def set_device_memory(self, address: int, size: int) -> None:
        self._changed()
        if size < self.engine.device_memory_size_v2 or address % 256:
            raise Misuse(f"an activation block of {size} bytes at {address:#x}")
        self.block = (address, size)

    def is_stream_capturable(self, stream: int) -> bool:
        return self.trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        capturing = self.device.is_capturing(stream)
        if capturing and self.trt.refuses_capture:
            return False
        if capturing and not self.warm:
            raise Misuse("captured before a warm-up")
        self._compile(capturing)
        self.device.log.append(("capture" if capturing else "enqueue", self.engine.name))
        self.warm = True
        # What is enqueued keeps addresses and weights as they are now.
        addresses, block, compute, revision = dict(self.addresses), self.block, self.engine.compute, self.revision
        shapes = {name: tuple(shape) for name, shape in self.shapes.items()}
        outputs = {spec.name: (self.get_tensor_shape(spec.name), spec.dtype) for spec in self.engine.spec.outputs}

        def work() -> None:
            if capturing and revision != self.revision:
                raise Misuse("a graph was replayed whose context was changed")
            self._use(block, stream)
            self.device.clock += self.trt.seconds
            feeds = {
                spec.name: self._at(addresses[spec.name], shapes[spec.name], spec.dtype).copy()
                for spec in self.engine.spec.inputs
            }
            for name, value in compute(feeds).items():
                self._at(addresses[name], *outputs[name])[...] = value

        self._use(block, stream)
        self.device.submit(stream, work)
        return True

    def _use(self, block: tuple[int, int], stream: int) -> None:
        """Scribble over the activation memory, which no one else may be using."""
        address, size = block
        if size:
            if self.device.blocks_in_use.setdefault(address, stream) != stream:
                raise Misuse("two streams use one activation block at the same time")
            self.device.view(address, size)[: self.engine.device_memory_size_v2] = GARBAGE
        elif self.engine.device_memory_size_v2:
            raise Misuse("no activation memory")

    def _at(self, address: int, shape: tuple[int, ...], dtype: str) -> Any:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.device.view(address, nbytes).view(dtype).reshape(shape)

    def _compile(self, capturing: bool) -> None:
        if self.config is None:
            return
        if capturing and self.config.dynamic_shapes_kernel_specialization_strategy is not Specialization.EAGER:
            raise Misuse("a graph of fallback kernels was captured")
        kernel = f"{self.engine.name} {sorted(self.shapes.items())}"
        held = self.config.cache.kernels if self.config.cache is not None else set()
        if not self.warm and kernel not in held:
            self.trt.compiled += 1
        held.add(kernel)

    def _changed(self) -> None:
        self.revision += 1


class FakeRefitter:
    """Takes every weight of the graph, constants of shape arithmetic not among them."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.model = engine.model
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.given: dict[str, Any] = {}

    def get_all_weights(self) -> list[str]:
        return [name for name, tensor in self.initializers.items() if tensor.data_type != onnx.TensorProto.INT64]

    def get_missing_weights(self) -> list[str]:
        return []

    def get_weights_prototype(self, name: str) -> Any:
        array = numpy_helper.to_array(self.initializers[name])
        return SimpleNamespace(dtype=DataType[DTYPES[str(array.dtype)]], size=array.size)

    def set_named_weights(self, name: str, weights: Any) -> bool:
        self.given[name] = weights
        return True

    def refit_cuda_engine(self) -> bool:
        for name, values in self.given.items():
            tensor = self.initializers[name]
            array = np.ascontiguousarray(values).reshape(list(tensor.dims))
            tensor.CopyFrom(numpy_helper.from_array(array, name))
        self.engine.compute = OnnxSession(self.engine.graph, model=self.model.SerializeToString())
        return True
