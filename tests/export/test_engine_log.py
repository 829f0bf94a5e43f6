import threading
import time
from _thread import interrupt_main

import pytest

from latentrt.export.engine_cancel import Abandoned, run_cancellable
from latentrt.export.engine_log import PhaseStack


def test_nested_phases_add_up_and_never_go_back() -> None:
    stack = PhaseStack()
    seen = []
    stack.start("build", None, 2)
    for outer in range(2):
        stack.start("inner", "build", 4)
        for step in range(4):
            stack.step("inner", step)
            seen.append(stack.fraction())
        stack.finish("inner")
        stack.step("build", outer)
        seen.append(stack.fraction())
    assert seen == [0.125, 0.25, 0.375, 0.5, 0.5, 0.625, 0.75, 0.875, 1.0, 1.0]


def test_a_phase_that_never_ended_is_over_when_its_parent_starts_another() -> None:
    stack = PhaseStack()
    stack.start("build", None, 4)
    stack.start("lost", "build", 2)
    stack.start("next", "build", 2)
    assert [phase.name for phase in stack.phases] == ["build", "next"]
    stack.step("unknown", 3)
    stack.finish("unknown")
    assert stack.fraction() == 0.0


def test_work_in_the_thread_returns_or_raises_here() -> None:
    assert run_cancellable(lambda: 7, threading.Event()) == 7
    with pytest.raises(ZeroDivisionError):
        run_cancellable(lambda: 1 // 0, threading.Event())


def test_an_interrupt_stops_the_work_and_waits_for_its_end() -> None:
    cancelled, ended = threading.Event(), threading.Event()
    told: list[bool] = []

    def work() -> None:
        interrupt_main()
        told.append(cancelled.wait(10))
        time.sleep(0.3)
        ended.set()

    with pytest.raises(KeyboardInterrupt) as caught:
        run_cancellable(work, cancelled, lambda: None)
    assert not isinstance(caught.value, Abandoned)
    assert ended.is_set()
    assert told == [True]


def test_a_second_interrupt_does_not_wait() -> None:
    cancelled, release = threading.Event(), threading.Event()

    def work() -> None:
        interrupt_main()
        cancelled.wait(10)
        time.sleep(0.3)
        interrupt_main()
        release.wait(10)

    with pytest.raises(Abandoned):
        run_cancellable(work, cancelled)
    release.set()
