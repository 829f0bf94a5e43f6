"""Runs of an ONNX Runtime session through buffers that stay on its device, one set for each combination of shapes.

ONNX Runtime by itself allocates a call's inputs and outputs and copies all of them. Here the buffers of a shape bucket
are made once and stay bound, an input that has not changed is not copied again (`bound_inputs`), and with fixed
addresses the device's work can be recorded and replayed: a CUDA graph for each bucket.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .bound_inputs import HeldInputs
from .input_checks import check_names, checked_feeds, checked_input, zero_feeds
from .onnx_cuda import first_sentence
from .specs import Array, ModelSpec

Shapes = tuple[tuple[int, ...], ...]

# Of ONNX Runtime's run option `gpu_graph_id`: record nothing and replay nothing.
_NO_GRAPH = -1


@dataclass(eq=False)
class _Bucket:
    """The buffers of one combination of shapes; `outputs` are there after its first run."""

    binding: Any
    inputs: Mapping[str, Any]
    graph: int
    outputs: Sequence[Any] = ()
    held: HeldInputs = field(default_factory=HeldInputs)


class BoundRuns:
    """Runs a session with bound buffers, one call after the other, from whatever thread they come.

    They all run on one thread of its own. ONNX Runtime keeps a CUDA graph, and the handles and workspaces of cuBLAS and
    cuDNN, for each thread that calls it: a server's threads would each record every graph again.

    Args:
        session: an `onnxruntime.InferenceSession`.
        spec: its inputs and outputs.
        device: where the buffers are, `cuda` or `cpu`.
        device_id: which of several.
        without_graphs: makes the session anew, not to record anything; None if this one does not either. It takes over
            when recording fails.
        buckets: how many combinations of shapes keep their buffers; the one not used for the longest time loses them.
    """

    def __init__(
        self,
        session: Any,
        spec: ModelSpec,
        *,
        device: str = "cuda",
        device_id: int = 0,
        without_graphs: Callable[[], Any] | None = None,
        buckets: int = 8,
    ) -> None:
        self.why_no_graph: str | None = None
        self._session, self._spec, self._without_graphs = session, spec, without_graphs
        self._device, self._device_id, self._limit = device, device_id, buckets
        self._buckets: OrderedDict[Shapes, _Bucket] = OrderedDict()
        self._numbers = itertools.count(1)  # 0 is what runs without the option take
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"latentrt-{spec.name}")

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; feeds are cast to the graph's dtypes, outputs are copies.

        Raises:
            UsageError: inputs do not fit the graph.
            Exception: ONNX Runtime's own, if it fails.
        """
        return self._thread.submit(self._run, feeds).result()

    def rehearsal(self, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, Array]]:
        """Feeds for the calls that make a bucket's buffers and, where runs are recorded, record its run.

        Raises:
            UsageError: the shapes do not fit the graph.
        """
        # The first run finds the outputs' shapes, the second can be recorded.
        return [zero_feeds(self._spec, shapes)] * (1 if self._without_graphs is None else 2)

    def close(self) -> None:
        """Drop the session and all buffers, after the runs under way."""
        self._thread.submit(self._drop).result()
        self._thread.shutdown()

    def _drop(self) -> None:
        self._buckets.clear()
        self._session = None

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        check_names(self._spec, feeds)
        bucket = self._bucket(feeds)
        self._copy_inputs(bucket, feeds)
        if not bucket.outputs:
            self._first_run(bucket)
        else:
            try:
                self._session.run_with_iobinding(bucket.binding, _options(bucket.graph))
            except Exception as err:
                if self._without_graphs is None:
                    raise
                self._give_graphs_up(first_sentence(err))
                return self._run(feeds)
        # On the CPU `numpy()` is the buffer itself; from other devices it is a copy.
        copied = [value.numpy().copy() if self._device == "cpu" else value.numpy() for value in bucket.outputs]
        return {tensor.name: array for tensor, array in zip(self._spec.outputs, copied, strict=True)}

    def _bucket(self, feeds: Mapping[str, Array]) -> _Bucket:
        shapes = tuple(np.shape(feeds[tensor.name]) for tensor in self._spec.inputs)
        if shapes not in self._buckets:
            checked_feeds(self._spec, feeds)
            while len(self._buckets) >= self._limit:
                _, old = self._buckets.popitem(last=False)
                self._release(old.graph)
            self._buckets[shapes] = self._new_bucket(shapes)
        self._buckets.move_to_end(shapes)
        return self._buckets[shapes]

    def _new_bucket(self, shapes: Shapes) -> _Bucket:
        from onnxruntime import OrtValue

        inputs = {
            tensor.name: OrtValue.ortvalue_from_shape_and_type(
                shape, np.dtype(tensor.dtype).type, self._device, self._device_id
            )
            for tensor, shape in zip(self._spec.inputs, shapes, strict=True)
        }
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        return _Bucket(binding, inputs, _NO_GRAPH if self._without_graphs is None else next(self._numbers))

    def _copy_inputs(self, bucket: _Bucket, feeds: Mapping[str, Array]) -> None:
        for name, array in bucket.held.stale(feeds).items():
            tensor = self._spec.input(name)
            assert tensor is not None  # the names were checked
            try:
                bucket.inputs[name].update_inplace(checked_input(self._spec.name, tensor, array))
            except BaseException:
                bucket.held.forget()
                raise
            bucket.held.copied(name, array)

    def _first_run(self, bucket: _Bucket) -> None:
        """Let ONNX Runtime allocate the outputs, whose shapes only it knows, and bind them for the runs to come."""
        for tensor in self._spec.outputs:
            bucket.binding.bind_output(tensor.name, self._device, self._device_id)
        self._session.run_with_iobinding(bucket.binding, _options(_NO_GRAPH))
        bucket.outputs = bucket.binding.get_outputs()
        for tensor, value in zip(self._spec.outputs, bucket.outputs, strict=True):
            bucket.binding.bind_ortvalue_output(tensor.name, value)

    def _release(self, graph: int) -> None:
        """Have a graph forgotten that nothing will replay. Older versions keep it until the session ends."""
        if graph != _NO_GRAPH and hasattr(self._session, "release_captured_graph"):
            self._session.release_captured_graph(graph)

    def _give_graphs_up(self, reason: str) -> None:
        """Go on with a session that records nothing: what a failed recording leaves behind is undefined."""
        assert self._without_graphs is not None
        self.why_no_graph, reopen, self._without_graphs = reason, self._without_graphs, None
        self._drop()
        self._session = reopen()


def _options(graph: int) -> Any:
    from onnxruntime import RunOptions

    options = RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options
