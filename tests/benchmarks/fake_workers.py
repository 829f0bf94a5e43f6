"""Systems that take the time they are told to, and no process: what they did is in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from latentrt.benchmarks.cases import Case, Settings, Subject, System
from latentrt.benchmarks.results_file import Memory, Row, Vram
from latentrt.benchmarks.workers import Drawn, Opened
from latentrt.runtime.errors import BackendError

GIB = 1 << 30
# The seconds of a run, from the number of runs that the machine did before it.
Seconds = Callable[[int], float]


def subject(system: System = "latentrt", *, precision: str = "fp32", batch: int = 1) -> Subject:
    return Subject(system=system, precision=precision, backend="cpu", width=64, height=64, batch=batch)


def row(of: Subject, *, steps: int = 20, skipped: str | None = None) -> Row:
    settings = Settings(sampler="Euler", schedule=None, steps=steps, guidance=5.0)
    return Row(case=Case(subject=of, settings=settings), skipped=skipped)


@dataclass
class FakeMachine:
    """A machine whose `open_worker` is what the parts of a benchmark take.

    Attributes:
        seconds: of each subject's runs.
        fails: what fails of a subject: `open` or `memory`, or `run` after so many runs of the process.
        peaks: of each subject, in bytes, with half of them when loaded.
        growth: of the peaks with every run of the machine.
        cost: of a timed run beyond an untimed one, as a share.
        log: what happened, in order: (what, subject), for `run` with whether it was timed.
        asked: settings, prompts and seed of each run.
        most: open at the same time.
    """

    seconds: Mapping[Subject, Seconds]
    fails: Mapping[Subject, tuple[str, int]] = field(default_factory=dict)
    peaks: Mapping[Subject, int] = field(default_factory=dict)
    growth: int = 0
    cost: float = 0.0
    log: list[tuple[Any, ...]] = field(default_factory=list)
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    runs: int = 0
    opened: int = 0
    most: int = 0

    @contextmanager
    def open_worker(self, of: Subject) -> Iterator[FakeWorker]:
        self.log.append(("open", of))
        if self.fails.get(of, ("", 0))[0] == "open":
            raise BackendError(f"{of.system}: cannot be loaded")
        self.opened += 1
        self.most = max(self.most, self.opened)
        try:
            yield FakeWorker(self, of)
        finally:
            self.opened -= 1
            self.log.append(("close", of))

    def order(self) -> list[Subject]:
        """Whose runs there were, in turn."""
        return [entry[1] for entry in self.log if entry[0] == "run"]


@dataclass
class FakeWorker:
    machine: FakeMachine
    of: Subject
    done: int = 0
    spent: float = 0.0

    @property
    def opened(self) -> Opened:
        return Opened(
            imports=0.5,
            load=1.5,
            backend=f"{self.of.system} CPU",
            on_gpu=False,
            precisions={"all": self.of.precision},
            notes=("said by the system",),
            packages={},
            rss=self.machine.peaks.get(self.of, GIB) // 2,
        )

    @property
    def seconds_since_start(self) -> float:
        return 0.25 + 0.5 + 1.5 + self.spent

    def run(
        self, settings: Settings | Mapping[str, Any], prompts: Sequence[str], seed: int, *, timed: bool = True
    ) -> Drawn:
        what, allowed = self.machine.fails.get(self.of, ("", 0))
        if what == "run" and self.done >= allowed:
            raise BackendError(f"{self.of.system}: out of memory")
        self.machine.asked.append((settings, tuple(prompts), seed))
        self.machine.log.append(("run", self.of, timed))
        seconds = self.machine.seconds[self.of](self.machine.runs) * (1 + self.machine.cost * timed)
        self.machine.runs += 1
        self.done += 1
        self.spent += seconds
        return Drawn(
            seconds=seconds,
            stages={"unet": seconds} if timed else {},
            calls=(seconds,) if timed else (),
            gpu_calls=None,
            peak_rss=self.machine.peaks.get(self.of, GIB),
        )

    def memory(self) -> Memory:
        if self.machine.fails.get(self.of, ("", 0))[0] == "memory":
            raise BackendError(f"{self.of.system}: gone")
        peak = self.machine.peaks.get(self.of, GIB)
        grown = peak + self.machine.growth * self.machine.runs
        return Memory(rss_loaded=peak // 2, peak_rss=grown, vram=Vram(reason="not run on a GPU"))
