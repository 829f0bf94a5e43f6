"""ONNX Runtime as a session: the embedded default on every machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ArtifactError, BackendError, LatentrtError
from .graph_weights import with_weights
from .input_checks import checked_feeds
from .io_binding import BoundRuns
from .onnx_cuda import PROVIDER, CudaOptions, out_of_memory, provider_options, with_graph_if_possible
from .specs import Array, ModelSpec, TensorSpec, closed_error

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        BackendError: it is not installed, or two of its distributions have overwritten each other.
    """
    try:
        import onnxruntime
    except ImportError as err:
        raise BackendError(
            f"onnxruntime: expected an importable package, got {err}. "
            "Install one: pip install 'latentrt[cpu]' or pip install 'latentrt[gpu]'."
        ) from err
    if not hasattr(onnxruntime, "InferenceSession"):
        raise BackendError(
            "onnxruntime: expected a whole package, got the remains of two distributions installed together. "
            "Run: pip uninstall -y onnxruntime onnxruntime-gpu, then install latentrt[cpu] or latentrt[gpu]."
        )
    return onnxruntime


def _tensor_spec(arg: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else str(size or "?") for size in arg.shape)
    return TensorSpec(name=arg.name, dtype=_DTYPES.get(arg.type, arg.type), shape=shape)


class OnnxSession:
    """Run one ONNX graph with ONNX Runtime.

    Args:
        path: the .onnx file; external data is found beside it.
        providers: execution providers, first choice first; default the CPU's.
        threads: intra-op threads; 0 lets ONNX Runtime choose.
        arena: keep the memory of a run for the next one. Without it the device's memory is given back after every run,
            which suits networks that run once a picture and need much, such as the VAE's decoder. With it, on CUDA,
            inputs and outputs keep their buffers and runs are recorded (`io_binding`). Default: `optimize`.
        model: the graph's bytes, if not those of the file, as with textual inversions added.
        optimize: let ONNX Runtime rewrite the graph while it loads. Without it the graph runs as it is written:
            nothing is folded, no weight is copied, and those in external data stay in the mapped file, so that a
            graph of gigabytes opens in a tenth of a second.
        cuda: how the CUDA provider is used, where it is among the providers.
        weights: that take the place of the graph's, by initializer, of their types and shapes.

    Raises:
        BackendError: onnxruntime is missing, does not offer or start a provider that was asked for, or the GPU's
            memory is too small.
        ArtifactError: the file is not a graph that ONNX Runtime can load.
    """

    def __init__(
        self,
        path: Path,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int = 0,
        arena: bool | None = None,
        model: bytes | None = None,
        optimize: bool = True,
        cuda: CudaOptions | None = None,
        weights: Mapping[str, Array] | None = None,
    ) -> None:
        ort = import_onnxruntime()
        offered = ort.get_available_providers()
        if missing := [name for name in providers if name not in offered]:
            raise BackendError(f"onnxruntime: expected provider {missing[0]}, this build offers {offered}.")
        keeps, on_cuda, told = optimize if arena is None else arena, PROVIDER in providers, cuda or CudaOptions()
        options = _session_options(ort, threads=threads, arena=keeps, optimize=optimize)
        if weights:
            model, external = with_weights(path, model, weights)
            # ONNX Runtime takes no copy of them: they have to stay as long as the session.
            self._weights = [ort.OrtValue.ortvalue_from_numpy(values) for values in external.values()]
            options.add_external_initializers(list(external), self._weights)
        if model is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))

        def opened(graph: bool) -> Any:
            configured = [provider_options(told, graph=graph) if name == PROVIDER else {} for name in providers]
            source = str(path) if model is None else model
            # Left to itself, ONNX Runtime prints what went wrong and runs on the CPU.
            return ort.InferenceSession(source, options, list(providers), configured, enable_fallback=0)

        try:
            session, self._refused = with_graph_if_possible(opened, wanted=on_cuda and keeps and told.graphs)
        except Exception as err:
            if memory := out_of_memory(err, path.parent.name, "for its weights", on_cuda=on_cuda):
                raise memory from err
            raise ArtifactError(
                f"{path}: expected an ONNX graph that ONNX Runtime loads, got: {err}. Export it again."
            ) from err
        self._providers = tuple(session.get_providers())
        if on_cuda and PROVIDER not in self._providers:
            raise BackendError(
                f"{path.parent.name}: expected {PROVIDER}, it did not start: its libraries were not found. "
                "Run: pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        self._spec = ModelSpec(
            name=path.parent.name,
            inputs=tuple(_tensor_spec(arg) for arg in session.get_inputs()),
            outputs=tuple(_tensor_spec(arg) for arg in session.get_outputs()),
        )
        self._session: Any | None = session
        self._bound: BoundRuns | None = None
        self._run_options: Any = None
        if on_cuda and keeps:
            again = partial(opened, False) if told.graphs and self._refused is None else None
            self._bound = BoundRuns(session, self._spec, device_id=told.device, without_graphs=again)
        elif on_cuda:
            self._run_options = ort.RunOptions()
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{told.device}")

    @property
    def spec(self) -> ModelSpec:
        """Inputs and outputs, as the graph declares them."""
        return self._spec

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that run it, first choice first."""
        return self._providers

    @property
    def backend(self) -> str:
        """`onnxruntime` and the provider that runs the graph."""
        return f"onnxruntime {self._providers[0].removesuffix('ExecutionProvider')}"

    @property
    def why_no_graph(self) -> str | None:
        """Why its runs on CUDA are not recorded, although they were to be; None otherwise."""
        return self._refused or (self._bound.why_no_graph if self._bound is not None else None)

    @property
    def notes(self) -> tuple[str, ...]:
        """That its runs are not recorded, if they were to be."""
        reason = self.why_no_graph
        return () if reason is None else (f"{self._spec.name} runs without CUDA graphs: {reason}",)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; feeds are cast to the graph's dtypes.

        Raises:
            UsageError: inputs do not fit the graph.
            BackendError: ONNX Runtime failed while running it, or the session was closed.
        """
        session, bound = self._session, self._bound
        if session is None:
            raise closed_error(self._spec.name)
        try:
            if bound is not None:
                return bound(feeds)
            names = [tensor.name for tensor in self._spec.outputs]
            values = session.run(names, checked_feeds(self._spec, feeds), self._run_options)
            return dict(zip(names, values, strict=True))
        except LatentrtError:
            raise
        except Exception as err:
            raise self._failure(err, {name: np.shape(value) for name, value in feeds.items()}) from err

    def _failure(self, err: Exception, shapes: Mapping[str, tuple[int, ...]]) -> BackendError:
        if self._session is None:
            return closed_error(self._spec.name)
        memory = out_of_memory(err, self._spec.name, f"on inputs {shapes}", on_cuda=PROVIDER in self._providers)
        return memory or BackendError(f"{self._spec.name}: {self.backend} failed on inputs {shapes}: {err}")

    def warm_up(self, shapes: Sequence[Mapping[str, tuple[int, ...]]]) -> None:
        """Be ready for inputs of these shapes: on CUDA, make their buffers and record their runs.

        Raises:
            UsageError: shapes do not fit the graph.
            BackendError: ONNX Runtime failed while running it, or the session was closed.
        """
        if self._bound is None:
            return
        for feeds in [feeds for each in shapes for feeds in self._bound.rehearsal(each)]:
            self(feeds)

    def close(self) -> None:
        """Give back the weights, and all memory on the device, when the calls under way are done."""
        bound, self._session, self._bound = self._bound, None, None
        if bound is not None:
            bound.close()


def _session_options(ort: Any, *, threads: int, arena: bool, optimize: bool) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors are raised, and said once
    options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
    options.enable_cpu_mem_arena = arena
    # A product with weights in int8 alone is computed in float32; by default the other factor is rounded to int8 too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not optimize:
        options.enable_mem_pattern = False
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Node by node as the file lists them: by default, whatever needs no input may run, and stay, at the start.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options
