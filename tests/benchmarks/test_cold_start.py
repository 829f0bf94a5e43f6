from dataclasses import replace

import pytest
from fake_workers import GIB, FakeMachine, row, subject

from latentrt.benchmarks.bench_plan import Plan
from latentrt.benchmarks.cold_start import with_cold_starts
from latentrt.benchmarks.results_file import ColdStart

A, B = subject("latentrt"), subject("diffusers", batch=2)
PLAN = Plan(prompts=("a", "b"), seed=3)


def test_starts_take_turns_and_the_first_of_each_is_dropped() -> None:
    machine = FakeMachine({A: lambda runs: 10.0 + runs, B: lambda runs: 20.0 + runs}, peaks={A: 3 * GIB})
    rows = [row(A), row(B), row(A, steps=30), row(subject("optimum"), skipped="not installed")]
    filled = with_cold_starts(rows, machine.open_worker, PLAN, 3)
    # Runs 0 and 1 are dropped, 2 to 7 go B A, A B, B A.
    assert machine.order() == [A, B, B, A, A, B, B, A]
    assert [start.first for start in filled[0].cold] == [13, 14, 17]
    assert [start.first for start in filled[1].cold] == [22, 25, 26]
    assert filled[0].cold[0] == ColdStart(process=2.25 + 13, imports=0.5, load=1.5, first=13, peak_rss=3 * GIB)
    assert list(filled[2:]) == rows[2:]  # a start is of a system, not of its settings
    assert machine.most == 1
    assert not any(entry[2] for entry in machine.log if entry[0] == "run")  # not slowed down by looking
    assert machine.asked[0][1:] == (("a",), 3)
    assert machine.asked[1][1:] == (("a", "b"), 3)


def test_what_fails_is_a_note() -> None:
    machine = FakeMachine({A: lambda _: 1.0, B: lambda _: 1.0}, fails={B: ("run", 0)})
    measured = replace(row(B), notes=("first",))
    one, other = with_cold_starts([row(A), measured], machine.open_worker, PLAN, 2)
    assert len(one.cold) == 2
    assert other == replace(measured, notes=("first", "cold start failed: diffusers: out of memory"))
    assert machine.log.count(("open", B)) == 1


@pytest.mark.parametrize("count", [0, 2])
def test_progress(count: int) -> None:
    said: list[tuple[str, int, int]] = []
    machine = FakeMachine({A: lambda _: 1.0})
    with_cold_starts([row(A)], machine.open_worker, PLAN, count, on_progress=lambda *each: said.append(each))
    assert said == [("cold start of latentrt fp32, cpu", done, 3) for done in range(3 if count else 0)]
