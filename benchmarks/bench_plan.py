"""How rows are measured, and what is asked of the processes that they are measured in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from .cases import Case, Settings, Subject
from .results_file import Memory, Row
from .workers import Drawn, Opened


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How rows are measured.

    Attributes:
        prompts: cycled to as many as a run has pictures.
        seed: of the first picture of each run.
        warm_up: runs of each row before the timed ones, 1 or more.
        min_runs: timed, of each row. They come in pairs, there and back: odd numbers are rounded up.
        max_runs: likewise, and more if min_runs is.
        confidence: half width of the median's 95 % interval, as a share of the median, at which a row is settled.
        seconds: that the timed runs of a row may take. A row whose time is up leaves after a pair of rounds, however
            few its runs are.
        isolate: whether systems are loaded one at a time; None where the memory is too small for all.
    """

    prompts: tuple[str, ...]
    seed: int = 0
    warm_up: int = 2
    min_runs: int = 8
    max_runs: int = 40
    confidence: float = 0.02
    seconds: float = 60.0
    isolate: bool | None = None

    def prompts_of(self, subject: Subject) -> tuple[str, ...]:
        """One prompt for each picture of a run."""
        return tuple(itertools.islice(itertools.cycle(self.prompts), subject.batch))


class Worker(Protocol):
    """The parts of `workers.Worker` that measure, and are documented there. All may raise LatentrtError."""

    @property
    def opened(self) -> Opened: ...  # noqa: D102

    @property
    def seconds_since_start(self) -> float: ...  # noqa: D102

    def run(  # noqa: D102
        self, settings: Settings | Mapping[str, Any], prompts: Sequence[str], seed: int, *, timed: bool = True
    ) -> Drawn: ...

    def memory(self) -> Memory: ...  # noqa: D102


# A process with a subject open, for as long as the block runs; raises LatentrtError if it cannot be opened.
OpenWorker: TypeAlias = Callable[[Subject], AbstractContextManager[Worker]]
# A case's settings as its system takes them; raises LatentrtError if it has no such thing.
SettingsOf: TypeAlias = Callable[[Case], Settings | Mapping[str, Any]]
# What is being done, how much of it is done, and how much there is at most.
Progress: TypeAlias = Callable[[str, int, int], None]


def by_subject(rows: Sequence[Row], indices: Sequence[int]) -> dict[Subject, list[int]]:
    """Indices of rows, those of one subject together."""
    parts: dict[Subject, list[int]] = {}
    for index in indices:
        parts.setdefault(rows[index].case.subject, []).append(index)
    return parts


def own_settings(case: Case) -> Settings:
    """The settings as they stand, which is how latentrt takes them."""
    return case.settings


def quiet(_what: str, _done: int, _total: int) -> None:
    """No progress."""
