from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_workers import GIB, FakeMachine, FakeWorker, row, subject

from latentrt.benchmarks.bench_plan import Plan
from latentrt.benchmarks.cases import Case, Subject
from latentrt.benchmarks.results_file import Memory, Row, Run
from latentrt.benchmarks.rounds import measure
from latentrt.benchmarks.workers import Opened
from latentrt.runtime.errors import UsageError

A, B, C = subject("latentrt"), subject("diffusers"), subject("optimum")
PLAN = Plan(prompts=("a red circle",), warm_up=2, min_runs=8, max_runs=20, seconds=1e6, isolate=False)


def changed(**options: Any) -> Plan:
    return replace(PLAN, **options)


def constant(seconds: float) -> Callable[[int], float]:
    return lambda _runs: seconds


def noisy(seed: int, scale: float = 0.3) -> Callable[[int], float]:
    rng = np.random.default_rng(seed)
    return lambda _runs: float(rng.lognormal(0, scale))


def steady(*subjects: Subject) -> FakeMachine:
    return FakeMachine({each: constant(1.0) for each in subjects})


def turns(measured: Row) -> list[int]:
    return [run.turn for run in measured.runs]


def test_turns_go_there_and_back() -> None:
    machine = steady(A, B, C)
    rows, interleaved = measure([row(A), row(B), row(C)], machine.open_worker, PLAN)
    assert interleaved
    assert machine.order() == [A, A, B, B, C, C, *[A, B, C, C, B, A] * 4]
    assert [turns(each)[:4] for each in rows] == [[0, 5, 6, 11], [1, 4, 7, 10], [2, 3, 8, 9]]
    assert sorted(turn for each in rows for turn in turns(each)) == list(range(24))
    assert machine.most == 3
    assert machine.opened == 0


def test_a_system_is_asked_what_runs_it_after_it_has_drawn() -> None:
    """No engine may hold the size, which shows when it is drawn."""

    class Falling(FakeWorker):
        @property
        def opened(self) -> Opened:
            return replace(super().opened, backend="the fallback" if self.done else "an engine")

    machine = steady(A)

    @contextmanager
    def open_worker(of: Subject) -> Iterator[FakeWorker]:
        yield Falling(machine, of)

    rows, _ = measure([row(A)], open_worker, PLAN)
    assert rows[0].backend == "the fallback"


def test_a_linear_drift_cancels() -> None:
    def warming(runs: int) -> float:
        return 1.0 + 0.01 * runs

    rows, _ = measure([row(A), row(B)], FakeMachine({A: warming, B: warming}).open_worker, PLAN)
    means = [np.mean(each.seconds) for each in rows]
    assert means[0] == pytest.approx(means[1], abs=1e-12)
    # In the same order again and again, each B would come a run after its A.
    drawn = sorted((run for each in rows for run in each.runs), key=lambda run: run.turn)
    naive = [np.mean([run.seconds for run in drawn[start::2]]) for start in (0, 1)]
    assert naive[1] - naive[0] == pytest.approx(0.01)
    assert all("drifted by" in each.notes[-1] for each in rows)


def test_a_row_holds_what_was_measured() -> None:
    machine = FakeMachine({A: lambda runs: 1.0 + runs})
    (measured,), _ = measure([row(A)], machine.open_worker, changed(max_runs=8))
    assert measured.warm_up == (1, 2)  # no timed ones
    assert measured.seconds == (3, 4, 5, 6, 7, 8, 9, 10)
    assert measured.runs[0] == Run(turn=0, seconds=3, stages={"unet": 3}, calls=(3,), gpu_calls=None)
    assert (measured.backend, measured.on_gpu, measured.precisions) == ("latentrt CPU", False, {"all": "fp32"})
    assert measured.memory is not None
    assert (measured.memory.rss_loaded, measured.memory.peak_rss) == (GIB // 2, GIB)
    assert measured.notes[0] == "said by the system"
    # Eight runs: the interval is the range, 3.5 on both sides of 6.5.
    assert not measured.settled
    assert measured.notes[1].startswith("not settled: after 8 runs the median is within 53.8%; about ")


def test_a_settled_row_keeps_its_turn() -> None:
    machine = FakeMachine({A: constant(1.0), B: noisy(0)})
    (one, other), _ = measure([row(A), row(B)], machine.open_worker, PLAN)
    assert (one.settled, other.settled) == (True, False)
    assert len(one.runs) == len(other.runs) == 20
    assert not any("settled" in note for note in one.notes)


@pytest.mark.parametrize(("least", "runs"), [(8, 8), (9, 10), (30, 30)])
def test_enough_runs_are_enough(least: int, runs: int) -> None:
    (measured,), _ = measure([row(A)], steady(A).open_worker, changed(min_runs=least))
    assert measured.settled
    assert len(measured.runs) == runs


def test_more_runs_until_settled() -> None:
    (measured,), _ = measure([row(A)], FakeMachine({A: noisy(1, 0.02)}).open_worker, changed(max_runs=400))
    assert measured.settled
    assert 8 < len(measured.runs) < 60


def test_a_row_whose_time_is_up_leaves() -> None:
    machine = FakeMachine({A: constant(1.0), B: constant(100.0)})
    (one, other), _ = measure([row(A), row(B)], machine.open_worker, changed(seconds=150.0))
    assert (len(one.runs), len(other.runs)) == (8, 2)
    assert (one.settled, other.settled) == (True, False)
    assert other.notes[-1] == "not settled: after 2 runs the median is unknown"


@pytest.mark.parametrize(("what", "message"), [(("open", 0), "cannot be loaded"), (("run", 1), "out of memory")])
def test_what_fails_is_skipped_and_the_others_go_on(what: tuple[str, int], message: str) -> None:
    machine = FakeMachine({A: constant(1.0), B: constant(1.0)}, fails={B: what})
    rows, interleaved = measure([row(A), row(B), row(B, steps=30)], machine.open_worker, PLAN)
    assert interleaved
    assert len(rows[0].runs) == 8
    for failed in rows[1:]:
        assert failed == Row(case=failed.case, skipped=f"diffusers: {message}")


def test_a_run_that_fails_later_ends_its_row_alone() -> None:
    machine = FakeMachine({A: constant(1.0), B: constant(1.0)}, fails={B: ("run", 5)})
    rows, _ = measure([row(A), row(B)], machine.open_worker, PLAN)
    assert (len(rows[0].runs), rows[0].settled, rows[1].skipped) == (8, True, "diffusers: out of memory")
    assert rows[1].runs == ()


def test_settings_that_a_system_lacks_skip_the_row() -> None:
    def settings_of(case: Case) -> dict[str, int]:
        if case == row(B, steps=30).case:
            raise UsageError("no such sampler")
        return {"steps": 20}

    machine = steady(A, B)
    rows, _ = measure([row(B), row(B, steps=30)], machine.open_worker, PLAN, settings_of=settings_of)
    assert [each.skipped for each in rows] == [None, "no such sampler"]
    assert {str(asked[0]) for asked in machine.asked} == {"{'steps': 20}"}


def test_skipped_rows_pass_through() -> None:
    machine = steady(A)
    skipped = row(B, skipped="not installed")
    rows, _ = measure([skipped, row(A)], machine.open_worker, PLAN)
    assert rows[0] is skipped
    assert ("open", B) not in machine.log


def test_rows_of_a_subject_share_its_process() -> None:
    machine = steady(A, B)
    rows, _ = measure([row(A), row(B), row(A, steps=30)], machine.open_worker, PLAN)
    assert [entry[1] for entry in machine.log if entry[0] == "open"] == [A, B]
    assert [len(each.runs) for each in rows] == [8, 8, 8]
    assert [any("first of its process" in note for note in each.notes) for each in rows] == [False, False, True]


def test_sizes_and_batches_come_one_after_the_other() -> None:
    four, other = subject("latentrt", batch=4), subject("diffusers", batch=4)
    machine = steady(A, B, four, other)
    plan = changed(prompts=("a", "b", "c"), seed=7)
    rows, interleaved = measure([row(A), row(four), row(B), row(other)], machine.open_worker, plan)
    assert interleaved
    assert machine.most == 2
    assert [turn for each in (rows[0], rows[2]) for turn in turns(each) if turn >= 16] == []
    assert machine.asked[0][1:] == (("a",), 7)
    assert machine.asked[-1][1:] == (("a", "b", "c", "a"), 7)


def test_by_blocks_one_is_loaded_at_a_time() -> None:
    machine = steady(A, B)
    rows, interleaved = measure([row(A), row(B), row(A, steps=30)], machine.open_worker, changed(isolate=True))
    assert not interleaved
    assert machine.most == 1
    assert [entry[1] for entry in machine.log if entry[0] == "open"] == [A, B, B, A, A, B, B, A]
    assert [len(each.runs) for each in rows] == [8, 8, 8]
    assert [len(each.warm_up) for each in rows] == [8, 8, 8]  # two in each of four blocks
    # Within a block its rows take turns there and back, too.
    assert (turns(rows[0])[:2], turns(rows[2])[:2]) == ([0, 3], [1, 2])
    assert all(each.settled for each in rows)


def test_by_blocks_until_settled_or_out_of_runs() -> None:
    machine = FakeMachine({A: constant(1.0), B: noisy(2)})
    rows, _ = measure([row(A), row(B)], machine.open_worker, changed(isolate=True))
    assert [len(each.runs) for each in rows] == [20, 20]
    failing = FakeMachine({A: constant(1.0), B: constant(1.0)}, fails={B: ("open", 0)})
    rows, _ = measure([row(A), row(B)], failing.open_worker, changed(isolate=True))
    assert (len(rows[0].runs), rows[1].skipped) == (8, "diffusers: cannot be loaded")


@pytest.mark.parametrize(("growth", "runs"), [(1000, 16), (-1000, 4)])
def test_memory_by_blocks_is_the_largest(growth: int, runs: int) -> None:
    machine = FakeMachine({A: constant(1.0)}, growth=growth)
    (measured,), _ = measure([row(A)], machine.open_worker, changed(isolate=True))
    assert measured.memory is not None
    assert measured.memory.peak_rss == GIB + growth * runs  # four blocks of two and two


class Rooms:
    """Room for so many systems beside each other."""

    def __init__(self, most: int) -> None:
        self.most, self.asked = most, list[tuple[int, bool]]()

    def __call__(self, loaded: Sequence[Memory], *, another: bool) -> bool:
        self.asked.append((len(loaded), another))
        return len(loaded) + another <= self.most


def test_without_room_by_blocks() -> None:
    machine, room = steady(A, B, C), Rooms(2)
    plan = changed(isolate=None)
    rows, interleaved = measure([row(A), row(B), row(C)], machine.open_worker, plan, room=room)
    assert not interleaved
    assert room.asked == [(1, True), (2, True)]
    # A and B were loaded to find out; nothing of it is kept.
    assert [entry[1] for entry in machine.log if entry[0] == "open"] == [A, B, A, B, C, C, B, A, A, B, C, C, B, A]
    assert [len(each.warm_up) for each in rows] == [8, 8, 8]
    assert machine.most == 2


def test_with_room_together() -> None:
    room = Rooms(3)
    _, interleaved = measure([row(A), row(B), row(C)], steady(A, B, C).open_worker, changed(isolate=None), room=room)
    assert interleaved
    assert room.asked == [(1, True), (2, True), (3, False)]
    told = Rooms(0)
    assert measure([row(A), row(B)], steady(A, B).open_worker, PLAN, room=told)[1]  # it was asked for
    assert told.asked == []


def test_what_was_measured_outlives_an_interruption() -> None:
    four = subject("latentrt", batch=4)

    def interrupted(_runs: int) -> float:
        raise KeyboardInterrupt

    machine = FakeMachine({A: constant(1.0), four: interrupted})
    handed: list[tuple[Row, ...]] = []

    def keep(rows: tuple[Row, ...], interleaved: bool) -> None:
        assert interleaved
        handed.append(rows)

    with pytest.raises(KeyboardInterrupt):
        measure([row(A), row(four)], machine.open_worker, PLAN, on_rows=keep)
    assert [len(rows[0].runs) for rows in handed] == [2, 4, 6, 8]
    assert handed[-1][0].settled
    assert "interrupted" in (handed[-1][1].skipped or "")
    assert machine.opened == 0


def test_progress_names_the_row() -> None:
    said: list[tuple[str, int, int]] = []
    measure([row(A)], steady(A).open_worker, PLAN, on_progress=lambda *each: said.append(each))
    assert said == [(row(A).case.label, done, 20) for done in (0, 0, *range(8))]
