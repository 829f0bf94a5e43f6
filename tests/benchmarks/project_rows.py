"""Results of the project's benchmarks that nobody ran, with times that a test can reckon with by hand."""

from __future__ import annotations

from collections.abc import Sequence

from latentrt.benchmarks.cases import Case, Settings, Subject, System
from latentrt.benchmarks.results_file import ColdStart, Memory, Overhead, Results, Row, Run, Vram

MIB = 2**20


def made_row(
    system: System,
    seconds: Sequence[float],
    *,
    precision: str = "fp32",
    width: int = 128,
    batch: int = 1,
    steps: int = 20,
    cold: Sequence[float] = (),
    loaded: int = 100 * MIB,
    skipped: str | None = None,
) -> Row:
    """A row with these times end to end, and of its cold starts."""
    backend = "onnxruntime" if system == "latentrt" else "cpu"
    subject = Subject(system=system, precision=precision, backend=backend, width=width, height=width, batch=batch)
    settings = Settings(sampler="DPM++ 2M", schedule="karras", steps=steps, guidance=5.0)
    return Row(
        case=Case(subject=subject, settings=settings),
        skipped=skipped,
        runs=tuple(Run(turn=turn, seconds=time, stages={}, calls=()) for turn, time in enumerate(seconds)),
        cold=tuple(
            ColdStart(process=time, imports=time / 4, load=time / 4, first=time / 2, peak_rss=2 * loaded)
            for time in cold
        ),
        memory=None if skipped else Memory(rss_loaded=loaded, peak_rss=3 * loaded, vram=Vram()),
    )


def made_results(*rows: Row, overhead: Overhead | None = None, random_weights: bool = False) -> Results:
    """A benchmark of these rows."""
    return Results(
        command="latentrt bench shapes.bundle",
        date="2026-11-23T15:00:00+00:00",
        latentrt="0.1.0",
        model={"name": "shapes", "random_weights": random_weights},
        machine={"cpu": "Example CPU", "cores": 2},
        packages={},
        prompts=("a red circle",),
        seed=0,
        confidence=0.02,
        interleaved=True,
        overhead=overhead,
        rows=rows,
    )
