"""Quality budgets: what a user asks of quantized pictures and predictions, and whether it is held."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from latentrt.runtime.errors import UsageError

DEFAULT_BUDGET = "psnr=32"
# What equal pictures and equal predictions count as: JSON has no infinity, and one such picture would carry a mean.
LARGEST_DB = 100.0


@dataclass(frozen=True)
class Metric:
    """What can be asked for.

    Attributes:
        title: for people.
        unit: such as dB; empty where there is none.
        rising: whether more is better.
        largest: what bounds must stay below; they must be above 0.
        digits: after the point, that mean something.
    """

    title: str
    unit: str
    rising: bool
    largest: float
    digits: int


METRICS: Mapping[str, Metric] = {
    "psnr": Metric("PSNR", "dB", rising=True, largest=LARGEST_DB, digits=1),
    "ssim": Metric("SSIM", "", rising=True, largest=1.0, digits=3),
    "flip": Metric("FLIP", "", rising=False, largest=1.0, digits=3),
    "lpips": Metric("LPIPS", "", rising=False, largest=1.0, digits=3),
    "sqnr": Metric("SQNR of the guided prediction", "dB", rising=True, largest=LARGEST_DB, digits=1),
    "accuracy": Metric("loss of prompt accuracy", "", rising=False, largest=1.0, digits=3),
}


@dataclass(frozen=True)
class Budget:
    """A bound on one metric of the quantized network against the fp32 one.

    Pictures are compared with the fp32 ones of the same prompt and seed, and a budget is held by their mean:
    `psnr`, `ssim`, `flip` and `lpips`. `sqnr` is the mean over timesteps of the guided prediction's ratio in dB,
    `accuracy` the share of prompts that fp32 pictures show, less the share that quantized ones do.

    Attributes:
        metric: a key of METRICS.
        bound: the worst mean that is accepted, in the metric's unit.
    """

    metric: str
    bound: float

    def __post_init__(self) -> None:
        """Check the bound.

        Raises:
            UsageError: no such metric, or no value of it can be on the bound.
        """
        metric = METRICS.get(self.metric)
        if metric is None:
            raise UsageError(f"budget: expected one of {', '.join(METRICS)}, got {self.metric!r}. Write psnr=32.")
        if not 0 < self.bound < metric.largest:
            raise UsageError(
                f"budget {self.metric}: expected a bound above 0 and below {metric.largest:g}, got {self.bound:g}. "
                f"{'Smaller' if metric.rising else 'Larger'} ones ask for less."
            )

    def __str__(self) -> str:
        """For people: PSNR >= 32 dB."""
        metric = METRICS[self.metric]
        return f"{metric.title} {'>=' if metric.rising else '<='} {self.bound:g} {metric.unit}".rstrip()

    def margin(self, value: float) -> float:
        """By how much a value is better than the bound, in the metric's unit; negative where it is worse."""
        return value - self.bound if METRICS[self.metric].rising else self.bound - value

    def met(self, value: float) -> bool:
        """Whether a value is within the budget; NaN is not."""
        return self.margin(value) >= 0


def parse_budgets(texts: Sequence[str]) -> tuple[Budget, ...]:
    """Budgets from options such as `psnr=30` or `psnr=30,accuracy=0.01`.

    Raises:
        UsageError: a text is not of that form, a metric is unknown or named twice, a bound is impossible, or there is
            no budget.
    """
    budgets: dict[str, Budget] = {}
    for text in (part.strip() for whole in texts for part in whole.split(",")):
        name, equals, value = text.partition("=")
        try:
            bound = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(f"budget: expected a metric and a number as in psnr=32, got {text!r}.")
        budget = Budget(name.strip().lower(), bound)
        if budgets.setdefault(budget.metric, budget) is not budget:
            raise UsageError(f"budget {budget.metric}: expected one bound, got two. Give the stricter one.")
    if not budgets:
        raise UsageError(f"budget: expected at least one, got none. Write {DEFAULT_BUDGET}.")
    return tuple(budgets.values())


def check_measurable(budgets: Sequence[Budget], *, judge: bool, lpips: bool, calls: bool) -> None:
    """Refuse budgets that nothing given can measure, before anything is computed.

    Args:
        judge: whether there is a judge of pictures.
        lpips: whether there are weights of LPIPS.
        calls: whether there are captured calls of the network.

    Raises:
        UsageError: names the option that is missing.
    """
    asked = {budget.metric for budget in budgets}
    if "accuracy" in asked and not judge:
        raise UsageError("budget accuracy: expected a judge of pictures, got none. Add --judge FILE.py:function.")
    if "lpips" in asked and not lpips:
        raise UsageError("budget lpips: expected LPIPS's weights, got none. Add --lpips WEIGHTS.safetensors.")
    if "sqnr" in asked and not calls:
        raise UsageError("budget sqnr: expected held-out calls of the network, got none. Capture some first.")


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise) of two powers, within ±LARGEST_DB."""
    if not noise > 0:
        return LARGEST_DB if noise == 0 else math.nan
    ratio = signal / noise
    return float(np.clip(10 * math.log10(ratio), -LARGEST_DB, LARGEST_DB)) if ratio > 0 else -LARGEST_DB
