"""How many times as fast rows are as those of peers that draw the same: only like is compared with like."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .cases import OURS, PEERS, System
from .differences import Ratio, paired_ratio, ratio_of_medians
from .report_cells import measured_rows
from .results_file import Results, Row
from .timings import summarize


@dataclass(frozen=True)
class Verdict:
    """The fastest row of latentrt beside the fastest of a peer, for pictures of one size, batch and settings.

    Attributes:
        ratio: how many times as fast ours is.
    """

    ours: Row
    peer: Row
    ratio: Ratio


def speed_up(results: Results, row: Row, base: Row) -> Ratio:
    """How many times as fast a row is as another.

    Rows that took turns are compared by round, so that what slowed both cancels; others by their medians.
    """
    compare = paired_ratio if results.interleaved else ratio_of_medians
    return compare(base.seconds, row.seconds)


def bases(results: Results) -> tuple[System, ...]:
    """The systems that rows are held against: the peers that were measured, or else latentrt itself."""
    measured = {row.case.subject.system for row in measured_rows(results)}
    return tuple(peer for peer in PEERS if peer in measured) or ((OURS,) if measured else ())


def base_row(results: Results, row: Row, system: System) -> Row | None:
    """What a row is held against: the fastest of a peer's rows that draw the same, of latentrt's own the first."""
    alike = [each for each in _alike(results, row) if each.case.subject.system == system]
    return next(iter(alike), None) if system == OURS else min(alike, key=_median, default=None)


def verdicts(results: Results) -> Iterator[Verdict]:
    """Of every peer and all that it was asked to draw: the fastest of ours, and the fastest in the peer's precision."""
    for system in bases(results):
        for first in _first_of_each_task(results):
            peer = base_row(results, first, system)
            own = [row for row in _alike(results, first) if row.case.subject.system == OURS]
            if system == OURS or peer is None or not own:
                continue
            same = [row for row in own if row.case.subject.precision == peer.case.subject.precision]
            fastest = {row.case: row for row in (min(rows, key=_median) for rows in (own, same) if rows)}
            for ours in fastest.values():
                yield Verdict(ours, peer, speed_up(results, ours, peer))


def _alike(results: Results, row: Row) -> list[Row]:
    return [each for each in measured_rows(results) if _task(each) == _task(row)]


def _first_of_each_task(results: Results) -> list[Row]:
    found: dict[tuple[object, ...], Row] = {}
    for row in measured_rows(results):
        found.setdefault(_task(row), row)
    return list(found.values())


def _task(row: Row) -> tuple[object, ...]:
    subject = row.case.subject
    return subject.width, subject.height, subject.batch, row.case.settings


def _median(row: Row) -> float:
    return summarize(row.seconds).p50
