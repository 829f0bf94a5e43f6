"""What this machine's processor can do at most, measured: no list knows its clocks, its limits and our share of it.

Compute is a matrix product large enough to be bound by arithmetic, in the runtime that the benchmark is about: float32,
and int8 with sums in int32 (AMX, VNNI or whatever there is). Memory is a copy too large for any cache, on all cores,
counted as STREAM counts it: what is read and what is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np

from latentrt.runtime.machine import core_count
from latentrt.runtime.session import import_onnxruntime

PRODUCT = 2048
COPY_BYTES = 2**28
Kind = Literal["float32", "int8"]


def product_rate(kind: Kind, *, threads: int = 0, seconds: float = 1.0, size: int = PRODUCT) -> float:
    """Operations a second of a matrix product (size, size) in ONNX Runtime on the CPU, the best of several.

    Args:
        kind: of the factors.
        threads: of ONNX Runtime; 0 for its default, all cores.
        seconds: to try for, beside the first run.

    Raises:
        BackendError: ONNX Runtime is not installed.
    """
    session, factor = _product_session(kind, size, threads), _numbers(kind, size)
    return 2 * size**3 / _best(lambda: session.run(None, {"a": factor}), seconds)


def copy_rate(*, threads: int = 0, seconds: float = 1.0, nbytes: int = COPY_BYTES) -> float:
    """Bytes a second that a copy reads and writes, the best of several.

    Args:
        threads: that copy a part each; 0 for as many as there are cores.
        seconds: to try for, beside the first run.
        nbytes: to copy.
    """
    count = threads or core_count()
    parts = [(np.ones(nbytes // count, np.uint8), np.empty(nbytes // count, np.uint8)) for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        # NumPy lets other threads run while it copies.
        seconds_best = _best(lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts)), seconds)
    return 2 * sum(source.nbytes for source, _ in parts) / seconds_best


def _best(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest run; the first one, which sets up, does not count."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best


def _product_session(kind: Kind, size: int, threads: int) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    read, made, operator = (
        (TensorProto.FLOAT, TensorProto.FLOAT, "MatMul")
        if kind == "float32"
        else (TensorProto.UINT8, TensorProto.INT32, "MatMulInteger")
    )
    # The second factor is a weight, as in a network: ONNX Runtime lays it out for its kernels beforehand.
    weight = _numbers(kind, size) if kind == "float32" else _numbers(kind, size).astype(np.int8)
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", read, (size, size))],
        [helper.make_tensor_value_info("c", made, (size, size))],
        [numpy_helper.from_array(weight, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def _numbers(kind: Kind, size: int) -> Any:
    """No zeros and no subnormal numbers; int8 in the range in which processors without VNNI do not saturate."""
    rng = np.random.default_rng(0)
    if kind == "float32":
        return rng.uniform(0.5, 1, (size, size)).astype(np.float32)
    return rng.integers(1, 64, (size, size), np.uint8)
