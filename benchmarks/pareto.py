"""Speed against its price: which rows no other row beats in both.

Times and qualities are samples, so a row is beaten only by one that is at least as good in both, and in one of them so
much better that the 95 % intervals do not meet. What is not shown to be worse stays on the front, and two rows that
cannot be told apart are both on it. The relation is not transitive: two differences, each beyond the intervals of its
pair, need not be beyond those of the outer two. The row that is named as beating another may so be beaten itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from latentrt.calibrate.picture_metrics import mean_interval

from .results_file import Quality, Row
from .timings import summarize

Price: TypeAlias = Literal["psnr", "finest_psnr", "accuracy"]
Interval: TypeAlias = tuple[float, float]
_Figure: TypeAlias = tuple[float, Interval | None]

# Of the standard normal distribution: 95 % lie within so many deviations.
_Z = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """A row.

    Attributes:
        row: its index among those given.
        seconds: median end to end, for each picture of a run.
        seconds_interval: of it, 95 %; None for too few runs, which show no difference in speed.
        quality: mean over the pictures; more is better.
        quality_interval: of it, 95 %; None for a single picture, which shows no difference in quality. A bootstrap over
            few pictures is narrower than it should be.
        beaten_by: the row that beats it, by its index; None on the front.
    """

    row: int
    seconds: float
    seconds_interval: Interval | None
    quality: float
    quality_interval: Interval | None
    beaten_by: int | None = None

    @property
    def on_front(self) -> bool:
        """Whether no other row of the group beats it."""
        return self.beaten_by is None


@dataclass(frozen=True)
class ParetoGroup:
    """Rows that may be held against each other.

    Attributes:
        title: what they share, for people.
        points: the fastest first.
    """

    title: str
    points: tuple[ParetoPoint, ...]

    @property
    def front(self) -> tuple[ParetoPoint, ...]:
        """The points that none beats, the fastest first."""
        return tuple(point for point in self.points if point.on_front)


@dataclass(frozen=True)
class ParetoTable:
    """Speed against one price.

    Attributes:
        price: the field of `Quality`.
        title: of the price, for people, with its unit.
        groups: those of two rows or more, in the order of their first rows.
    """

    price: Price
    title: str
    groups: tuple[ParetoGroup, ...]


PRICES: Mapping[Price, str] = {
    "psnr": "PSNR against fp32 of the same settings, dB",
    "finest_psnr": "PSNR against fp32 of many steps, dB",
    "accuracy": "prompt accuracy",
}


def pareto(rows: Sequence[Row], *, price: Price) -> ParetoTable:
    """Which rows are beaten in speed and a price, among those that have both.

    Sizes and batches are held apart: a picture of a batch is cheaper and comes later. So is what makes another picture
    by design: for `psnr` all settings, since each has a reference of its own; for `finest_psnr` scales of guidance.
    """
    groups: dict[Hashable, tuple[str, list[ParetoPoint]]] = {}
    for index, row in enumerate(rows):
        point = _point(index, row, price)
        if point is not None:
            key, title = _group(row, price)
            groups.setdefault(key, (title, []))[1].append(point)
    return ParetoTable(
        price=price,
        title=PRICES[price],
        groups=tuple(ParetoGroup(title, _judged(points)) for title, points in groups.values() if len(points) > 1),
    )


def beats(one: ParetoPoint, other: ParetoPoint) -> bool:
    """Whether one is at least as good in both, and in one of them better beyond the intervals."""
    if one.seconds > other.seconds or one.quality < other.quality:
        return False
    faster = _apart(one.seconds_interval, other.seconds_interval)
    return faster or _apart(other.quality_interval, one.quality_interval)


def share_interval(share: float, count: int) -> Interval:
    """The 95 % interval of a share of so many trials: Wilson 1927, which is sensible at 0 and 1 too."""
    spread = _Z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    reach = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def _apart(lower: Interval | None, upper: Interval | None) -> bool:
    """Whether one interval ends before the other begins."""
    return lower is not None and upper is not None and lower[1] < upper[0]


def _judged(points: Sequence[ParetoPoint]) -> tuple[ParetoPoint, ...]:
    better = {point.row: [other for other in points if beats(other, point)] for point in points}
    found = []
    for point in sorted(points, key=lambda point: (point.seconds, -point.quality, point.row)):
        # One of the front says most; of several the best.
        by = max(better[point.row], key=lambda other: (not better[other.row], other.quality), default=None)
        found.append(replace(point, beaten_by=None if by is None else by.row))
    return tuple(found)


def _point(index: int, row: Row, price: Price) -> ParetoPoint | None:
    measured = None if row.quality is None else _PRICE_OF[price](row.quality)
    if measured is None or not row.runs:
        return None
    quality, interval = measured
    times = summarize([seconds / row.case.subject.batch for seconds in row.seconds])
    return ParetoPoint(
        row=index, seconds=times.p50, seconds_interval=times.interval, quality=quality, quality_interval=interval
    )


def _group(row: Row, price: Price) -> tuple[Hashable, str]:
    subject, settings = row.case.subject, row.case.settings
    parts = [f"{subject.width}x{subject.height}", f"batch {subject.batch}"]
    shared: Hashable = None
    if price == "psnr":
        shared = settings
        parts.append(settings.label)
    elif price == "finest_psnr":
        shared = settings.guidance
        parts.append(f"guidance {settings.guidance:g}")
    return (subject.width, subject.height, subject.batch, shared), ", ".join(parts)


def _mean(values: Sequence[float]) -> _Figure | None:
    if not values:
        return None
    sample = np.array(values, np.float64)
    return float(sample.mean()), mean_interval(sample) if len(values) > 1 else None


def _accuracy(quality: Quality) -> _Figure | None:
    if quality.accuracy is None:
        return None
    return quality.accuracy, share_interval(quality.accuracy, quality.prompts)


_PRICE_OF: Mapping[Price, Callable[[Quality], _Figure | None]] = {
    "psnr": lambda quality: _mean(quality.psnr),
    "finest_psnr": lambda quality: _mean(quality.finest_psnr),
    "accuracy": _accuracy,
}
