"""How far a builder is, and how it is told to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Progress = Callable[[str, float], None]
"""Called with the phase's name and the part of the build that is done, 0 to 1."""


@dataclass
class Phase:
    """A phase under way: its name, number of steps, steps done."""

    name: str
    steps: int
    done: int = 0


@dataclass
class PhaseStack:
    """The nested phases of a build, and how much of the whole they amount to."""

    phases: list[Phase] = field(default_factory=list)

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins inside another; phases of the parent that did not report their end are over."""
        names = [phase.name for phase in self.phases]
        keep = names.index(parent) + 1 if parent in names else 0
        self.phases = [*self.phases[:keep], Phase(name, max(steps, 1))]

    def step(self, name: str, step: int) -> None:
        """Step `step` (from 0) of a phase is complete."""
        for phase in self.phases:
            if phase.name == name:
                phase.done = min(step + 1, phase.steps)

    def finish(self, name: str) -> None:
        """A phase is complete."""
        names = [phase.name for phase in self.phases]
        if name in names:
            self.phases = self.phases[: names.index(name)]

    def fraction(self) -> float:
        """Part of the whole that is done, 0 to 1: a phase counts as one step of its parent."""
        inner = 0.0
        for phase in reversed(self.phases):
            inner = min((phase.done + inner) / phase.steps, 1.0)
        return inner


def make_monitor(trt: Any, progress: Progress, cancelled: threading.Event) -> Any:
    """An IProgressMonitor that reports to `progress` and stops the build once `cancelled` is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stack = PhaseStack()
            self.part = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.stack.start(phase_name, parent_phase, num_steps)
            self.report(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.stack.step(phase_name, step)
            self.report(phase_name)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self.stack.finish(phase_name)
            self.report(phase_name, done=not self.stack.phases)

        def report(self, phase_name: str, *, done: bool = False) -> None:
            # The builder repeats phases of one name inside a step, which a stack of counts cannot tell from going back.
            self.part = 1.0 if done else max(self.part, self.stack.fraction())
            progress(phase_name, self.part)

    return Monitor()
