"""ONNX Runtime's CUDA provider: its options, why it cannot be used here, and what its failures mean."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from .cuda_device import OutOfDeviceMemory
from .machine import Machine, probe_machine
from .protobuf import message, varint

PROVIDER = "CUDAExecutionProvider"
PROVIDERS = (PROVIDER, "CPUExecutionProvider")


@dataclass(frozen=True, kw_only=True)
class CudaOptions:
    """How sessions use the CUDA provider.

    Attributes:
        device: which of the GPUs that this process sees.
        graphs: record what a network does for each combination of shapes, and replay it: CUDA graphs. Where the
            provider refuses, it runs without.
        gives_back: networks that run once a prompt or a picture return what they worked in after every run, to whoever
            runs next. A large card can do without: then they are recorded like those that run every step.
        memory_limit: bytes that a session's arena may take; None for all there is. Weights are in it.
    """

    device: int = 0
    graphs: bool = True
    gives_back: bool = True
    memory_limit: int | None = None


def provider_options(options: CudaOptions, *, graph: bool) -> dict[str, str]:
    """What the provider is told.

    By default it doubles its memory whenever it needs more, tries every convolution algorithm whenever a picture has a
    new size, rounds float32 products to TF32, and sums a layer norm's halves as halves.
    """
    told = {
        "device_id": str(options.device),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "enable_skip_layer_norm_strict_mode": "1",
    }
    if options.memory_limit is not None:
        told["gpu_mem_limit"] = str(options.memory_limit)
    # With it all runs share one stream of the session's own; without it every run has a stream of the provider's pool.
    return told | ({"enable_cuda_graph": "1"} if graph else {})


def with_graph_if_possible(open_session: Callable[[bool], Any], *, wanted: bool) -> tuple[Any, str | None]:
    """A session made for CUDA graphs or, where the provider refuses, for plain runs; and why, if it was refused.

    It refuses control flow, and nodes that it leaves to the CPU with copies between the devices; shape arithmetic on
    the CPU is no hindrance. It says so before any weight is copied.

    Args:
        open_session: makes a session, told whether for graphs.
    """
    if not wanted:
        return open_session(False), None
    try:
        return open_session(True), None
    except Exception as err:
        if "graph capture" not in str(err):
            raise
        return open_session(False), first_sentence(err)


@cache
def why_no_cuda() -> str | None:
    """Why ONNX Runtime cannot use a GPU here, with what to do; None if it can. Looked at once a process."""
    from .session import import_onnxruntime

    return judge_cuda(import_onnxruntime(), probe_machine)


def cuda_note() -> str | None:
    """Why this build of ONNX Runtime, made for CUDA, runs on the CPU; None if it does not, or is no such build."""
    from .session import import_onnxruntime

    reason = why_no_cuda() if PROVIDER in import_onnxruntime().get_available_providers() else None
    return None if reason is None else f"onnxruntime runs on the CPU: {reason}"


def judge_cuda(ort: Any, probe: Callable[[], Machine]) -> str | None:
    """As `why_no_cuda`, of a module onnxruntime and a machine. The CPU's build is told apart without a look at it."""
    if PROVIDER not in ort.get_available_providers():
        return (
            "this build of onnxruntime has no CUDA provider. "
            "Run: pip uninstall -y onnxruntime && pip install 'latentrt[gpu]'"
        )
    machine = probe()
    if not machine.gpus:
        return f"the CUDA provider is installed, but {machine.why_no_gpu or 'there is no GPU'}"
    built = str(getattr(ort, "cuda_version", "") or "")
    major = int(built.split(".")[0]) if built[:1].isdigit() else None
    if major and machine.cuda and machine.cuda[0] < major:
        return (
            f"onnxruntime-gpu {ort.__version__} is built for CUDA {major}, and this driver supports "
            f"{machine.cuda[0]}.{machine.cuda[1]}. Update the driver, or install an onnxruntime-gpu for CUDA "
            f"{machine.cuda[0]}"
        )
    return _why_not_started(ort, f"CUDA {major}" if major else "CUDA")


def _why_not_started(ort: Any, cuda: str) -> str | None:
    """Start the provider on a graph of one node: its libraries are only looked for then."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(sys.stderr):  # where it says what it misses; stdout is for results
            ort.preload_dlls()
    try:
        session = ort.InferenceSession(_identity_graph(), providers=list(PROVIDERS), enable_fallback=0)
    except Exception as err:
        return f"the CUDA provider does not start: {first_sentence(err)}"
    if PROVIDER in session.get_providers():
        return None
    return (
        f"the CUDA provider does not find the libraries of {cuda} and cuDNN 9. "
        f"Run: pip install 'onnxruntime-gpu[cuda,cudnn]=={ort.__version__}'"
    )


def _identity_graph() -> bytes:
    """An ONNX model that passes one float32 vector on: ir_version 10, opset 20."""
    vector = message(1, varint(1 << 3), varint(1), *message(2, *message(1, *message(2, b"n"))))
    value = {name: message(1, name) + message(2, *vector) for name in (b"x", b"y")}
    node = message(1, *message(1, b"x"), *message(2, b"y"), *message(4, b"Identity"))
    graph = message(7, *node, *message(2, b"g"), *message(11, *value[b"x"]), *message(12, *value[b"y"]))
    opset = message(8, *message(1, b""), varint(2 << 3), varint(20))
    return b"".join([varint(1 << 3), varint(10), *graph, *opset])


_OUT_OF_MEMORY = re.compile(
    r"allocate memory for requested buffer of size (?P<size>\d+)|smaller than requested bytes of (?P<wanted>\d+)"
    r"|out of memory|CUDA failure 2\b|(CUBLAS|CUDNN)\w*_ALLOC_FAILED",
    re.IGNORECASE,
)


def out_of_memory(err: Exception, component: str, doing: str, *, on_cuda: bool) -> OutOfDeviceMemory | None:
    """An error of ONNX Runtime's as one that says what to do, if the memory was too small; otherwise None.

    Args:
        on_cuda: it was the GPU's; otherwise the machine's.
    """
    match = _OUT_OF_MEMORY.search(str(err))
    if match is None:
        return None
    size = match["size"] or match["wanted"]
    asked = f"{int(size) / 2**20:,.0f} MiB more" if size else "more"
    whose, plan = "memory", ""
    if on_cuda:
        whose, plan = "the GPU's memory", "; latentrt plan BUNDLE --size SIZE --vram SIZE says what fits"
    return OutOfDeviceMemory(
        f"{component}: expected {asked} of {whose} {doing}, got none left. Use --residency swap, a smaller "
        f"picture or batch, or fp16{plan}."
    )


def first_sentence(err: Exception) -> str:
    """What ONNX Runtime says, without the place in its sources and without what follows the first sentence."""
    lines = str(err).strip().splitlines() or [type(err).__name__]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0]).split(". ")[0].rstrip(".")
