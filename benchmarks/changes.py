"""Figures of a row before and after, as costs of which less is better, and whether they are worse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Literal, TypeAlias

from .differences import changed, changed_by_pair, holm, paired_ratio, ratio_of_medians
from .results_file import Quality, Row
from .timings import SIGNIFICANT, summarize

Verdict: TypeAlias = Literal["better", "worse", "same", "unclear"]
Kind: TypeAlias = Literal["time", "size", "quality"]

# Errors below these are none: what rounding to 8 bits does, and the last digit of an SSIM or LPIPS that is shown.
_ROUNDING = 1 / 12 / 255**2
_LAST_DIGIT = 1e-4
# Of each metric of pictures: its name for people, and the error that a value of it stands for.
_ERRORS: dict[str, tuple[str, Callable[[float], float]]] = {
    "psnr": ("PSNR", lambda decibels: max(10 ** (-decibels / 10), _ROUNDING)),
    "ssim": ("SSIM", lambda share: max(1 - share, _LAST_DIGIT)),
    "lpips": ("LPIPS", lambda distance: max(distance, _LAST_DIGIT)),
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """A figure of a row, before and after.

    Attributes:
        what: for people.
        kind: seconds; bytes; or what `what` names, dB for PSNR.
        before: the median of times, the mean over pictures.
        ratio: of the costs, after by before: above 1 is worse. Of a PSNR they are powers of the error, of an SSIM what
            it lacks of 1, of an accuracy the pictures that fail.
        interval: of the ratio at 95 %, where there are samples enough for one.
        p: that chance alone makes such a difference, corrected for the number of rows; None for what is one number.
        judged: whether it counts, or is shown alone.
        verdict: None for what does not count.
    """

    what: str
    kind: Kind
    before: float
    after: float
    ratio: float
    interval: tuple[float, float] | None = None
    p: float | None = None
    judged: bool = True
    verdict: Verdict | None = None


def time_changes(before: Row, after: Row) -> Iterator[Change]:
    """Of two rows with timed runs: medians, 90th percentiles where there are, cold starts where there are."""
    yield _times("median", before.seconds, after.seconds)
    old, new = summarize(before.seconds).p90, summarize(after.seconds).p90
    if old is not None and new is not None:
        # The median's test is the one that has the runs for it.
        yield Change(what="p90", kind="time", before=old, after=new, ratio=new / old, judged=False)
    if before.cold and after.cold:
        yield _times("cold start", *([start.process for start in row.cold] for row in (before, after)))


def size_changes(before: Row, after: Row) -> Iterator[Change]:
    """Of memory and disk, as far as both rows have them."""
    one, other = before.memory, after.memory
    if one is not None and other is not None:
        yield _size("peak memory", one.peak_rss, other.peak_rss)
        old, new = one.vram, other.vram
        # What the whole GPU held is no figure of one process.
        if old.peak and new.peak and old.peak_of == new.peak_of:
            yield _size("peak VRAM", old.peak, new.peak)
    if before.disk is not None and after.disk is not None:
        old_bytes, new_bytes = (disk.graphs + disk.engines for disk in (before.disk, after.disk))
        if old_bytes and new_bytes:
            yield replace(_size("graphs and engines", old_bytes, new_bytes), judged=False)


def price_changes(before: Quality, after: Quality) -> Iterator[Change]:
    """Of the quality of the same pictures, as far as both have it."""
    for name, (title, error) in _ERRORS.items():
        old, new = getattr(before, name), getattr(after, name)
        if old and len(old) == len(new):
            costs = [[error(value) for value in values] for values in (new, old)]
            ratio = paired_ratio(*costs)
            yield Change(
                what=title,
                kind="quality",
                before=fmean(old),
                after=fmean(new),
                ratio=ratio.value,
                interval=ratio.interval,
                p=changed_by_pair(*costs),
            )
    if before.accuracy is not None and after.accuracy is not None:
        yield _accuracy((before.accuracy, before.prompts), (after.accuracy, after.prompts))


def with_verdicts(rows: Sequence[Sequence[Change]], threshold: float) -> list[list[Change]]:
    """Judge the figures of rows; the same figure of all rows is one family of tests, corrected by Holm's method."""
    places = [(row, place) for row, changes in enumerate(rows) for place in range(len(changes))]
    found = [list(changes) for changes in rows]
    for what in {change.what for changes in rows for change in changes}:
        tests = {at: p for at in places if (change := rows[at[0]][at[1]]).what == what and (p := change.p) is not None}
        for (row, place), p in zip(tests, holm(list(tests.values())), strict=True):
            found[row][place] = replace(found[row][place], p=p)
    return [[replace(each, verdict=_verdict(each, threshold)) for each in changes] for changes in found]


def _verdict(change: Change, threshold: float) -> Verdict | None:
    if not change.judged:
        return None
    low, high = change.interval or (change.ratio, change.ratio)
    most = 1 + threshold
    if change.p is None or change.p < SIGNIFICANT:
        if low > most:
            return "worse"
        if high < 1 / most:
            return "better"
    known = change.interval is not None or change.p is None or change.ratio == 1
    return "same" if known and 1 / most <= low and high <= most else "unclear"


def _times(what: str, before: Sequence[float], after: Sequence[float]) -> Change:
    ratio = ratio_of_medians(after, before)
    return Change(
        what=what,
        kind="time",
        before=median(before),
        after=median(after),
        ratio=ratio.value,
        interval=ratio.interval,
        p=changed(after, before),
    )


def _size(what: str, before: int, after: int) -> Change:
    return Change(what=what, kind="size", before=before, after=after, ratio=after / before)


def _accuracy(before: tuple[float, int], after: tuple[float, int]) -> Change:
    """By Fisher's exact test of the counts. Half a picture is added to each, so that none that fails is no zero."""
    from scipy.stats import fisher_exact

    counts = [(round(share * prompts), prompts) for share, prompts in (before, after)]
    failed = [(prompts - shown + 0.5) / (prompts + 1) for shown, prompts in counts]
    return Change(
        what="accuracy",
        kind="quality",
        before=before[0],
        after=after[0],
        ratio=failed[1] / failed[0],
        p=float(fisher_exact([[shown, prompts - shown] for shown, prompts in counts]).pvalue),
    )
