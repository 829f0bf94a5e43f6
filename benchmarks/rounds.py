"""Rows measured in rounds, so that what changes in a machine meanwhile reaches all of them alike.

Rows of one size and batch are what a reader compares. They are loaded at the same time and take turns run by run, each
round in the order opposite to the one before (A B C, C B A): a drift that is linear over these two adds the same to
each row. A row that is settled keeps its turn until all are: its neighbours would else run in other surroundings than
before, and without a partner in their rounds. Where the memory is too small for all of them, they take turns by
blocks: each is loaded anew, warmed up, run a few times and closed, there and back likewise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Protocol, TypeAlias

from latentrt.runtime.errors import LatentrtError

from .bench_plan import OpenWorker, Plan, Progress, SettingsOf, Worker, by_subject, own_settings, quiet
from .differences import drift
from .results_file import Memory, Row, Run
from .room import has_room
from .timings import is_settled, runs_needed, summarize
from .workers import Drawn

# Loads of each system, at least, where they take turns by blocks: there and back twice.
_BLOCKS = 4
# So often a row without a drift has a note of one.
_DRIFTED = 0.01
_SHARED = "its first run is not the first of its process, which other settings draw in too"

OnRows: TypeAlias = Callable[[tuple[Row, ...], bool], None]


class Room(Protocol):
    """As `room.has_room`."""

    def __call__(self, loaded: Sequence[Memory], *, another: bool) -> bool:
        """Whether there is room."""
        ...


def measure(
    rows: Sequence[Row],
    open_worker: OpenWorker,
    plan: Plan,
    *,
    settings_of: SettingsOf = own_settings,
    on_progress: Progress = quiet,
    on_rows: OnRows = lambda _rows, _interleaved: None,
    room: Room = has_room,
) -> tuple[tuple[Row, ...], bool]:
    """Time every row that is not skipped. One that fails is skipped with what went wrong, and the others go on.

    Args:
        rows: of a benchmark. Cases of one subject share its process.
        open_worker: opens a subject.
        plan: how.
        settings_of: a case's settings as its system takes them.
        on_progress: is told the row, its timed runs, and the most that it may get.
        on_rows: is given all rows as they stand after every pair of rounds, and whether all took turns run by run.
            Those without runs yet are skipped in them, so they are what there is to keep when the rest is interrupted.
        room: whether systems have room beside each other.

    Returns:
        The rows in their order, and whether rows of one size and batch took turns run by run everywhere.
    """
    table = _Table(rows, plan, settings_of, on_progress, on_rows)
    for group in _groups(rows):
        with ExitStack() as stack:
            workers = None if plan.isolate else _load_all(table, group, open_worker, stack, room)
            if workers is not None:
                _by_runs(table, workers)
        if workers is None:
            table.interleaved = False
            _by_blocks(table, group, open_worker)
    return tuple(_with_notes(row, plan) for row in table.rows), table.interleaved


class _Table:
    """The rows as they fill. Methods that ask a worker skip the rows that fail."""

    def __init__(
        self, rows: Sequence[Row], plan: Plan, settings_of: SettingsOf, on_progress: Progress, on_rows: OnRows
    ) -> None:
        self.rows, self.plan, self.interleaved = list(rows), plan, True
        self._settings_of, self._on_progress, self._on_rows = settings_of, on_progress, on_rows
        self._turns = itertools.count()

    @contextmanager
    def failing(self, part: Sequence[int]) -> Iterator[None]:
        """Skip the rows of a part with what goes wrong within."""
        try:
            yield
        except LatentrtError as err:
            for index in part:
                if self.rows[index].skipped is None:
                    self.rows[index] = Row(case=self.rows[index].case, skipped=str(err))

    def warm(self, part: Sequence[int], worker: Worker) -> None:
        """Draw each row of a system as often as the plan wants before the first, and note what it then says of itself.

        Only then: which engine holds a size, and whether one does, shows when it is drawn.
        """
        for place, index in enumerate(part):
            row = self.rows[index]
            if row.skipped is not None:
                continue
            shared = (_SHARED,) if place else ()
            with self.failing([index]):
                drawn = [self._draw(index, worker).seconds for _ in range(self.plan.warm_up)]
                said = worker.opened
                self.rows[index] = replace(
                    row,
                    backend=said.backend,
                    on_gpu=said.on_gpu,
                    precisions=said.precisions,
                    notes=tuple(dict.fromkeys((*row.notes, *said.notes, *shared))),
                    warm_up=(*row.warm_up, *drawn),
                )

    def time(self, index: int, worker: Worker) -> None:
        """Add a timed run to a row that has not failed."""
        row = self.rows[index]
        if row.skipped is None:
            with self.failing([index]):
                drawn = self._draw(index, worker)
                run = Run(
                    turn=next(self._turns),
                    seconds=drawn.seconds,
                    stages=drawn.stages,
                    calls=drawn.calls,
                    gpu_calls=drawn.gpu_calls,
                )
                self.rows[index] = replace(row, runs=(*row.runs, run))

    def weigh(self, part: Sequence[int], worker: Worker) -> Memory | None:
        """Note the memory of a process, the largest where a subject had several; None if it failed."""
        with self.failing(part):
            memory = worker.memory()
            for index in part:
                row = self.rows[index]
                if row.skipped is None and (row.memory is None or memory.peak_rss > row.memory.peak_rss):
                    self.rows[index] = replace(row, memory=memory)
            return memory
        return None

    def look(self) -> None:
        """See which rows are settled, and hand all out."""
        for index, row in enumerate(self.rows):
            if row.runs:
                enough = len(row.runs) >= self.plan.min_runs
                self.rows[index] = replace(row, settled=enough and is_settled(row.seconds, self.plan.confidence))
        unbegun = "not measured: the benchmark was interrupted before its first run"
        self._on_rows(
            tuple(row if row.runs or row.skipped else Row(case=row.case, skipped=unbegun) for row in self.rows),
            self.interleaved,
        )

    def goes_on(self, index: int) -> bool:
        """Whether a row may have further runs."""
        row = self.rows[index]
        few = len(row.runs) < max(self.plan.max_runs, self.plan.min_runs)
        return row.skipped is None and few and sum(row.seconds) < self.plan.seconds

    def _draw(self, index: int, worker: Worker) -> Drawn:
        case, plan = self.rows[index].case, self.plan
        self._on_progress(case.label, len(self.rows[index].runs), plan.max_runs)
        return worker.run(self._settings_of(case), plan.prompts_of(case.subject), plan.seed)


def _groups(rows: Sequence[Row]) -> list[list[int]]:
    """Indices of the rows that are to be measured, by size and batch."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for index, row in enumerate(rows):
        if row.skipped is None:
            subject = row.case.subject
            groups.setdefault((subject.width, subject.height, subject.batch), []).append(index)
    return list(groups.values())


def _load_all(
    table: _Table, group: Sequence[int], open_worker: OpenWorker, stack: ExitStack, room: Room
) -> dict[int, Worker] | None:
    """Load and warm up every subject of a group; None, with the rows as before, if there is no room for all."""
    before, asked = list(table.rows), table.plan.isolate is None
    workers: dict[int, Worker] = {}
    loaded: list[Memory] = []
    for subject, part in by_subject(table.rows, group).items():
        if asked and loaded and not room(loaded, another=True):
            table.rows[:] = before
            return None
        with table.failing(part):
            worker = stack.enter_context(open_worker(subject))
            table.warm(part, worker)
            memory = table.weigh(part, worker)
            loaded += [] if memory is None else [memory]
            workers.update(dict.fromkeys(part, worker))
    if asked and len(loaded) > 1 and not room(loaded, another=False):
        table.rows[:] = before
        return None
    return workers


def _by_runs(table: _Table, workers: Mapping[int, Worker]) -> None:
    """Take turns run by run."""
    _take_turns(table, [[index] for index in workers], lambda part: table.time(part[0], workers[part[0]]))
    for index, worker in workers.items():
        table.weigh([index], worker)


def _by_blocks(table: _Table, group: Sequence[int], open_worker: OpenWorker) -> None:
    """Take turns by blocks, each with a process of its own."""
    parts = by_subject(table.rows, group)
    runs = math.ceil(table.plan.min_runs / _BLOCKS)

    def block(part: Sequence[int]) -> None:
        going = [index for index in part if table.goes_on(index)]
        if not going:
            return
        with table.failing(going), open_worker(table.rows[going[0]].case.subject) as worker:
            table.warm(going, worker)
            for lap in range(runs):
                for index in going[:: (-1) ** lap]:
                    table.time(index, worker)
            table.weigh(going, worker)

    _take_turns(table, list(parts.values()), block)


def _take_turns(table: _Table, parts: Sequence[Sequence[int]], turn: Callable[[Sequence[int]], None]) -> None:
    """Give parts of a group their turns, there and back, until every row is settled or at its limits."""
    members = [index for part in parts for index in part]
    while any(table.goes_on(index) and not table.rows[index].settled for index in members):
        going = [part for part in parts if any(map(table.goes_on, part))]
        for part in (*going, *reversed(going)):
            turn(part)
        table.look()


def _with_notes(row: Row, plan: Plan) -> Row:
    """A measured row with what a reader has to know of its runs."""
    if not row.runs:
        return row
    notes = list(row.notes)
    if not row.settled:
        half, needed = summarize(row.seconds).half_width, runs_needed(row.seconds, plan.confidence)
        known = "unknown" if half is None else f"within {half:.1%}"
        more = "" if needed is None else f"; about {float(f'{needed:.2g}'):.0f} runs would settle it"
        notes.append(f"not settled: after {len(row.runs)} runs the median is {known}{more}")
    trend = drift([run.turn for run in row.runs], row.seconds)
    if trend is not None and trend.p < _DRIFTED:
        notes.append(f"its runs drifted by {trend.change:+.1%} from the first to the last (p {trend.p:.1g})")
    return replace(row, notes=tuple(notes))
