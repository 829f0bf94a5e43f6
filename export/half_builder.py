"""Make one component's graph in half precision, in float32 where it must be, and prove it against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from latentrt.runtime.session import OnnxSession

from .activation_range import activation_ranges, recorded_runs
from .cast_cleanup import CastCleanupPass
from .graph_files import weight_bytes
from .half_precision import HALF_MAX, HALF_TYPES, HalfPrecisionPass, cast_count
from .overflow import HEADROOM, mixed_keep, nearest_overflow
from .parity import BOUNDS, Case, figures_of, measure
from .resources import release_memory

# Graphs with more weights than this are checked as they are written: optimized, ONNX Runtime would copy the weights.
LARGE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class BuiltGraph:
    """A graph that was made and proven.

    Attributes:
        precision: as asked for, or mixed where fp16 was asked for and would overflow.
        files: that it consists of, the graph first.
        parity: figures against PyTorch, with `nearest_overflow`, the number of `casts` and, of a mixed graph, the
            tensors `kept` in float32.
    """

    precision: str
    files: tuple[Path, ...]
    parity: dict[str, Any]


def build_half(
    component: str,
    load: Callable[[], ir.Model],
    path_of: Callable[[str], Path],
    cases: Sequence[Case],
    *,
    precision: str,
    save: Callable[[ir.Model, Path, str], tuple[Path, ...]],
    plain: bool = True,
) -> BuiltGraph:
    """Convert an fp32 graph, find out on its own cases whether it overflows, and compare it with the fp32 model.

    The figures are those of the graph rounded after every operator, because ONNX Runtime's CPU rounds an fp16 graph
    too rarely and has no kernels for bf16 (see half_rounding). An fp16 or mixed graph itself has to run as well,
    finite and within bounds; `parity["ran"]` says whether it did.

    Args:
        component: for messages.
        load: the fp32 graph, a new one at each call; its weights are read when they are written.
        path_of: where to write the graph of a precision.
        precision: fp16, bf16 or mixed. An fp16 graph that would overflow is made mixed instead.
        save: writes a graph of a precision with its weights and returns the files, the graph first.
        plain: also run the graph itself.

    Raises:
        ExportError: a weight overflows, or a figure is out of bounds.
    """
    feeds = [case.feeds for case in cases]
    model, files = write_half(load, (), path_of(precision), precision, save)
    release_memory()
    answers, ranges = recorded_runs(files[0], feeds, rounding=True)
    if not all(largest <= HALF_MAX / HEADROOM for largest in ranges.values()):
        # One overflow makes everything behind it infinite: which tensors are too large shows in float32 alone.
        ranges = activation_ranges(files[0], feeds)
    release_memory()
    full = load()
    keep = frozenset() if precision == "bf16" else mixed_keep(full, ranges)
    made = "mixed" if keep else precision
    if keep:
        for file in files:
            # Not those of another graph that it shares weights with.
            if file.name.startswith(files[0].name):
                file.unlink()
        model, files = write_half(load, keep, path_of(made), made, save)
        answers, _ = recorded_runs(files[0], feeds, rounding=True)
    name, bound = f"{component} {made}", BOUNDS[made]
    parity = figures_of(answers, cases, name=name, bound=bound)
    runs = plain and made != "bf16"
    if runs:
        measure(OnnxSession(files[0], optimize=weight_bytes(model) <= LARGE_BYTES), cases, name=name, bound=bound)
    parity |= {"nearest_overflow": nearest_overflow(full, ranges), "casts": cast_count(model), "ran": runs}
    if made == "mixed":
        parity["kept"] = sorted(keep)
    return BuiltGraph(made, files, parity)


def write_half(
    load: Callable[[], ir.Model],
    keep: Collection[str],
    path: Path,
    precision: str,
    save: Callable[[ir.Model, Path, str], tuple[Path, ...]],
) -> tuple[ir.Model, tuple[Path, ...]]:
    """Write a graph in half precision, and return it with its files.

    Args:
        load: the fp32 graph.
        keep: tensors that stay in float32.
    """
    model = load()
    HalfPrecisionPass(HALF_TYPES[precision], keep)(model)
    CastCleanupPass()(model)
    return model, save(model, path, precision)
