"""Bars are met, missed or not measured, never left out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from project_bars import Bar, bars_of, cold_start, faster, no_slower, overhead, samplers
from project_rows import made_results, made_row

from latentrt.benchmarks.cases import System
from latentrt.benchmarks.results_file import Overhead, save_results

# Six rounds, so that the interval of the median ratio is from the least to the largest.
OURS = (1.0, 1.1, 0.9, 1.05, 0.95, 1.0)


def beside(system: System, *ratios: float) -> Any:
    theirs = [time * ratio for time, ratio in zip(OURS, ratios, strict=True)]
    return made_results(made_row("latentrt", OURS), made_row(system, theirs))


@pytest.mark.parametrize(
    ("ratios", "met"),
    [
        ((1.31, 1.32, 1.33, 1.34, 1.35, 1.36), True),
        ((1.29, 1.5, 1.5, 1.5, 1.5, 1.5), False),  # the interval reaches below the bar
        ((1.2,) * 6, False),
    ],
)
def test_faster_asks_for_the_whole_interval(ratios: tuple[float, ...], met: bool) -> None:
    bar = faster(beside("diffusers", *ratios), "diffusers", "faster", "missing")
    assert bar.met is met
    assert f"({min(ratios):.2f} to {max(ratios):.2f})" in bar.found


@pytest.mark.parametrize(
    ("ratios", "met"),
    [
        ((0.97, 0.98, 0.99, 0.99, 1.0, 1.01), True),  # not told apart
        ((0.95, 0.96, 0.97, 0.97, 0.98, 0.99), False),
    ],
)
def test_no_slower_asks_whether_the_interval_reaches_one(ratios: tuple[float, ...], met: bool) -> None:
    assert no_slower(beside("optimum", *ratios), "optimum", "no slower", "missing").met is met


@pytest.mark.parametrize(("theirs", "met"), [((10.0, 11.0, 9.0), True), ((9.9, 9.8, 12.0), False)])
def test_cold_starts_are_compared_by_their_medians(theirs: tuple[float, ...], met: bool) -> None:
    results = made_results(made_row("latentrt", OURS, cold=(2.0, 1.9, 2.4)), made_row("diffusers", OURS, cold=theirs))
    assert cold_start(results, "missing").met is met


@pytest.mark.parametrize(
    ("interval", "met"),
    [((-0.02, 0.0099), True), ((0.01, 0.02), False), ((0.0099, 0.01), None), ((-0.5, 0.5), None), (None, None)],
)
def test_overhead_is_held_against_by_its_whole_interval(interval: tuple[float, float] | None, met: bool | None) -> None:
    found = Overhead(share=0.005, interval=interval, pairs=9)
    assert overhead(made_results(overhead=found), "overhead", "missing").met is met


@pytest.mark.parametrize(
    ("interval", "counted", "met"),
    [((-0.5, 0.5), 0.0002, True), ((-0.5, 0.5), 0.01, False), ((0.01, 0.5), 0.0002, False), (None, 0.0002, True)],
)
def test_overhead_by_count_stands_unless_runs_say_otherwise(
    interval: tuple[float, float] | None, counted: float, met: bool
) -> None:
    found = Overhead(share=0.0, interval=interval, pairs=9, counted=counted)
    assert overhead(made_results(overhead=found), "overhead", "missing").met is met


def test_overhead_may_be_unknown() -> None:
    assert overhead(made_results(), "overhead", "missing").met is None


def test_a_peer_that_was_skipped_is_not_measured_and_says_why() -> None:
    results = made_results(made_row("latentrt", OURS), made_row("optimum", (), skipped="not installed"))
    bar = no_slower(results, "optimum", "no slower", "missing")
    assert bar.met is None
    assert "not installed" in bar.line
    assert bar.line.startswith("not measured")


def test_samplers_below_their_bars_are_named(tmp_path: Path) -> None:
    file = tmp_path / "samplers-cpu.json"
    rows = [{"sampler": "Euler", "ratio": 2.5, "bar": 2.0}, {"sampler": "UniPC", "ratio": 3.9, "bar": 4.0}]
    file.write_text(json.dumps({"rows": rows}))
    bar = samplers(file)
    assert bar.met is False
    assert "UniPC 3.9 of 4" in bar.found
    assert "Euler" not in bar.found
    file.write_text(json.dumps({"rows": rows[:1]}))
    assert samplers(file).met is True


def test_every_bar_is_there_without_any_results(tmp_path: Path) -> None:
    bars = bars_of(tmp_path)
    assert [bar.met for bar in bars] == [None] * 8
    overhead = Overhead(share=0.0, interval=(-0.001, 0.001), pairs=9)
    save_results(
        tmp_path / "end-to-end-cpu.json", dataclasses.replace(beside("diffusers", *(2.0,) * 6), overhead=overhead)
    )
    found = bars_of(tmp_path)
    assert [bar.what for bar in found] == [bar.what for bar in bars]
    assert [bar.met for bar in found[:4]] == [True, None, None, True]


def test_a_missed_bar_stands_out() -> None:
    assert Bar("what", "found", False).line == "MISSED: what: found"
