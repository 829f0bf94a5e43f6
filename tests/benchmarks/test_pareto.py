from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from latentrt.benchmarks.cases import Case, Settings, Subject, System
from latentrt.benchmarks.pareto import ParetoGroup, ParetoPoint, beats, pareto, share_interval
from latentrt.benchmarks.results_file import Quality, Row, Run

SETTINGS = Settings(sampler="Euler", schedule=None, steps=20, guidance=5.0)


def row(
    seconds: float,
    quality: Quality | None,
    *,
    drawn: Settings = SETTINGS,
    system: System = "latentrt",
    width: int = 64,
    batch: int = 1,
    runs: int = 9,
) -> Row:
    """With runs from 1 % below to 1 % above so many seconds."""
    subject = Subject(system=system, precision="fp32", backend="auto", width=width, height=64, batch=batch)
    times = seconds * np.linspace(0.99, 1.01, runs)
    return Row(
        case=Case(subject=subject, settings=drawn),
        runs=tuple(Run(turn=turn, seconds=float(time), stages={}, calls=()) for turn, time in enumerate(times)),
        quality=quality,
    )


def near(psnr: float) -> Quality:
    """Pictures within half a decibel of it."""
    return Quality(prompts=5, psnr=tuple((psnr + np.linspace(-0.5, 0.5, 5)).tolist()))


def only(rows: list[Row]) -> ParetoGroup:
    (group,) = pareto(rows, price="psnr").groups
    return group


def point(seconds: float, quality: float, *, wide: float = 0.0, deep: float = 0.0, index: int = 0) -> ParetoPoint:
    return ParetoPoint(
        row=index,
        seconds=seconds,
        seconds_interval=(seconds - wide, seconds + wide),
        quality=quality,
        quality_interval=(quality - deep, quality + deep),
    )


def test_a_row_is_beaten_by_a_faster_one_of_the_same_quality() -> None:
    group = only([row(2.0, near(40)), row(1.0, near(40)), row(0.5, near(30)), row(3.0, near(50)), row(0.6, near(29))])
    assert [(each.row, each.beaten_by) for each in group.points] == [(2, None), (4, 2), (1, None), (0, 1), (3, None)]
    assert [each.row for each in group.front] == [2, 1, 3]
    assert [each.seconds for each in group.front] == pytest.approx([0.5, 1.0, 3.0])
    assert [each.quality for each in group.front] == pytest.approx([30, 40, 50])


def test_rows_that_cannot_be_told_apart_are_both_on_the_front() -> None:
    group = only([row(1.0, near(40)), row(1.005, near(39.9)), row(1.0, near(40))])
    assert len(group.front) == 3


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (point(1, 40), point(2, 40), True),
        (point(1, 40), point(1, 30), True),
        (point(1, 40), point(1, 40), False),
        (point(2, 40), point(1, 30), False),
        (point(1, 30), point(2, 40), False),
        (point(1, 40, wide=0.4), point(2, 40, wide=0.4), True),
        (point(1, 40, wide=0.6), point(2, 40, wide=0.6), False),
        (point(1, 40, wide=0.6, deep=4), point(2, 30, wide=0.6, deep=4), True),
        (point(1, 40, wide=0.6, deep=6), point(2, 30, wide=0.6, deep=6), False),
        (point(1, 40, wide=0.5), point(2, 40, wide=0.5), False),
        (replace(point(1, 40), seconds_interval=None), point(2, 40), False),
        (point(1, 40), replace(point(2, 30), quality_interval=None), True),
        (point(1, 40, wide=1), replace(point(2, 30, wide=1), quality_interval=None), False),
    ],
)
def test_better_means_beyond_the_intervals(one: ParetoPoint, other: ParetoPoint, expected: bool) -> None:
    assert beats(one, other) is expected


COARSE = st.integers(1, 6)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.builds(
            lambda seconds, quality, spread, runs: row(
                seconds, Quality(prompts=3, psnr=(quality - spread, quality, quality + spread)), runs=runs
            ),
            COARSE.map(lambda number: 1 + number / 100),
            COARSE.map(lambda number: 30 + number),
            st.sampled_from([0.0, 0.4, 1.5]),
            st.sampled_from([1, 7]),
        ),
        min_size=2,
        max_size=12,
    )
)
def test_the_front_is_not_beaten_and_all_else_is(rows: list[Row]) -> None:
    group = only(rows)
    points = {each.row: each for each in group.points}
    assert sorted(points) == list(range(len(rows)))
    assert [each.seconds for each in group.points] == sorted(each.seconds for each in group.points)
    assert group.front
    for one in group.front:
        assert not any(beats(other, one) for other in group.points)
    for each in group.points:
        if each.beaten_by is not None:
            by = points[each.beaten_by]
            assert beats(by, each)
            assert by.on_front or not any(beats(other, each) for other in group.front)


@settings(deadline=None, max_examples=30)
@given(numbers=st.permutations(range(1, 8)))
def test_without_spread_it_is_the_front_of_the_books(numbers: list[int]) -> None:
    points = [(second, numbers[second - 1]) for second in range(1, 8)]
    rows = [row(second, Quality(prompts=2, psnr=(float(quality),) * 2)) for second, quality in points]
    best = 0
    wanted: list[int] = []
    for index, (_, quality) in enumerate(points):
        if quality > best:
            best, wanted = quality, [*wanted, index]
    assert [each.row for each in only(rows).front] == wanted


def test_sizes_batches_and_settings_are_held_apart() -> None:
    other = replace(SETTINGS, steps=10)
    rows = [
        row(2.0, near(40)),
        row(1.0, near(60), drawn=other),
        row(3.0, near(30)),
        row(0.5, near(50), drawn=other),
        row(0.1, near(90), width=32),
        row(0.1, near(90), batch=2),
    ]
    first, second = pareto(rows, price="psnr").groups
    assert (first.title, second.title) == (
        "64x64, batch 1, Euler, 20 steps, guidance 5",
        "64x64, batch 1, Euler, 10 steps, guidance 5",
    )
    assert [each.row for each in first.points] == [0, 2]
    assert [each.row for each in second.points] == [3, 1]


def test_settings_compete_for_the_finest_pictures_of_one_guidance() -> None:
    quality = Quality(prompts=2, psnr=(9.0, 9.0), finest_psnr=(30.0, 32.0))
    partly = replace(SETTINGS, guidance_interval=(0.0, 0.5))
    rows = [
        row(2.0, quality),
        row(1.0, quality, drawn=replace(SETTINGS, steps=10)),
        row(0.9, quality, drawn=partly, system="diffusers"),
        row(0.1, quality, drawn=replace(SETTINGS, guidance=1.0)),
        row(0.1, replace(quality, finest_psnr=())),
    ]
    (group,) = pareto(rows, price="finest_psnr").groups
    assert group.title == "64x64, batch 1, guidance 5"
    assert [(each.row, each.quality, each.beaten_by) for each in group.points] == [
        (2, 31, None),
        (1, 31, 2),
        (0, 31, 2),
    ]


def test_all_settings_of_a_size_compete_in_accuracy() -> None:
    rows = [
        row(1.0, Quality(prompts=400, accuracy=0.5), drawn=replace(SETTINGS, guidance=1.0)),
        row(2.0, Quality(prompts=400, accuracy=0.9)),
        row(2.0, Quality(prompts=400, accuracy=0.6)),
        row(2.0, Quality(prompts=400)),
    ]
    table = pareto(rows, price="accuracy")
    (group,) = table.groups
    assert (table.title, group.title) == ("prompt accuracy", "64x64, batch 1")
    assert [(each.row, each.beaten_by) for each in group.points] == [(0, None), (1, None), (2, 1)]


def test_times_are_of_a_picture() -> None:
    group = only([row(2.0, near(40), batch=4), row(4.0, near(40), batch=4)])
    assert [each.seconds for each in group.points] == pytest.approx([0.5, 1.0])


def test_rows_without_figures_take_no_part() -> None:
    rows = [row(1.0, None), row(1.0, Quality(prompts=2)), row(1.0, near(40), runs=0), row(1.0, near(40))]
    assert pareto(rows, price="psnr").groups == ()


def test_few_runs_and_single_pictures_show_no_difference() -> None:
    group = only([row(1.0, near(40), runs=3), row(2.0, near(40))])
    assert group.points[0].seconds_interval is None
    assert len(group.front) == 2
    group = only([row(1.0, Quality(prompts=1, psnr=(40.0,))), row(1.0, near(30))])
    assert group.points[0].quality_interval is None
    assert len(group.front) == 2


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (3, 8), (97, 100), (1, 1)])
def test_shares_have_wilson_s_interval(hits: int, count: int) -> None:
    wanted = stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert share_interval(hits / count, count) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
