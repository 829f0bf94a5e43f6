"""A graph for one of ONNX Runtime's providers, made from the one for every runtime and proven against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from latentrt.runtime.errors import ExportError
from latentrt.runtime.session import OnnxSession

from .cuda_operators import PlainOperatorsPass
from .graph_files import save_onnx
from .ort_fusions import fuse
from .parity import BOUNDS, Case, measure
from .quantized_on_cpu import QuantizedOnCpuPass

NOT_ON_A_GPU = "compared on the CPU, with the CUDA operators written out in ONNX's own; not run on a GPU"


@dataclass(frozen=True)
class TargetGraph:
    """A graph that was made and proven.

    Attributes:
        files: that it consists of, the graph first; where it kept the source's external data, this is among them.
        parity: figures, with the `operators` of ONNX Runtime that it holds and, for CUDA, a `note` on what was not run.
        nodes: of the graph.
    """

    files: tuple[Path, ...]
    parity: dict[str, Any]
    nodes: int


def target_path(source: str, precision: str, target: str) -> str:
    """Where a bundle keeps a target's graph: `unet/model.fp32.cpu.onnx` beside `unet/model.onnx`."""
    folder, _, name = source.rpartition("/")
    return f"{folder}/{name.split('.')[0]}.{precision}.{target}.onnx"


def build_target(
    target: str, source: Path, path: Path, cases: Sequence[Case], *, component: str, precision: str
) -> TargetGraph:
    """Write the graph of a target and compare it.

    The CPU's keeps its weights in the source's external data, where it has some: it is a few hundred kilobytes, opens
    in a tenth of a second, and its weights stay in the mapped file. It holds no layout of one processor's, so that it
    runs wherever the source does. CUDA's has weights of its own, convolutions with channels last.

    Args:
        target: `cpu` or `cuda`.
        source: the graph for every runtime, in the same precision; external data is found beside it.
        path: where to write; the file belongs beside the source in the end.
        cases: inputs, and what the fp32 graph or the model answers.
        component: for messages.
        precision: of the source.

    Raises:
        ExportError: a figure is out of bounds.
    """
    graph = _write(target, source, path)
    # The CPU's by its bytes, because its external data lies beside the source.
    session = _checkable(path) if target == "cuda" else OnnxSession(source, model=path.read_bytes(), optimize=False)
    figures = measure(session, cases, name=f"{component} {precision} for {target}", bound=BOUNDS[precision])
    return dataclasses.replace(graph, parity={**figures, **graph.parity})


def build_kernels(source: Path, path: Path, cases: Sequence[Case], *, component: str, precision: str) -> TargetGraph:
    """Write a quantized graph as the CPU's kernels want it, and have it give the same bits.

    Args:
        source: the float32-typed graph that calibration made for the CPU; external data is found beside it.
        path: where to write; the weights are its own.
        cases: inputs.
        component: for messages.
        precision: of the source.

    Raises:
        ExportError: an output differs by a bit, with ONNX Runtime's optimizations off.
    """
    model = ir.load(source)
    QuantizedOnCpuPass()(model)
    files = save_onnx(model, path)
    plain = OnnxSession(source, optimize=False)
    wanted = [plain(case.feeds) for case in cases]
    made = OnnxSession(path, optimize=False)
    for case, outputs in zip(cases, wanted, strict=True):
        found = made(case.feeds)
        for name, values in outputs.items():
            if not np.array_equal(found[name], values):
                raise ExportError(
                    f"{component} {precision}: expected {name} to be {source.name}'s, bit for bit, got other numbers "
                    f"in case '{case.name}'. Please report this; the bundle draws with {source.name} as before."
                )
    return TargetGraph(files, {"identical_cases": len(cases)}, len(model.graph))


def _write(target: str, source: Path, path: Path) -> TargetGraph:
    """The graph in its file, with what is known of it without running it."""
    model = ir.load(source)
    parity: dict[str, Any] = {"operators": fuse(model, target)}
    files: tuple[Path, ...]
    if target == "cuda":
        files, parity["note"] = save_onnx(model, path), NOT_ON_A_GPU
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, path)
        files = (path, *_external_files(model, source))
    return TargetGraph(files, parity, len(model.graph))


def _external_files(model: ir.Model, source: Path) -> list[Path]:
    tensors = (value.const_value for value in model.graph.initializers.values())
    names = {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return [source.with_name(name) for name in sorted(names)]


def _checkable(path: Path) -> OnnxSession:
    """A CUDA graph that runs on the CPU; its weights stay in the graph's own external data."""
    model = ir.load(path)
    PlainOperatorsPass()(model)
    scratch = path.with_name("checkable.onnx")
    ir.save(model, scratch)
    try:
        return OnnxSession(scratch, optimize=False)
    finally:
        scratch.unlink()
