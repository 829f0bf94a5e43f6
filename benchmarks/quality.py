"""What each row's pictures cost against fp32 ones: the price beside every speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from latentrt.calibrate.pictures import REFERENCE
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.errors import LatentrtError
from latentrt.runtime.model_facts import Schedules, read_schedules
from latentrt.runtime.sampler_names import resolve_sampler
from latentrt.runtime.sampling_plan import plan_sampling

from .bench_plan import Progress, SettingsOf, own_settings, quiet
from .cases import OURS, Case, Model, Settings, Subject
from .drawings import Kept, OpenWorker, draw_cases
from .quality_figures import with_figures
from .quality_pictures import save_shown
from .quality_plan import QualityPlan
from .results_file import Row

RANDOM_WEIGHTS = "random weights: timing only"
# What all solvers of the probability flow converge to is taken from this one, of second order.
_FINEST = ("DPM++ 2M", "karras")


def with_quality(
    rows: Sequence[Row],
    *,
    model: Model,
    plan: QualityPlan,
    open_worker: OpenWorker,
    work_folder: Path,
    pictures: Path | None = None,
    settings_of: SettingsOf = own_settings,
    on_progress: Progress = quiet,
) -> tuple[tuple[Row, ...], str]:
    """Draw the plan's prompts with every measured row, and hold the pictures against fp32 ones.

    The reference is latentrt with the bundle's fp32 networks on ONNX Runtime's CPU provider, one picture at a time, at
    the row's size and settings; where the bundle lacks fp32, in the best precision that it has. Every row is drawn,
    those that differ in batch alone too: that a picture does not depend on its company is then a result.

    `Quality.finest_psnr` is against fp32 pictures of many steps of DPM++ 2M with Karras spacing, at the same scale of
    guidance and guided throughout: solvers that add no noise converge to them, so it holds what the precision, the
    sampler, the steps and the interval of guidance cost together.

    What cannot be drawn or compared is a note of its row, and the rest goes on.

    Args:
        rows: of all systems; those that were skipped pass through.
        model: that `open_worker` opens.
        open_worker: opens a subject.
        work_folder: keeps what was drawn, so that a benchmark that was interrupted goes on.
        pictures: folder beside the results' file for the pictures that `Row.pictures` names; None for none.
        settings_of: a case's settings as its system takes them.

    Returns:
        The rows, and what they were held against, for people.

    Raises:
        ArtifactError: the bundle is damaged.
        ConfigError: a config of it holds what is not supported.
        OSError: the disk is full or a folder not writable.
    """
    if plan.random_weights:
        return tuple(rows), RANDOM_WEIGHTS
    measured = [row for row in rows if row.skipped is None]
    if not measured:
        return tuple(rows), ""
    bundle = open_bundle(Path(model.bundle))
    precision = next(iter(bundle.precisions()), REFERENCE)
    references = {row.case: _reference(row.case, precision, plan) for row in measured}
    finest = _finest(references, plan, read_schedules(bundle))
    drawn = draw_cases(
        (*references.values(), *finest.values(), *references),
        plan.prompts,
        model,
        work_folder,
        open_worker=open_worker,
        settings_of=settings_of,
        on_progress=on_progress,
    )
    found = []
    for index, row in enumerate(measured):
        on_progress("compare pictures", index, len(measured))
        target = finest.get(row.case)
        figures = drawn[row.case], drawn[references[row.case]], None if target is None else drawn[target]
        found.append(with_figures(row, plan, *figures))
    if pictures is not None:
        found = save_shown(found, drawn, references, pictures, plan.shown)
    done = {row.case: row for row in found}
    text = _reference_text(plan, precision, [drawn[case] for case in references.values()], finest=bool(finest))
    return tuple(done.get(row.case, row) for row in rows), text


def adds_noise(settings: Settings, schedules: Schedules) -> bool:
    """Whether a sampler draws noise while it runs: its pictures are others than those of one that does not.

    Raises:
        UsageError: there is no such sampler, or it cannot be spaced or run so.
        ConfigError: the checkpoint's schedule is not possible with it.
    """
    sampler = resolve_sampler(settings.sampler)
    return plan_sampling(schedules.of(sampler), sampler, settings.steps, spacing=settings.schedule).takes_noise


def _reference(case: Case, precision: str, plan: QualityPlan) -> Case:
    subject = Subject(
        system=OURS,
        precision=precision,
        backend=plan.backend,
        width=case.subject.width,
        height=case.subject.height,
        batch=1,
    )
    return Case(subject=subject, settings=case.settings)


def _finest(references: Mapping[Case, Case], plan: QualityPlan, schedules: Schedules) -> dict[Case, Case]:
    """What each case converges to; none for cases that add noise, and for those without others to compare with."""
    if not plan.finest_steps:
        return {}
    sampler, schedule = _FINEST
    targets = {
        case: Case(
            subject=reference.subject,
            settings=Settings(
                sampler=sampler, schedule=schedule, steps=plan.finest_steps, guidance=case.settings.guidance
            ),
        )
        for case, reference in references.items()
        if not adds_noise(case.settings, schedules)
    }
    choices: dict[Case, set[Settings]] = {}
    for case, target in targets.items():
        choices.setdefault(target, set()).add(case.settings)
    return {case: target for case, target in targets.items() if len(choices[target]) > 1}


def _reference_text(
    plan: QualityPlan, precision: str, references: Sequence[Kept | LatentrtError], *, finest: bool
) -> str:
    """What rows were held against, for people."""
    backends = sorted({found.backend for found in references if isinstance(found, Kept)})
    if not backends:
        return "none: the reference was not drawn, and each row says why"
    prompts = plan.prompts
    last = prompts.seed + len(prompts.texts) - 1
    drawn = f"latentrt {precision} on {', '.join(backends)}, one picture at a time, seeds {prompts.seed} to {last}"
    parts = [f"{drawn}, with the row's size and settings"]
    if precision != REFERENCE:
        parts.append(f"the bundle holds no {REFERENCE}, and {precision} is the best that it has")
    if finest:
        sampler, schedule = _FINEST
        parts.append(f"settings are held against {plan.finest_steps} steps of {sampler} {schedule}, guided throughout")
    if "ssim" not in plan.metrics:
        parts.append("no SSIM, since SciPy is not installed")
    return "; ".join(parts)
