"""What a benchmark's results come to, in sentences, and how they were made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean, median

from latentrt.calibrate.report_html import plain

from .cases import OURS
from .differences import Ratio
from .peer_ratios import Verdict, verdicts
from .report_cells import digits, measured_rows, ratio_text, split_shared, time_text
from .results_file import Results, Row
from .timings import summarize

# Share of the processors' time in the hands of others from which on readers are told.
_STOLEN = 0.02


def heading(results: Results) -> str:
    """The main result in a line: how fast latentrt is beside the first peer, or alone."""
    name = str(results.model.get("name", "benchmark"))
    found = _verdicts_by_task(results)
    if found:
        verdict, task = found[0]
        return ", ".join((f"{name}: {_versus(verdict)}", *task))
    rows = measured_rows(results)
    if not rows:
        return f"{name}: nothing was measured"
    fastest = min(rows, key=a_picture)
    return f"{name}: {row_name(fastest)} draws a picture in {time_text(a_picture(fastest))}"


def sentences(results: Results) -> list[str]:
    """What the results come to, one thing each."""
    return [*_against_peers(results), *_cold_starts(results), *_evidence(results)]


def making(results: Results) -> Mapping[str, str]:
    """How the results were made, besides the command."""
    order = "run by run, loaded at the same time" if results.interleaved else "by blocks, loaded anew"
    return {
        "date": results.date,
        "latentrt": results.latentrt,
        "rows took turns": order,
        "time that the host gave to others": "unknown" if results.stolen is None else f"{results.stolen:.1%}",
        "measuring took": str(results.overhead or "not measured"),
        "bound on the median's interval": f"{results.confidence:.1%}",
        "prompts": "; ".join(results.prompts) or "none",
        "seed": str(results.seed),
        "quality is against": results.reference or "nothing",
        **{f"model: {name}": plain(value) for name, value in results.model.items()},
        **{f"machine: {name}": plain(value) for name, value in results.machine.items()},
        "packages": plain(results.packages),
    }


def row_name(row: Row) -> str:
    """System and precision of a row."""
    return row.case.subject.parts[0]


def a_picture(row: Row) -> float:
    """Seconds for each picture of a row's median run."""
    return summarize(row.seconds).p50 / row.case.subject.batch


def _verdicts_by_task(results: Results) -> list[tuple[Verdict, tuple[str, ...]]]:
    """The verdicts, and what tells apart what they are about: the parts of a case's label that differ among them."""
    found = list(verdicts(results))
    tasks, _ = split_shared([each.ours.case.parts[2:] for each in found])
    return list(zip(found, tasks, strict=True))


def _against_peers(results: Results) -> Iterator[str]:
    for verdict, task in _verdicts_by_task(results):
        within = f"{', '.join(task)}: " if task else ""
        yield f"{within}{_versus(verdict)}{_interval(verdict.ratio)}{_price(verdict)}."


def _versus(verdict: Verdict) -> str:
    ours, peer = (row_name(row) for row in (verdict.ours, verdict.peer))
    value, interval = verdict.ratio.value, verdict.ratio.interval
    if interval is not None and interval[0] <= 1 <= interval[1]:
        return f"{ours} is neither faster nor slower than {peer}, as far as can be told"
    about = "about " if interval is None else ""
    return f"{ours} is {about}{ratio_text(value)} times as fast as {peer}"


def _interval(ratio: Ratio) -> str:
    if ratio.interval is None:
        return " (too few runs for an interval)"
    low, high = map(ratio_text, ratio.interval)
    return f" (95 % interval {low} to {high})"


def _price(verdict: Verdict) -> str:
    """What the faster row's pictures cost, where its precision is not the peer's."""
    quality = verdict.ours.quality
    if (
        quality is None
        or not quality.psnr
        or verdict.ours.case.subject.precision == verdict.peer.case.subject.precision
    ):
        return ""
    return f"; PSNR of its pictures {fmean(quality.psnr):.1f} dB"


def _cold_starts(results: Results) -> Iterator[str]:
    """The quickest cold start of latentrt and of every peer."""
    rows = [row for row in results.rows if row.cold]
    quickest: dict[str, Row] = {}
    for row in sorted(rows, key=_process):
        quickest.setdefault(row.case.subject.system, row)
    ours = quickest.pop(OURS, None)
    if ours is None:
        return
    own = _process(ours)
    peers = "".join(
        f", {row_name(peer)} {time_text(_process(peer))} ({digits(_process(peer) / own)} times as long)"
        for peer in quickest.values()
    )
    yield f"From the start of a process to its first picture {row_name(ours)} takes {time_text(own)}{peers}."


def _evidence(results: Results) -> Iterator[str]:
    rows = measured_rows(results)
    if results.stolen is not None and results.stolen >= _STOLEN:
        yield (
            f"The host of this virtual machine gave {results.stolen:.0%} of the processors' time to others during the "
            "runs: trust ratios more than times."
        )
    open_rows = [row for row in rows if not row.settled]
    if open_rows:
        yield (
            f"{len(open_rows)} of {len(rows)} rows did not settle: their medians are known less well than to "
            f"{results.confidence:.1%}."
        )
    skipped = sum(row.skipped is not None for row in results.rows)
    if skipped:
        yield f"{skipped} of {len(results.rows)} rows were not measured; the last table says why."


def _process(row: Row) -> float:
    return median(start.process for start in row.cold)
