"""A benchmark from its options to its results: the parts one after another, each filling its field of the rows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latentrt.calibrate.judge import load_judge
from latentrt.calibrate.prompts import load_prompts
from latentrt.runtime.bundle import Bundle, open_bundle
from latentrt.runtime.errors import UsageError
from latentrt.runtime.machine import probe_machine
from latentrt.runtime.onnx_cuda import why_no_cuda

from .bench_options import BenchOptions, cases_of
from .bench_plan import Plan, Progress, quiet
from .cases import OURS, Case, Model, Settings, Subject
from .cold_start import with_cold_starts
from .disk import with_disk
from .drawings import Prompts
from .machine_facts import cpu_name, machine_facts, model_facts, package_versions
from .overhead import measure_overhead
from .peaks import peak_finder
from .peers import checkpoint_of, peer_settings, why_not, worker_of
from .quality import with_quality
from .quality_plan import QualityPlan, load_lpips
from .results_file import Overhead, Results, Row, save_results
from .roofline import with_roofline
from .rounds import measure
from .stolen_time import processor_ticks, stolen_share
from .workers import OUR_HANDLERS, Worker, open_worker


@dataclass(frozen=True)
class Opener:
    """Opens subjects in processes of their own, and keeps the versions of packages that they tell.

    Attributes:
        own: versions here, by distribution.
        told: likewise; of an environment of its own as `name (system)`.
    """

    model: Model
    own: Mapping[str, str]
    told: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def __call__(self, subject: Subject) -> Iterator[Worker]:
        """A process with a subject open, for as long as the block runs.

        Raises:
            BackendError: as `workers.open_worker`.
        """
        ours = subject.system == OURS
        python, handlers = (None, OUR_HANDLERS) if ours else worker_of(subject, self.model)
        with open_worker(subject, self.model, python=python, handlers=handlers) as worker:
            for name, found in worker.opened.packages.items():
                self.told[name if self.own.get(name, found) == found else f"{name} ({subject.system})"] = found
            yield worker


def run_bench(options: BenchOptions, output: Path, *, command: str, on_progress: Progress = quiet) -> Results:
    """Measure, and write the results.

    What was measured is written as it stands after every pair of rounds and when a part fails or is interrupted, so
    nothing is lost. Pictures for reports go into `<output's stem>.pictures` beside it; what was drawn for quality stays
    in `<output's stem>.drawn` until all of it is, so that the same command goes on there.

    Args:
        output: the results' file.
        command: that is noted in it.
        on_progress: is told what is done, how much of it, and how much there is.

    Raises:
        UsageError: an option does not fit the bundle.
        ArtifactError: the bundle is missing or damaged.
        OSError: the disk is full or the folder not writable.
    """
    bundle = open_bundle(options.bundle)
    model = _model(options, bundle)
    texts = load_prompts(options.prompts)
    opener = Opener(model, package_versions())
    judge = None if options.judge is None else load_judge(options.judge)
    lpips = None if options.lpips is None else load_lpips(options.lpips)
    facts = model_facts(options.bundle)
    plan = Plan(
        prompts=texts,
        seed=options.seed,
        warm_up=options.warm_up,
        min_runs=options.min_runs,
        max_runs=options.max_runs,
        confidence=options.confidence,
        seconds=options.seconds,
        isolate=options.isolate,
    )
    rows: tuple[Row, ...] = tuple(_unmeasured(case, bundle, model) for case in cases_of(options, bundle))
    most = max(row.case.subject.batch for row in rows)
    results = Results(
        command=command,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        latentrt=version("latentrt"),
        model=facts,
        machine=machine_facts(),
        packages={},
        prompts=texts[: max(most, options.quality)],
        seed=options.seed,
        confidence=options.confidence,
        interleaved=True,
        rows=rows,
    )

    def keep(**changed: Any) -> None:
        nonlocal results
        packages = {**opener.own, **opener.told}
        results = replace(results, packages=dict(sorted(packages.items())), **changed)
        save_results(output, results)

    before = processor_ticks()
    rows, interleaved = measure(
        rows,
        opener,
        plan,
        settings_of=_settings_of,
        on_progress=on_progress,
        on_rows=lambda found, together: keep(rows=found, interleaved=together),
    )
    keep(rows=rows, interleaved=interleaved, stolen=stolen_share(before, processor_ticks()))
    parts: Sequence[Callable[[Sequence[Row]], tuple[Row, ...]]] = (
        partial(
            with_cold_starts,
            open_worker=opener,
            plan=plan,
            count=options.cold,
            settings_of=_settings_of,
            on_progress=on_progress,
        ),
        partial(with_disk, bundle_path=options.bundle),
        partial(_with_roofline, options=options, prompts=texts, on_progress=on_progress),
    )
    for part in parts:
        keep(rows=part(results.rows))
    keep(overhead=_overhead(results.rows, opener, plan, on_progress))
    if options.quality:
        drawn = output.with_suffix(".drawn")
        quality = QualityPlan(
            prompts=Prompts(
                texts=texts[: options.quality],
                seed=options.seed,
                made_with={"files": facts["files"], "packages": results.packages},
            ),
            random_weights=results.random_weights,
            # Hours on a processor for a model that takes a GPU.
            backend="cuda" if results.on_gpu and why_no_cuda() is None else "onnxruntime",
            lpips=lpips,
            judge=judge,
        )
        rows, reference = with_quality(
            results.rows,
            model=model,
            plan=quality,
            open_worker=opener,
            settings_of=_settings_of,
            work_folder=drawn,
            pictures=output.with_suffix(".pictures"),
            on_progress=on_progress,
        )
        keep(rows=rows, reference=reference)
        shutil.rmtree(drawn, ignore_errors=True)
    return results


def _model(options: BenchOptions, bundle: Bundle) -> Model:
    """Where the systems find the model.

    Raises:
        UsageError: a file or folder that was given is not there.
    """
    given = {
        "checkpoint": options.checkpoint,
        "optimum-python": options.optimum_python,
        "optimum-model": options.optimum_model,
    }
    for name, path in given.items():
        if path is not None and not path.exists():
            raise UsageError(f"{name}: expected an existing file or folder, got {path}.")
    checkpoint = options.checkpoint or (checkpoint_of(bundle) if options.against else None)
    return Model(
        bundle=str(bundle.path.resolve()),
        checkpoint=None if checkpoint is None else str(checkpoint.resolve()),
        # Not resolved: an environment's interpreter is a link to one that does not know of it.
        optimum_python=None if options.optimum_python is None else str(options.optimum_python.absolute()),
        optimum_model=None if options.optimum_model is None else str(options.optimum_model.resolve()),
        threads=options.threads,
        options={"residency": options.residency, "loras": options.loras},
    )


def _unmeasured(case: Case, bundle: Bundle, model: Model) -> Row:
    """A case's row before it is measured, with the reason if that is known to be impossible."""
    subject = case.subject
    if subject.system == OURS:
        held = bundle.precisions()
        known = subject.precision in held
        reason = None if known else f"the bundle holds {', '.join(held)}, not {subject.precision}"
    else:
        reason = why_not(subject, model) or _why_no_settings(case.settings)
    return Row(case=case, skipped=reason)


def _why_no_settings(settings: Settings) -> str | None:
    """Why diffusers cannot draw so."""
    try:
        peer_settings(settings)
    except UsageError as err:
        return str(err)
    return None


def _settings_of(case: Case) -> Settings | Mapping[str, Any]:
    return case.settings if case.subject.system == OURS else peer_settings(case.settings)


def _with_roofline(
    rows: Sequence[Row], *, options: BenchOptions, prompts: Sequence[str], on_progress: Progress
) -> tuple[Row, ...]:
    machine = probe_machine()
    gpu = machine.gpus[0] if machine.gpus else None
    peaks = peak_finder(gpu, cpu_name(), threads=options.threads)
    return with_roofline(rows, options.bundle, peaks, on_progress, prompts=prompts)


def _overhead(rows: Sequence[Row], opener: Opener, plan: Plan, on_progress: Progress) -> Overhead | None:
    """What measuring costs the quickest row of latentrt, where it costs most; None if none was measured."""
    ours = [row for row in rows if row.runs and row.case.subject.system == OURS]
    if not ours:
        return None
    row = min(ours, key=lambda row: min(row.seconds))
    # A run of many seconds hides what a few readings of a clock cost, and an interval takes six pairs of them.
    if 12 * min(row.seconds) > plan.seconds:
        return None
    quickest = row.case
    with opener(quickest.subject) as worker:
        return measure_overhead(worker, quickest, plan, on_progress=on_progress)
