"""A calibration from planned layers to a verified quantized network in its bundle."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from latentrt.runtime.errors import CalibrationError
from latentrt.runtime.lora_weights import lora_notes

from .apply import Applied, apply_plan
from .calibration_options import CalibrateOptions, drawn_by
from .measuring import measuring
from .plan import Plan
from .plan_checks import check_plan
from .plan_file import load_plan, plan_key
from .planning import plan_items, selected
from .preparing import Prepared, Progress, Say, captured_part, prompts_for
from .prompts import PromptSplit
from .report_plots import Frontier
from .requirements import check_options, check_source
from .search import Choice, Trial, best, spare_db
from .solver import frontier
from .source import Source, open_source
from .stages import FOLDER, alone
from .verification import Outcome, Verification, outcomes, save_verification, what_limits
from .verify import verify_plan

VERIFICATION = "verification.json"
# A plan that misses a budget on the held-out prompts is chosen anew, so often, with less noise by what it missed and
# this; after that by twice as much again, for where pictures are worse the less they have to do with noise.
_AGAIN, _MORE_DB = 3, 0.3
# Captured calls that the graphs are run on before they are put into the bundle.
_CASES = 2
# Points of the solver's frontier that are kept for the report.
_OFFERED = 60


@dataclass(frozen=True, eq=False)
class Calibrated:
    """What came of a calibration.

    Attributes:
        plan: that was applied.
        trials: plans that were measured on the way, the last search's.
        applied: the graphs in the bundle.
        verification: on held-out prompts.
        folder: of the verification, with its pictures.
        frontier: plans that the solver offers: share of the macs, predicted dB, and measured dB or None.
    """

    plan: Plan
    trials: tuple[Trial, ...]
    applied: Applied
    verification: Verification
    folder: Path
    frontier: Frontier

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """What became of the budgets."""
        return outcomes(self.verification)

    @property
    def met(self) -> bool:
        """Whether all budgets are held."""
        return all(outcome.met for outcome in self.outcomes)


def calibrate(
    prepared: Prepared,
    *,
    say: Say = lambda _text: None,
    on_progress: Progress = lambda _text, _share: None,
) -> Calibrated:
    """Find the cheapest plan that meets the budgets, apply it, and verify it on held-out prompts.

    What misses a budget there is chosen anew with less noise. If no plan has less, the last one counts.

    Raises:
        CalibrationError: no plan meets the budgets; says how near the nearest came, and what limits it.
        UsageError, ArtifactError, BackendError: as `preparing.prepare` and `apply.apply_plan`.
    """
    options, plan = prepared.options, prepared.plan
    path, component = prepared.source.bundle.path, prepared.source.component
    with alone(path, component, say=say):
        result, limit, less_db = None, math.inf, 0.0
        for _ in range(1 + _AGAIN):
            # The network's weights are in memory for the search alone: verifying opens others.
            with measuring(prepared, say=say, on_progress=on_progress) as bench:
                trials = bench.search(options.budgets, limit=limit)
            chosen = best(trials)
            if chosen is None or not chosen.choice.chosen:
                if result is None:
                    raise CalibrationError(out_of_reach(trials, plan))
                say("no plan has so little noise")
                break
            made = {"predicted_db": chosen.choice.predicted_db}
            made_of = selected(plan, chosen.choice.chosen, made=made)
            result = _apply_and_verify(prepared, made_of, trials, say, on_progress)
            if result.met:
                break
            missing = max(-spare_db(each.budget, each.value) for each in result.outcomes if not each.met)
            less_db = max(missing + _MORE_DB, 2 * less_db)
            limit = chosen.choice.noise * 10 ** (-less_db / 10)
            say(f"held-out prompts miss a budget by {missing:.1f} dB: {less_db:.1f} dB less noise are wanted")
    assert result is not None
    return result


def quantize_all(
    prepared: Prepared,
    *,
    say: Say = lambda _text: None,
    on_progress: Progress = lambda _text, _share: None,
) -> Calibrated:
    """Quantize all that can be, whatever becomes of the budgets, and verify it; for comparison.

    Raises: as `calibrate`, but for budgets.
    """
    with alone(prepared.source.bundle.path, prepared.source.component, say=say):
        return _apply_and_verify(prepared, prepared.plan, (), say, on_progress)


def verify_edited(
    bundle: Path,
    path: Path,
    options: CalibrateOptions,
    *,
    say: Say = lambda _text: None,
    on_progress: Progress = lambda _text, _share: None,
) -> Calibrated:
    """Apply a plan from a file, which may have been edited, and verify it.

    Args:
        bundle: that holds the plan's graph.
        path: of the plan.
        options: what is drawn, and what budgets it is held to; its component and kind are the plan's.

    Raises:
        CalibrationError: the plan is for another graph or with other LoRAs, or not consistent.
        UsageError, ArtifactError, BackendError: as `preparing.prepare`.
    """
    check_options(options)
    plan = load_plan(path)
    source = open_source(bundle, component=plan.component, loras=options.loras)
    options = dataclasses.replace(options, component=plan.component)
    split = prompts_for(options)
    check_source(source, options, split)
    check_plan(plan, source.layers, source.files, lora_notes(source.loras))
    with alone(bundle, plan.component, say=say):
        return apply_and_verify(source, plan, options, split, say=say, on_progress=on_progress)


def apply_and_verify(
    source: Source,
    plan: Plan,
    options: CalibrateOptions,
    prompts: PromptSplit,
    *,
    say: Say = lambda _text: None,
    on_progress: Progress = lambda _text, _share: None,
) -> Calibrated:
    """Put a plan's graphs into the bundle and measure them on held-out prompts.

    Args:
        source: the network that the plan is for.
        plan: chosen, or edited by hand.
        options: of the calibration.
        prompts: of which those of the verification are drawn.

    Raises: as `apply.apply_plan` and `verify.verify_plan`.
    """
    predicted = captured_part(source, options, prompts, "verification", say=say, on_progress=on_progress)
    cases = {f"captured call {index + 1}": call.feeds for index, call in enumerate(islice(predicted.calls(), _CASES))}
    applied = apply_plan(source, plan, cases=cases, report=say)
    folder = source.bundle.path / FOLDER / source.component / f"verification-{plan.precision}"
    verification = verify_plan(
        drawn_by(options, prompts, "verification", source.bundle.path),
        folder,
        budgets=options.budgets,
        plan=plan_key(plan),
        component=source.component,
        tested=plan.precision,
        judge=options.judge,
        lpips=options.lpips,
        calls=predicted.calls(),
        calls_key=predicted.key,
        on_progress=lambda what, done, total: on_progress(what, done / max(total, 1)),
    )
    save_verification(folder / VERIFICATION, verification)
    return Calibrated(plan, (), applied, verification, folder, ())


def out_of_reach(trials: Sequence[Trial], plan: Plan) -> str:
    """Why no plan that was measured meets the budgets, how near the nearest came, and what limits it.

    Args:
        trials: none of which quantizes anything within the budgets.
        plan: that they are choices from.
    """
    quantizing = [trial for trial in trials if trial.choice.chosen]
    if not quantizing:
        return (
            f"{plan.component}: expected layers that are worth quantizing, got none by {plan.made.get('costs')}. "
            "Keep the network in fp16."
        )
    nearest = max(quantizing, key=lambda trial: trial.spare_db)
    metric, size = nearest.limiting.metric, len(nearest.choice.chosen)
    return (
        f"budget: expected {nearest.limiting}, got {nearest.values[metric]:.4g} from the nearest of {len(trials)} "
        f"plans, which quantizes {size} layers, {nearest.choice.gain:.1%} of the cost. "
        f"{what_limits((), selected(plan, nearest.choice.chosen))} Ask for less, or keep the network in fp16."
    )


def _apply_and_verify(
    prepared: Prepared, plan: Plan, trials: Sequence[Trial], say: Say, progress: Progress
) -> Calibrated:
    result = apply_and_verify(prepared.source, plan, prepared.options, prepared.split, say=say, on_progress=progress)
    offered = frontier_of(prepared, trials)
    return dataclasses.replace(result, trials=tuple(trials), frontier=offered)


def frontier_of(prepared: Prepared, trials: Sequence[Trial]) -> Frontier:
    """The plans that the solver offers, every so many of them, and those that were measured."""
    macs = {layer.name: layer.macs for layer in prepared.plan.layers}

    def share(choice: Choice) -> float:
        return sum(macs[name] for name in choice.chosen)

    offered = [choice for choice in frontier(plan_items(prepared.plan, prepared.layers)) if choice.chosen]
    kept = offered[:: max(1, len(offered) // _OFFERED)]
    measured = [(share(t.choice), t.choice.predicted_db, t.values["noise_db"]) for t in trials if t.choice.chosen]
    offers = [(share(choice), choice.predicted_db, None) for choice in kept]
    return tuple(sorted([*offers, *measured], key=lambda mix: mix[:2]))
