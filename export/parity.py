"""Is the graph its model? Figures of one array against another, in which a NaN is never a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from latentrt.runtime.errors import ExportError
from latentrt.runtime.specs import Array

# fp32: sums in another order, some 30 layers deep, give 1e-6 to 1e-5. fp16: 11 bits round at 5e-4, and the
# components' depth raises that to a few 1e-3; beyond 1e-2 pictures change visibly. bf16: 8 bits, three fewer, and the
# error of a chain grows in proportion to that of one rounding, so everything is 2**3 times as much (measured: 8 to 10
# times fp16's figures); pictures do change. mixed: fp16 with fewer roundings.
BOUNDS = {"fp32": 1e-4, "fp16": 1e-2, "mixed": 1e-2, "bf16": 8e-2}
# The PSNR of equal arrays, which is infinite, and which JSON cannot hold.
PSNR_CAP = 200.0


@dataclass(frozen=True)
class Comparison:
    """How far a candidate is from its reference.

    Attributes:
        max_abs: largest absolute difference.
        relative_l2: norm of the difference over the norm of the reference.
        psnr_db: peak signal-to-noise ratio; the peak is the reference's range. At most PSNR_CAP.
        finite: neither array holds a NaN or an infinity.
    """

    max_abs: float
    relative_l2: float
    psnr_db: float
    finite: bool

    def within(self, bound: float) -> bool:
        """Finite and relative_l2 at most `bound`; NaN is not."""
        return self.finite and bool(self.relative_l2 <= bound)

    def figures(self) -> dict[str, float]:
        """What the manifest records."""
        return {name: value for name, value in asdict(self).items() if name != "finite"}


@dataclass(frozen=True)
class Case:
    """One set of inputs and what the model makes of them, all by name."""

    name: str
    feeds: Mapping[str, Array]
    expected: Mapping[str, Array]


def compare(reference: Array, candidate: Array) -> Comparison:
    """Compare two arrays of one shape, in float64.

    Raises:
        ExportError: the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ExportError(f"parity: expected shape {reference.shape}, got {candidate.shape}.")
    finite = bool(np.isfinite(reference).all() and np.isfinite(candidate).all())
    if not finite:
        return Comparison(max_abs=np.nan, relative_l2=np.nan, psnr_db=np.nan, finite=False)
    wanted = reference.astype(np.float64)
    difference = candidate.astype(np.float64) - wanted
    error, size = float(np.linalg.norm(difference)), float(np.linalg.norm(wanted))
    peak = float(np.ptp(wanted)) or float(np.abs(wanted).max())
    rms = error / np.sqrt(max(difference.size, 1))
    psnr = PSNR_CAP if rms == 0 else -np.inf if peak == 0 else 20 * np.log10(peak / rms)
    return Comparison(
        max_abs=float(np.abs(difference).max(initial=0.0)),
        relative_l2=error / size if size else (0.0 if error == 0 else np.inf),
        psnr_db=float(min(psnr, PSNR_CAP)),
        finite=True,
    )


def measure(
    run: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    cases: Iterable[Case],
    *,
    name: str,
    bound: float,
) -> dict[str, Any]:
    """Run every case and hold each output to the bound.

    Args:
        run: the graph, such as an OnnxSession.

    Returns, raises: as `figures_of`.
    """
    cases = list(cases)
    return figures_of((run(case.feeds) for case in cases), cases, name=name, bound=bound)


def figures_of(
    answers: Iterable[Mapping[str, Array]], cases: Iterable[Case], *, name: str, bound: float
) -> dict[str, Any]:
    """Hold each output of every case to the bound.

    Args:
        answers: what a graph made of each case, in order.
        name: for messages, such as `unet fp16`.
        bound: on the relative L2 of every output.

    Returns:
        Case -> figures of its worst output, and `worst_relative_l2` over all.

    Raises:
        ExportError: an output is not finite or exceeds the bound; the message has its figures.
    """
    figures: dict[str, Any] = {}
    worst = 0.0
    for case, outputs in zip(cases, answers, strict=True):
        comparisons = {key: compare(value, outputs[key]) for key, value in case.expected.items()}
        for key, comparison in comparisons.items():
            if not comparison.within(bound):
                what = (
                    f"relative L2 {comparison.relative_l2:.3g}, max abs {comparison.max_abs:.3g}, "
                    f"PSNR {comparison.psnr_db:.1f} dB"
                    if comparison.finite
                    else "NaN or infinity"
                )
                raise ExportError(
                    f"{name}: expected {key} within relative L2 {bound:g} of PyTorch, got {what} in case "
                    f"'{case.name}'. The graph does not compute what the model does: nothing was written."
                )
        case_worst = max(comparisons.values(), key=lambda comparison: comparison.relative_l2)
        figures[case.name] = case_worst.figures()
        worst = max(worst, case_worst.relative_l2)
    return {**figures, "worst_relative_l2": worst}
