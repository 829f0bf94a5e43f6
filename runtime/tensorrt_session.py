"""TensorRT as a session: one engine on the device, calls through buffers and CUDA graphs that stay.

What a call does, in order, is written down in `shape_buckets`; what engines share, in `cuda_lanes`.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from .cuda_device import Device
from .cuda_lanes import Lane, Lanes
from .engine_choice import HeldEngine, no_profile
from .engine_loading import LoadedEngine
from .engine_refit import refit
from .engine_sidecar import covers
from .errors import UsageError
from .input_checks import check_names
from .shape_buckets import ShapeBucket
from .specs import Array, ModelSpec, closed_error
from .trt_log import shared_logger

Shapes = tuple[tuple[int, ...], ...]


class TensorRTSession:
    """Run one engine; safe to use from many threads, as many at a time as there are lanes.

    Args:
        loaded: the engine; the session owns it from now on.
        device: the GPU it is on.
        lanes: shared by the engines of a pipeline.
        buckets: how many sets of shapes keep context, buffers and graph on each lane; the one that was not used for the
            longest time loses them.
    """

    def __init__(self, loaded: LoadedEngine, *, device: Device, lanes: Lanes, buckets: int = 8) -> None:
        self._loaded: LoadedEngine | None = loaded
        self._held: HeldEngine = loaded.held
        self._spec = loaded.spec
        self._device, self._lanes, self._limit = device, lanes, buckets
        self._buckets: dict[int, OrderedDict[Shapes, ShapeBucket]] = {}
        self._first_call = threading.Lock()
        self._why_no_graph: str | None = None
        lanes.join(self, loaded.activation_bytes)

    @property
    def spec(self) -> ModelSpec:
        """Inputs and outputs, as engine and sidecar state them."""
        return self._spec

    @property
    def backend(self) -> str:
        """The flavour and the GPU."""
        return f"{self._held.sidecar.flavour} on {self._device.name}"

    @property
    def why_no_graph(self) -> str | None:
        """Why the latest call was not, and will not be, replayed from a CUDA graph; None if it will."""
        return self._why_no_graph

    @property
    def weight_bytes(self) -> int | None:
        """What its weights take on the device; None where that is not known."""
        loaded = self._loaded
        return 0 if loaded is None else loaded.weight_bytes

    @property
    def io_bytes(self) -> int:
        """What the inputs and outputs of all sets of shapes take on the device, over all lanes."""
        with self._lanes.take_all():
            return sum(bucket.nbytes for buckets in self._buckets.values() for bucket in buckets.values())

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; feeds are cast to the engine's dtypes, outputs are arrays of their own.

        Raises:
            UsageError: inputs do not fit, or no profile holds their shapes; says which it holds.
            BackendError: the session was closed, or the device or TensorRT failed.
        """
        check_names(self._spec, feeds)
        with self._lanes.take() as lane:
            return self._run(lane, feeds)

    def warm_up(self, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
        """Have sets of input shapes ready on every lane, kernels compiled and graphs captured.

        Raises:
            UsageError: no profile holds one of them.
            BackendError: as a call.
        """
        dtypes = {spec.name: spec.dtype for spec in self._spec.inputs}
        with self._lanes.take_all() as lanes:
            for lane, wanted in itertools.product(lanes, shapes):
                zeros = {name: np.zeros(shape, dtypes.get(name)) for name, shape in wanted.items()}
                check_names(self._spec, zeros)
                self._run(lane, zeros)

    def refit(self, weights: Mapping[str, Array]) -> None:
        """Replace weights of the engine, once the calls under way are done; graphs are captured again.

        Args:
            weights: by the names of the graph's initializers, in the engine's own types.

        Raises:
            BackendError: the session was closed, or TensorRT failed.
            UsageError: the engine was not built for it, or a weight is of another type or size.
        """
        with self._lanes.take_all():
            loaded = self._opened()
            self._device.activate()
            try:
                logger, component = shared_logger(loaded.trt), self._spec.name
                refit(loaded.trt, loaded.engine, weights, logger, graph=self._held.graph, component=component)
            finally:
                for buckets in self._buckets.values():
                    for bucket in buckets.values():
                        bucket.drop_graph()

    def close(self) -> None:
        """Free contexts, engine and buffers, once the calls under way are done; the lanes with their last user."""
        with self._lanes.take_all():
            if self._loaded is None:
                return
            self._device.activate()
            for buckets in self._buckets.values():
                for bucket in buckets.values():
                    bucket.free()
            self._buckets.clear()
            # TensorRT frees an engine's memory when the last reference to it is gone.
            self._loaded = None
        self._lanes.leave(self)

    def _opened(self) -> LoadedEngine:
        if self._loaded is None:
            raise closed_error(self._spec.name)
        return self._loaded

    def _run(self, lane: Lane, feeds: Mapping[str, Array]) -> dict[str, Array]:
        loaded = self._opened()
        self._device.activate()
        shapes = {spec.name: np.shape(feeds[spec.name]) for spec in self._spec.inputs}
        buckets, key = self._buckets.setdefault(lane.index, OrderedDict()), tuple(shapes.values())
        if key in buckets:
            buckets.move_to_end(key)
            return self._run_bucket(lane, buckets[key], feeds)
        profile = self._profile(shapes)
        # One at a time: kernels that a first call compiles are there for the next lane's.
        with self._first_call:
            while len(buckets) >= self._limit:
                buckets.popitem(last=False)[1].free()
            buckets[key] = ShapeBucket(self._device, lane, loaded, profile, shapes, graphs=loaded.graphs)
            outputs = self._run_bucket(lane, buckets[key], feeds)
            if loaded.kernels is not None:
                loaded.kernels.save()
            return outputs

    def _run_bucket(self, lane: Lane, bucket: ShapeBucket, feeds: Mapping[str, Array]) -> dict[str, Array]:
        block = lane.reserve(self._lanes.block_bytes, f"{self._spec.name}: activation memory of the engines")
        outputs = bucket.run(feeds, block)
        self._why_no_graph = bucket.why_no_graph
        return outputs

    def _profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        _check_sizes(self._spec, shapes)
        profile = covers(self._held.sidecar, shapes)
        if profile is None:
            raise UsageError(no_profile([self._held], shapes))
        return profile


def _check_sizes(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Have sizes of one name be one size: a profile holds each input by itself."""
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in spec.inputs:
        for name, size in zip(tensor.shape, shapes[tensor.name], strict=False):
            if not isinstance(name, str) or name == "?":
                continue
            known, other = sizes.setdefault(name, (size, tensor.name))
            if size != known:
                raise UsageError(
                    f"{spec.name}.{tensor.name}: expected {name} = {known} as in {other}, got shape "
                    f"{shapes[tensor.name]}."
                )
