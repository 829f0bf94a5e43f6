from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from latentrt.runtime.errors import UsageError
from latentrt.runtime.run_gate import RunGate

SOON = 5.0


def test_a_swap_waits_for_runs_and_holds_back_others() -> None:
    gate, order = RunGate(), list[str]()
    begun, end, swapped = threading.Event(), threading.Event(), threading.Event()

    def run() -> None:
        with gate.run():
            begun.set()
            assert end.wait(SOON)
            order.append("run")

    def swap() -> None:
        with gate.alone():
            order.append("swap")
            assert not swapped.wait(0.05)
            order.append("swapped")

    def late() -> None:
        with gate.run():
            order.append("late")

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(run)
        assert begun.wait(SOON)
        second = pool.submit(swap)
        while not gate._waiting:
            pass
        third = pool.submit(late)
        assert not third.done()
        end.set()
        for future in (first, second, third):
            future.result(SOON)
    assert order == ["run", "swap", "swapped", "late"]


def test_runs_go_side_by_side_and_swaps_do_not() -> None:
    gate, both = RunGate(), threading.Barrier(2, timeout=SOON)

    def run() -> None:
        with gate.run():
            both.wait()

    inside, most = 0, 0

    def swap() -> None:
        nonlocal inside, most
        with gate.alone():
            inside += 1
            most = max(most, inside)
            threading.Event().wait(0.02)
            inside -= 1

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(run) for _ in range(2)] + [pool.submit(swap) for _ in range(3)]:
            future.result(SOON)
    assert most == 1


def test_a_thread_does_not_wait_for_itself() -> None:
    gate = RunGate()

    def swap() -> None:
        with gate.alone():
            pass

    with ThreadPoolExecutor(1) as pool:
        with gate.run():
            with pytest.raises(UsageError, match="run under way in this thread"):
                swap()
            # A run within a run goes on while a swap of another thread waits for both.
            swapped = pool.submit(swap)
            while not gate._waiting:
                pass
            with gate.run():
                assert not swapped.done()
        swapped.result(SOON)


def test_a_run_that_fails_or_ends_elsewhere_is_over() -> None:
    gate = RunGate()
    with pytest.raises(ValueError, match="run"), gate.run():
        raise ValueError("run")
    run = gate.run()
    run.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run.__exit__, None, None, None).result(SOON)
    with gate.alone():
        pass
