"""What a verification found: figures, budgets that are held or not, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.manifest import write_atomic

from .budget import METRICS, Budget
from .picture_metrics import Spread, mean_interval
from .pictures import REFERENCE
from .plan import Plan
from .prediction_noise import PredictionNoise, StepNoise, mean_db

FORMAT_VERSION = 1
FLOOR = "fp16"
_NAMED = 5


@dataclass(frozen=True)
class Measured:
    """One precision.

    Attributes:
        precisions: of each network of the run, by component.
        backend: that ran it, for people.
        pictures: folder with a PNG for each prompt, relative to the verification's file.
        metrics: of the pictures against the reference's, by name; none for the reference itself.
        verdicts: the judge's, on each picture; None without a judge.
        noise: of the predictions; None for the reference, and where no calls were given.
    """

    precisions: Mapping[str, str]
    backend: str
    pictures: str
    metrics: Mapping[str, Spread]
    verdicts: tuple[bool, ...] | None
    noise: PredictionNoise | None

    @property
    def accuracy(self) -> float | None:
        """Share of the prompts that the pictures show; None without a judge."""
        return None if self.verdicts is None else float(np.mean(self.verdicts))


@dataclass(frozen=True)
class Verification:
    """A quantized network held against the fp32 one on prompts that it was not calibrated with.

    Attributes:
        component: that was quantized.
        plan: key of its plan.
        tested: precision that is to hold the budgets, such as int8.
        prompts: that were drawn.
        seed: of the first prompt's picture; prompt i has seed + i.
        settings: of all pictures, as `latentrt.runtime.Request` has them.
        loras: name, scale and SHA-256 of each.
        judge: file and function; None for none.
        budgets: that were asked for.
        measured: by precision, REFERENCE first.
        machine: what it ran on: platform, processor features, cores, versions of tools.
    """

    component: str
    plan: str
    tested: str
    prompts: tuple[str, ...]
    seed: int
    settings: Mapping[str, Any]
    loras: tuple[Mapping[str, Any], ...]
    judge: str | None
    budgets: tuple[Budget, ...]
    measured: Mapping[str, Measured]
    machine: Mapping[str, Any]

    @property
    def on_gpu(self) -> bool:
        """Whether what was tested ran on a GPU."""
        return "CPU" not in self.measured[self.tested].backend


@dataclass(frozen=True)
class Outcome:
    """A budget and what was measured.

    Attributes:
        value: of the tested precision.
        interval: 95 % interval of it over the pictures; None for predictions.
        floor: the fp16 network's value, which is what rounding alone costs; None if it was not measured.
    """

    budget: Budget
    value: float
    interval: tuple[float, float] | None
    floor: float | None

    @property
    def met(self) -> bool:
        """Whether the budget is held."""
        return self.budget.met(self.value)

    @property
    def reachable(self) -> bool:
        """Whether fp16 holds it. If it does not, no choice of layers can be expected to."""
        return self.floor is None or self.budget.met(self.floor)

    def __str__(self) -> str:
        """One line for people."""
        margin = self.budget.margin(self.value)
        state = f"{'met by' if self.met else 'missed by'} {_figure(self.budget.metric, abs(margin))}"
        parts = [f"{self.budget}: {_figure(self.budget.metric, self.value)}, {state}"]
        if self.interval is not None:
            low, high = (_figure(self.budget.metric, end) for end in self.interval)
            parts.append(f"95 % interval {low} to {high}")
        if self.floor is not None:
            parts.append(f"{FLOOR} {_figure(self.budget.metric, self.floor)}")
        return "; ".join(parts)


def value_of(
    verification: Verification, precision: str, metric: str
) -> tuple[float, tuple[float, float] | None] | None:
    """A metric of a precision against the reference, with its interval; None if it was not measured."""
    measured = verification.measured.get(precision)
    if measured is None:
        return None
    if metric == "sqnr":
        return (mean_db(measured.noise.guided), None) if measured.noise is not None else None
    if metric == "accuracy":
        reference = verification.measured[REFERENCE].verdicts
        if reference is None or measured.verdicts is None:
            return None
        losses = np.array(reference, np.float64) - np.array(measured.verdicts, np.float64)
        return float(losses.mean()), mean_interval(losses)
    found = measured.metrics.get(metric)
    return None if found is None else (found.mean, (found.low, found.high))


def outcomes(verification: Verification) -> tuple[Outcome, ...]:
    """What became of each budget, in their order.

    Raises:
        ArtifactError: a budget's metric was not measured.
    """
    found = []
    for budget in verification.budgets:
        value = value_of(verification, verification.tested, budget.metric)
        if value is None:
            raise ArtifactError(f"verification: expected {budget.metric} of {verification.tested}, found none.")
        floor = value_of(verification, FLOOR, budget.metric) if verification.tested != FLOOR else None
        found.append(Outcome(budget, *value, floor[0] if floor else None))
    return tuple(found)


def what_limits(missed: Sequence[Outcome], plan: Plan) -> str:
    """Why budgets are missed, for people: fp16 itself, or the quantized layers that are predicted to add most noise.

    Args:
        missed: outcomes that are not met, at least one.
    """
    beyond = [str(outcome.budget) for outcome in missed if not outcome.reachable]
    if beyond:
        return f"{FLOOR} itself misses {', '.join(beyond)}: no choice of layers can hold it. Ask for less."
    noisy = sorted(
        ((layer.noise, layer.name) for layer in plan.layers if layer.quantized and layer.noise), reverse=True
    )
    if not noisy:
        quantized = sum(layer.quantized for layer in plan.layers)
        return f"The plan names no noise of its {quantized} quantized layers. Measure sensitivities."
    total = sum(noise for noise, _ in noisy)
    named = ", ".join(f"{name} ({noise / total:.0%})" for noise, name in noisy[:_NAMED])
    return f"Of the predicted noise of {len(noisy)} quantized layers, most is from {named}."


def save_verification(path: Path, verification: Verification) -> None:
    """Write a verification as JSON, atomically.

    Raises:
        OSError: the disk is full or the folder not writable.
    """
    content = {"format_version": FORMAT_VERSION, **asdict(verification)}
    write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


def load_verification(path: Path) -> Verification:
    """Read what `save_verification` wrote.

    Raises:
        ArtifactError: the file is missing, damaged, or of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise ArtifactError(f"{path}: expected format version {FORMAT_VERSION}, got {version}. Verify again.")
        return Verification(
            **{
                **content,
                "prompts": tuple(content["prompts"]),
                "loras": tuple(content["loras"]),
                "budgets": tuple(Budget(**each) for each in content["budgets"]),
                "measured": {name: measured_of(each) for name, each in content["measured"].items()},
            }
        )
    except OSError as err:
        raise ArtifactError(f"{path}: expected a verification, got {err.strerror}. Verify first.") from err
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        raise ArtifactError(f"{path}: expected a verification, got a damaged file ({err}). Verify again.") from err


def measured_of(content: Mapping[str, Any]) -> Measured:
    """A `Measured` from what `dataclasses.asdict` and JSON made of it.

    Raises:
        KeyError: something is missing.
        TypeError: something is of another type, or there is more.
    """
    metrics = {name: Spread(**{**each, "values": tuple(each["values"])}) for name, each in content["metrics"].items()}
    verdicts, noise = content["verdicts"], content["noise"]
    return Measured(
        **{
            **content,
            "metrics": metrics,
            "verdicts": None if verdicts is None else tuple(verdicts),
            "noise": None if noise is None else _noise_of(noise),
        }
    )


def _noise_of(content: Mapping[str, Any]) -> PredictionNoise:
    return PredictionNoise(**{name: tuple(StepNoise(**step) for step in steps) for name, steps in content.items()})


def _figure(metric: str, value: float) -> str:
    known = METRICS[metric]
    return f"{value:.{known.digits}f} {known.unit}".rstrip()
