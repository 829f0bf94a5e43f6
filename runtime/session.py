"""ONNX Runtime as a session: the embedded default on every machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ArtifactError, BackendError, UsageError
from .specs import Array, ModelSpec, TensorSpec

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
# What the CUDA provider does otherwise: doubles its memory whenever it needs more, tries every convolution algorithm
# whenever a picture has a new size, rounds float32 products to TF32, and sums a layer norm's halves as halves.
_PROVIDER_OPTIONS = {
    "CUDAExecutionProvider": {
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "enable_skip_layer_norm_strict_mode": "1",
    }
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


def checked_feeds(spec: ModelSpec, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The feeds in the graph's own dtypes and in its order.

    Raises:
        UsageError: an input is missing, is unknown, or has another rank or fixed size than the graph's.
    """
    known = {tensor.name for tensor in spec.inputs}
    if known != feeds.keys():
        raise UsageError(f"{spec.name}: expected inputs {sorted(known)}, got {sorted(feeds)}.")
    ready: dict[str, Array] = {}
    for tensor in spec.inputs:
        value = np.asarray(feeds[tensor.name])
        fits = value.ndim == len(tensor.shape) and all(
            not isinstance(want, int) or want == size for want, size in zip(tensor.shape, value.shape, strict=True)
        )
        if not fits:
            raise UsageError(f"{spec.name}.{tensor.name}: expected shape {tensor.shape}, got {value.shape}.")
        ready[tensor.name] = np.asarray(value, dtype=tensor.dtype, order="C")
    return ready


class OnnxSession:
    """Run one ONNX graph with ONNX Runtime.

    Args:
        path: the .onnx file; external data is found beside it.
        providers: execution providers, first choice first; default the CPU's.
        threads: intra-op threads; 0 lets ONNX Runtime choose.
        arena: keep the memory of a run for the next one. Without it the CPU's memory is given back after every run,
            which suits networks that run once a picture and need much, such as the VAE's decoder. Default: `optimize`.
        model: the graph's bytes, if not those of the file, as with textual inversions added.
        optimize: let ONNX Runtime rewrite the graph while it loads. Without it the graph runs as it is written:
            nothing is folded, no weight is copied, and those in external data stay in the mapped file, so that a
            graph of gigabytes opens in a tenth of a second.

    Raises:
        BackendError: onnxruntime is missing or does not offer a provider that was asked for.
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
    ) -> None:
        ort = import_onnxruntime()
        offered = ort.get_available_providers()
        if missing := [name for name in providers if name not in offered]:
            raise BackendError(f"onnxruntime: expected provider {missing[0]}, this build offers {offered}.")
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised, and said once
        options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
        options.enable_cpu_mem_arena = optimize if arena is None else arena
        if not optimize:
            options.enable_mem_pattern = False
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            # Node by node as the file lists them: by default, whatever needs no input may run, and stay, at the start.
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            options.add_session_config_entry("session.disable_prepacking", "1")
        if model is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        try:
            source = str(path) if model is None else model
            configured = [_PROVIDER_OPTIONS.get(name, {}) for name in providers]
            self._session = ort.InferenceSession(source, options, list(providers), configured)
        except Exception as err:
            raise ArtifactError(
                f"{path}: expected an ONNX graph that ONNX Runtime loads, got: {err}. Export it again."
            ) from err
        self._spec = ModelSpec(
            name=path.parent.name,
            inputs=tuple(_tensor_spec(arg) for arg in self._session.get_inputs()),
            outputs=tuple(_tensor_spec(arg) for arg in self._session.get_outputs()),
        )
        self._provider = str(self._session.get_providers()[0])

    @property
    def spec(self) -> ModelSpec:
        """Inputs and outputs, as the graph declares them."""
        return self._spec

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that run it, first choice first."""
        return tuple(self._session.get_providers())

    @property
    def backend(self) -> str:
        """`onnxruntime` and the provider that runs the graph."""
        return f"onnxruntime {self._provider.removesuffix('ExecutionProvider')}"

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; feeds are cast to the graph's dtypes.

        Raises:
            UsageError: inputs do not fit the graph.
            BackendError: ONNX Runtime failed while running it.
        """
        names = [tensor.name for tensor in self._spec.outputs]
        ready = checked_feeds(self._spec, feeds)
        try:
            values = self._session.run(names, ready)
        except Exception as err:
            shapes = {name: value.shape for name, value in ready.items()}
            raise BackendError(f"{self._spec.name}: {self.backend} failed on inputs {shapes}: {err}") from err
        return dict(zip(names, values, strict=True))
