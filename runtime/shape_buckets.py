"""An engine at one set of input shapes on one lane: execution context, buffers, CUDA graph.

The events of the first call:
    1. context: profile, input shapes, the outputs' shapes, tensor addresses (all of it once)
    2. activation block of the lane, where it is another than before
    3. upload, enqueue: the warm-up, which does what TensorRT puts off until shapes are known, and the call itself
    4. synchronize, begin capture, enqueue, end capture, instantiate: nothing runs
    5. download, synchronize
and of every later one, such as a step:
    1. upload of the inputs that changed: latents and timesteps in one copy, the text not at all
    2. launch of the graph
    3. download, and one synchronize: the sampler's next step needs the values

TensorRT ties a captured graph to its context: whatever is done to the context afterwards makes replaying it undefined.
So each set of shapes has a context of its own, which is not touched once it was captured. What must invalidate a graph
(another activation block, refitted weights) drops it, and the next call is a first one from its step 2 on.

The timesteps of a run could lie on the device as a table; reading a row of it would be another copy or kernel each
step. Beside the latents they travel in a copy that is made anyway, so there is nothing left to save.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial

from .bound_inputs import HeldInputs
from .cuda_buffers import TensorBuffers
from .cuda_device import Device
from .cuda_lanes import Lane
from .engine_loading import LoadedEngine
from .errors import BackendError
from .input_checks import checked_input
from .specs import Array, TensorSpec
from .trt_log import last_errors


class ShapeBucket:
    """Runs an engine at fixed shapes. Whoever uses it holds its lane.

    Args:
        loaded: the engine.
        profile: the optimization profile that holds the shapes.
        shapes: of every input.
        graphs: record the work once and replay it.

    Raises:
        BackendError: TensorRT refused the shapes, or an output's shape depends on values.
        OutOfDeviceMemory: there is no room for inputs and outputs.
    """

    def __init__(
        self,
        device: Device,
        lane: Lane,
        loaded: LoadedEngine,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        graphs: bool,
    ) -> None:
        self._device, self._lane, self._name = device, lane, loaded.spec.name
        self._said = partial(last_errors, loaded.trt)
        self._held = HeldInputs()
        self._block = (0, 0)
        self._graph: int | None = None
        self._captures = graphs
        self._why_no_graph: str | None = None
        self._inputs = {
            spec.name: TensorSpec(spec.name, spec.dtype, tuple(shapes[spec.name])) for spec in loaded.spec.inputs
        }
        self._context = loaded.new_context()
        self._set_shapes(profile, shapes)
        outputs = [self._output(spec) for spec in loaded.spec.outputs]
        self._buffers = TensorBuffers(
            device, self._inputs.values(), outputs, purpose=f"{self._name}: inputs and outputs"
        )
        try:
            for name, address in self._buffers.addresses.items():
                self._must(self._context.set_tensor_address(name, address), f"an address for {name}")
        except BackendError:
            self._buffers.free()
            raise

    @property
    def why_no_graph(self) -> str | None:
        """Why its work could not be captured, and is enqueued anew each time; None if it is as it was to be."""
        return self._why_no_graph

    @property
    def nbytes(self) -> int:
        """What its inputs and outputs take on the device."""
        return self._buffers.nbytes

    def run(self, feeds: Mapping[str, Array], block: tuple[int, int]) -> dict[str, Array]:
        """One call.

        Args:
            feeds: of this bucket's shapes.
            block: address and size of the lane's activation memory.

        Raises:
            UsageError: a feed is not of its input's dtype.
            BackendError: the device or TensorRT failed.
        """
        if block != self._block:
            self.drop_graph()
            if block[1]:
                self._context.set_device_memory(*block)
            self._block = block
        stream = self._lane.stream
        try:
            self._upload(feeds, stream)
            with self._lane.timer.around(stream):
                if self._graph is not None:
                    self._device.launch(self._graph, stream)
                else:
                    self._enqueue()
            if self._graph is None and self._captures:
                self._device.synchronize(stream)
                self._capture()
            self._buffers.download(stream)
            self._device.synchronize(stream)
        except BaseException:
            # A copy may still be reading what the next call overwrites.
            with contextlib.suppress(BackendError):
                self._device.synchronize(stream)
            self._held.forget()
            raise
        self._lane.timer.read(self._name)
        return self._buffers.read()

    def drop_graph(self) -> None:
        """Forget what was captured; the next call captures it again."""
        if self._graph is not None:
            self._device.destroy_executable(self._graph)
            self._graph = None

    def free(self) -> None:
        """Give context, graph and buffers back. The lane's stream must have been synchronized."""
        self.drop_graph()
        self._context = None
        self._buffers.free()

    def _set_shapes(self, profile: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        chosen = self._context.set_optimization_profile_async(profile, self._lane.stream)
        self._must(chosen, f"optimization profile {profile}")
        for name, shape in shapes.items():
            self._must(self._context.set_input_shape(name, shape), f"shape {shape} for {name}")
        try:
            unknown = self._context.infer_shapes()
        except RuntimeError as err:
            raise BackendError(f"{self._name}: expected shapes that go together, got {dict(shapes)}: {err}") from err
        if unknown:
            raise BackendError(f"{self._name}: expected to know all shapes, got none for {', '.join(unknown)}.")

    def _output(self, spec: TensorSpec) -> TensorSpec:
        """An output with its sizes."""
        shape = tuple(int(size) for size in self._context.get_tensor_shape(spec.name))
        if min(shape, default=0) < 0:
            raise BackendError(
                f"{self._name}.{spec.name}: expected a shape that follows from the inputs' shapes, got {shape}, which "
                "depends on their values. Run it with --backend onnxruntime."
            )
        return TensorSpec(spec.name, spec.dtype, shape)

    def _upload(self, feeds: Mapping[str, Array], stream: int) -> None:
        stale = self._held.stale(feeds)
        for name, array in stale.items():
            self._buffers.write(name, checked_input(self._name, self._inputs[name], array))
        self._buffers.upload(stale.keys(), stream)
        for name, array in stale.items():
            self._held.copied(name, array)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._lane.stream):
            raise BackendError(f"{self._name}: expected TensorRT to take the work, and it said: {self._said()}")

    def _capture(self) -> None:
        """Capture the work that has just run. Where that is not possible, it goes on running without."""
        stream = self._lane.stream
        # TensorRT-RTX can say so beforehand.
        if not getattr(self._context, "is_stream_capturable", lambda _: True)(stream):
            self._captures, self._why_no_graph = False, "TensorRT says that this network's work cannot be captured"
            return
        try:
            self._device.begin_capture(stream)
            try:
                self._enqueue()
            except BackendError:
                # The stream has to leave the mode all the same.
                self._device.destroy_graph(self._device.end_capture(stream))
                raise
            graph = self._device.end_capture(stream)
            try:
                self._graph = self._device.instantiate(graph)
            finally:
                self._device.destroy_graph(graph)
        except BackendError as err:
            self._captures, self._why_no_graph = False, str(err)

    def _must(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise BackendError(f"{self._name}: expected TensorRT to take {what}, and it said: {self._said()}")
