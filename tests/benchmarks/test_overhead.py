from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_workers import FakeMachine, FakeWorker, row, subject

from latentrt.benchmarks.bench_plan import Plan
from latentrt.benchmarks.overhead import measure_overhead
from latentrt.benchmarks.results_file import Overhead
from latentrt.benchmarks.workers import Drawn

OURS = subject()
PLAN = Plan(prompts=("a red circle",), warm_up=2, min_runs=10, seconds=1e6)


def measured(
    cost: float, seconds: Callable[[int], float] = lambda _: 1.0, plan: Plan = PLAN
) -> tuple[Overhead, FakeMachine]:
    machine = FakeMachine({OURS: seconds}, cost=cost)
    return measure_overhead(FakeWorker(machine, OURS), row(OURS).case, plan), machine


def test_a_known_cost_through_noise() -> None:
    rng = np.random.default_rng(0)
    overhead, machine = measured(0.01, lambda _: float(rng.lognormal(0, 0.005)))
    assert overhead.share == pytest.approx(0.01, abs=0.0025)
    assert overhead.found
    timed = [entry[2] for entry in machine.log]
    assert timed[:10] == [True, True, True, False, False, True, True, False, False, True]
    assert 10 <= overhead.pairs == (len(timed) - 2) / 2 < 200


def test_drift_is_no_cost() -> None:
    overhead, _ = measured(0.0, lambda runs: 100.0 + runs)
    # Each A B is as much too fast as each B A too slow.
    assert overhead.share == pytest.approx(0, abs=1e-4)
    assert not overhead.found


def test_no_cost_that_noise_could_be() -> None:
    rng = np.random.default_rng(1)
    overhead, _ = measured(0.001, lambda _: float(rng.lognormal(0, 0.1)))
    assert overhead.pairs == 200
    assert overhead.interval is not None
    assert overhead.interval[0] < 0 < overhead.interval[1]
    assert not overhead.found


def test_the_time_is_limited() -> None:
    overhead, machine = measured(0.5, plan=replace(PLAN, seconds=7.0))
    assert (overhead.share, overhead.interval, overhead.pairs) == (0.5, None, 4)  # two laps of 5 seconds
    assert not overhead.found  # so few pairs show nothing
    assert len(machine.log) == 2 + 8


def test_what_the_clock_tells_of_itself_is_a_share_of_its_run() -> None:
    machine = FakeMachine({OURS: lambda _: 2.0})

    class Telling(FakeWorker):
        def run(self, *given: Any, timed: bool = True) -> Drawn:
            drawn = super().run(*given, timed=timed)
            return replace(drawn, clock=0.001) if timed else drawn

    assert measure_overhead(Telling(machine, OURS), row(OURS).case, PLAN).counted == pytest.approx(0.0005)
    silent = measure_overhead(FakeWorker(machine, OURS), row(OURS).case, PLAN)
    assert silent.counted is None
