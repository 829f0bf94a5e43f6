"""Find the cheapest mix of precisions that meets budgets, by measuring as few plans as possible.

A solver knows what noise a plan adds to the guided prediction and what it saves, but not what a noise does to
pictures. That relation is steep and smooth: in decibels it is close to a line of slope one. So a plan is measured, the
noise allowed is moved by what was missing or left, and again, between the best that failed and the worst that held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from latentrt.runtime.errors import CalibrationError

from .budget import Budget, decibels

# A plan that meets its budgets with no more than this to spare is not improved further.
TOLERANCE_DB = 0.5
ROUNDS = 4
# Kept in hand when a step is taken by the slope, which is not known exactly.
_MARGIN_DB = 0.2
# Of the budget that is won for a decibel of predicted noise given up, at least: a few pictures may well say none.
_FLATTEST = 0.3


@dataclass(frozen=True)
class Choice:
    """What a solver proposes for a limit of noise.

    Attributes:
        chosen: names of the layers to quantize.
        noise: predicted, as a share of the guided prediction's power.
        gain: what it saves, as a share of the cost of all layers.
    """

    chosen: frozenset[str]
    noise: float
    gain: float

    @property
    def predicted_db(self) -> float:
        """Signal over predicted noise, dB."""
        return decibels(1.0, self.noise)


@dataclass(frozen=True)
class Trial:
    """A plan that was measured.

    Attributes:
        choice: the plan.
        values: what was measured, by metric.
        spare_db: by how much noise could grow until a budget is missed; negative where one is.
        limiting: the budget with the least to spare.
    """

    choice: Choice
    values: Mapping[str, float]
    spare_db: float
    limiting: Budget

    @property
    def met(self) -> bool:
        """Whether all budgets are."""
        return self.spare_db >= 0


def search(
    solve: Callable[[float], Choice],
    budgets: Sequence[Budget],
    measure: Callable[[Choice], Mapping[str, float]],
    *,
    rounds: int = ROUNDS,
    limit: float = math.inf,
) -> tuple[Trial, ...]:
    """Measure plans until one meets all budgets with little to spare, or rounds are used up.

    The first takes all that is within the limit; a plan is not measured twice.

    Args:
        solve: the best plan within a limit of noise, a share of the guided prediction's power.
        budgets: all to be met.
        measure: a plan, giving the values of the budgets' metrics.
        rounds: plans to measure at most; twice as many as long as none meets the budgets.
        limit: of the noise of all plans, a share of the guided prediction's power.

    Returns:
        In the order in which they were measured; `best` picks one.

    Raises:
        CalibrationError: a measured value is NaN.
    """
    trials: list[Trial] = []
    choice = solve(limit)
    # In decibels of predicted noise: the most that held, and the least that did not.
    low, high = -math.inf, math.inf
    while len(trials) < (rounds if best(trials) else 2 * rounds):
        if any(choice.chosen == trial.choice.chosen for trial in trials):
            break
        trial = _judged(choice, budgets, measure(choice))
        trials.append(trial)
        if not choice.chosen or (trial.met and (len(trials) == 1 or trial.spare_db <= TOLERANCE_DB)):
            break
        level = -choice.predicted_db
        low, high = (max(low, level), high) if trial.met else (low, min(high, level))
        wanted = level + (trial.spare_db - _MARGIN_DB) / (_slope(trials) if low == -math.inf else 1)
        if not low < wanted < high:
            wanted = (low + high) / 2
        choice = solve(10 ** (wanted / 10))
    return tuple(trials)


def best(trials: Sequence[Trial]) -> Trial | None:
    """The trial that saves most of those that met the budgets; None if none did."""
    met = [trial for trial in trials if trial.met]
    return max(met, key=lambda trial: trial.choice.gain) if met else None


def _slope(trials: Sequence[Trial]) -> float:
    """Decibels of a budget that one of predicted noise is worth, by the last two plans; 1 before there are two."""
    if len(trials) < 2:
        return 1.0
    before, after = trials[-2:]
    won, given = after.spare_db - before.spare_db, after.choice.predicted_db - before.choice.predicted_db
    return min(max(won / given, _FLATTEST), 1.0) if given > 0 else 1.0


def _judged(choice: Choice, budgets: Sequence[Budget], values: Mapping[str, float]) -> Trial:
    for budget in budgets:
        if math.isnan(values[budget.metric]):
            raise CalibrationError(
                f"{budget.metric}: expected a number, got NaN from the measurement. Check the pictures in fp32."
            )
    spares = {budget: spare_db(budget, values[budget.metric]) for budget in budgets}
    limiting = min(budgets, key=lambda budget: spares[budget])
    return Trial(choice, dict(values), spares[limiting], limiting)


def spare_db(budget: Budget, value: float) -> float:
    """By how many decibels noise may grow until a budget is missed; negative where it has to shrink.

    PSNR and SQNR are decibels of noise. 1 - SSIM grows with the noise's power, FLIP with its amplitude, LPIPS a little
    faster than its power; a line through the bound is right where it matters. A share of right pictures says nothing
    of how much: infinite where the budget is met, and a step of 3 dB where not.
    """
    bound = budget.bound
    if budget.metric in ("psnr", "sqnr"):
        return value - bound
    if budget.metric == "ssim":
        return _ratio_db(1 - bound, 1 - value)
    if budget.metric == "flip":
        return 2 * _ratio_db(bound, value)
    if budget.metric == "lpips":
        return _ratio_db(bound, value)
    return math.inf if budget.met(value) else -3.0


def _ratio_db(bound: float, value: float) -> float:
    return 10 * math.log10(bound / value) if value > 0 else math.inf
