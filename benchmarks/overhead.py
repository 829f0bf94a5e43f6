"""What measuring costs: the share by which looking at stages and calls makes a run longer."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from .bench_plan import Plan, Progress, Worker, quiet
from .cases import Case
from .differences import paired_ratio
from .results_file import Overhead
from .timings import is_settled

# Half width of the interval, as a share of a run, that is enough to hold a cost of 1 % against.
_BOUND = 0.0025
_MOST = 200


def measure_overhead(worker: Worker, case: Case, plan: Plan, *, on_progress: Progress = quiet) -> Overhead:
    """Alternate timed and untimed runs of one process, and compare each pair.

    Pairs are timed first and untimed first in turn (A B, B A), so that neither a drift nor the order is taken for a
    cost. There are enough when the interval is within a quarter of a percent, or the time is up.

    Args:
        worker: of latentrt, with the case's subject open.
        case: what is drawn.
        plan: `warm_up` runs come before, `min_runs` pairs are the least, and they take `seconds` at most.
        on_progress: is told the pairs that are done, and the most that there may be.

    Raises:
        LatentrtError: a run failed.
    """
    counted: list[float] = []

    def seconds(*, timed: bool) -> float:
        drawn = worker.run(case.settings, plan.prompts_of(case.subject), plan.seed, timed=timed)
        if drawn.clock is not None:
            counted.append(drawn.clock / drawn.seconds)
        return drawn.seconds

    for _ in range(plan.warm_up):
        seconds(timed=True)
    timed: list[float] = []
    bare: list[float] = []
    while not _enough(timed, bare, plan):
        on_progress("what measuring costs", len(timed), _MOST)
        timed.append(seconds(timed=True))
        bare += [seconds(timed=False), seconds(timed=False)]
        timed.append(seconds(timed=True))
    ratio = paired_ratio(timed, bare)
    interval = None if ratio.interval is None else (ratio.interval[0] - 1, ratio.interval[1] - 1)
    return Overhead(
        share=ratio.value - 1, interval=interval, pairs=len(timed), counted=median(counted) if counted else None
    )


def _enough(timed: Sequence[float], bare: Sequence[float], plan: Plan) -> bool:
    if not timed or sum(timed) + sum(bare) >= plan.seconds or len(timed) >= _MOST:
        return bool(timed)
    ratios = [one / other for one, other in zip(timed, bare, strict=True)]
    return len(ratios) >= plan.min_runs and is_settled(ratios, _BOUND)
