from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.benchmarks.stage_clock import StageClock, seconds_per_entry


class Time:
    """A clock that is put forward by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def clock(time: Time) -> StageClock:
    return StageClock(time)


def test_a_run_is_divided_among_its_stages(clock: StageClock, time: Time) -> None:
    time.passes(1)
    clock.time("tokenize", lambda: time.passes(2))
    clock.time("text_encoder", lambda: time.passes(4))
    time.passes(8)
    for seconds in (16, 32):
        clock.time("unet", partial(time.passes, seconds))
        time.passes(64)
        clock.step_done()
    time.passes(128)
    clock.time("vae_decoder", lambda: time.passes(256))
    clock.time("vae_decoder", lambda: time.passes(512))
    clock.time("encode", lambda: time.passes(1024))
    assert clock.stages() == {
        "tokenize": 2,
        "text_encoder": 4,
        "unet": 16 + 32,
        "sampler": 64 + 64,
        "vae_decoder": 256 + 512,
        "encode": 1024,
    }
    assert clock.calls("unet") == (16, 32)
    assert clock.calls("vae_decoder") == (256, 512)


def test_what_else_is_timed_between_steps_is_not_the_samplers(clock: StageClock, time: Time) -> None:
    clock.time("unet", lambda: time.passes(1))
    clock.time("text_encoder", lambda: time.passes(2))
    time.passes(4)
    clock.step_done()
    assert clock.stages()["sampler"] == 4


def test_a_call_gives_its_result_and_is_counted_when_it_fails(clock: StageClock, time: Time) -> None:
    def fails() -> None:
        time.passes(3)
        raise ValueError

    assert clock.time("encode", lambda: "bytes") == "bytes"
    with pytest.raises(ValueError):  # noqa: PT011 # nothing else raises it
        clock.time("unet", fails)
    assert clock.calls("unet") == (3,)


@pytest.mark.parametrize("stage", ["unet", "encode"])
def test_without_steps_or_calls_there_is_no_sampler(clock: StageClock, time: Time, stage: str) -> None:
    clock.time(stage, lambda: time.passes(1))
    if stage == "encode":
        clock.step_done()
    assert clock.stages() == {stage: 1}


def test_another_run_begins_with_nothing(clock: StageClock, time: Time) -> None:
    clock.time("unet", lambda: time.passes(1))
    clock.step_done()
    clock.restart()
    assert clock.stages() == {}
    clock.time("unet", lambda: time.passes(2))
    assert (clock.stages(), clock.calls("unet")) == ({"unet": 2}, (2,))


@given(st.lists(st.tuples(st.sampled_from(["unet", "encode"]), st.integers(0, 99), st.integers(0, 99)), min_size=1))
def test_stages_and_the_time_between_them_are_the_whole(parts: list[tuple[str, int, int]]) -> None:
    time = Time()
    clock = StageClock(time)
    clock.time("unet", lambda: None)
    for stage, inside, after in parts:
        clock.time(stage, partial(time.passes, inside))
        time.passes(after)
    clock.step_done()
    assert sum(clock.stages().values()) == time.now - 100
    assert clock.stages()["sampler"] == sum(after for _, _, after in parts)


def test_entries_are_calls_and_steps_of_one_run(clock: StageClock) -> None:
    for _ in range(3):
        clock.time("unet", lambda: None)
        clock.step_done()
    clock.time("vae_decoder", lambda: None)
    assert clock.entries == 3 + 3 + 1
    clock.restart()
    assert clock.entries == 0


def test_telling_the_clock_takes_about_a_microsecond() -> None:
    assert 1e-8 < seconds_per_entry() < 1e-4
