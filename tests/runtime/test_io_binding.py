"""Runs through bound buffers, really executed with ONNX Runtime's CPU provider, against plain runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from bound_graph import SPEC, expected, feeds_of, plain_session
from numpy.testing import assert_array_equal

from latentrt.runtime import io_binding
from latentrt.runtime.bound_inputs import freeze
from latentrt.runtime.errors import UsageError
from latentrt.runtime.input_checks import checked_input
from latentrt.runtime.io_binding import BoundRuns
from latentrt.runtime.specs import Array


class Watched:
    """ONNX Runtime's session, and what was asked of it: graph ids, threads, addresses of inputs and outputs."""

    def __init__(self, *, fails_recording: bool = False) -> None:
        self.session = plain_session()
        self.fails_recording = fails_recording
        self.graphs: list[int] = []
        self.released: list[int] = []
        self.threads: set[int] = set()
        self.outputs: list[tuple[int, ...]] = []

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        graph = int(options.get_run_config_entry("gpu_graph_id"))
        self.graphs.append(graph)
        self.threads.add(threading.get_ident())
        if self.fails_recording and graph != -1:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.session.run_with_iobinding(binding, options)
        self.outputs.append(tuple(value.data_ptr() for value in binding.get_outputs()))

    def release_captured_graph(self, graph: int) -> None:
        self.released.append(graph)


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def runs(watched: Watched) -> Iterator[BoundRuns]:
    bound = BoundRuns(watched, SPEC, device="cpu", without_graphs=Watched, buckets=3)
    yield bound
    bound.close()


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the inputs that are copied to their buffers."""
    names: list[str] = []

    def noted(component: str, tensor: Any, value: Array) -> Array:
        names.append(tensor.name)
        return checked_input(component, tensor, value)

    monkeypatch.setattr(io_binding, "checked_input", noted)
    return names


def assert_same(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert_array_equal(found[name], array)


def test_results_are_those_of_plain_runs_and_stay_what_they_are(runs: BoundRuns) -> None:
    """Shapes change from call to call; no result lies in a buffer that a later call writes."""
    sizes = [(2, 4), (1, 4), (2, 4), (2, 6), (2, 4), (1, 4)]
    calls = [feeds_of(seed, rows=rows, side=side) for seed, (rows, side) in enumerate(sizes)]
    found = [runs(feeds) for feeds in calls]
    plain = plain_session()
    for result, feeds in zip(found, calls, strict=True):
        assert_same(result, expected(plain, feeds))


def test_a_frozen_text_is_copied_once_for_each_bucket(runs: BoundRuns, copied: list[str]) -> None:
    guided, unguided = (freeze(feeds_of(0, rows=rows)["text"]) for rows in (2, 1))
    plain = plain_session()
    for seed in range(3):
        for text in (guided, unguided):
            feeds = {**feeds_of(seed, rows=len(text)), "text": text}
            assert_same(runs(feeds), expected(plain, feeds))
    assert copied.count("text") == 2
    assert copied.count("sample") == copied.count("timestep") == 6
    other = freeze(guided.copy())
    runs({**feeds_of(1), "text": other})
    runs({**feeds_of(1), "text": guided})
    assert copied.count("text") == 4


def test_what_can_still_change_is_copied_every_time(runs: BoundRuns) -> None:
    """Also behind a read-only view."""
    feeds = feeds_of(0)
    text = feeds["text"]
    view = text.view()
    view.flags.writeable = False
    for given in (text, view):
        before = runs({**feeds, "text": given})
        np.add(text, 1, out=text)
        after = runs({**feeds, "text": given})
        assert_same(after, expected(plain_session(), feeds))
        assert not np.array_equal(before["out_sample"], after["out_sample"])


def test_what_was_changed_before_it_was_frozen_is_copied(runs: BoundRuns) -> None:
    """And what was thawed."""
    feeds, plain = feeds_of(0), plain_session()
    runs(feeds)
    np.add(feeds["text"], 1, out=feeds["text"])
    freeze(feeds["text"])
    assert_same(runs(feeds), expected(plain, feeds))
    feeds["text"].flags.writeable = True
    np.add(feeds["text"], 1, out=feeds["text"])
    assert_same(runs(feeds), expected(plain, feeds))


def test_every_bucket_has_a_graph_and_fixed_addresses(runs: BoundRuns, watched: Watched) -> None:
    for rows in (2, 1, 2, 1, 2):
        runs(feeds_of(rows, rows=rows))
    # Nothing is recorded before the outputs have their place.
    assert watched.graphs == [-1, -1, 1, 2, 1]
    assert watched.outputs[0] == watched.outputs[2] == watched.outputs[4] != watched.outputs[1] == watched.outputs[3]
    runs(feeds_of(0, side=6))
    runs(feeds_of(0, side=8))
    assert watched.released == [2], "the bucket of one row was used before that of two"
    runs(feeds_of(0, rows=1))
    runs(feeds_of(0, rows=1))
    assert watched.graphs[-2:] == [-1, 5], "a number stands for one set of buffers, ever"


def test_it_warms_up_until_the_run_is_recorded(runs: BoundRuns, watched: Watched) -> None:
    shapes = {"sample": (2, 4, 4, 4), "timestep": (2,), "text": (2, 6, 3), "scale": ()}
    for feeds in runs.rehearsal(shapes):
        runs(feeds)
    runs(feeds_of(3))
    assert watched.graphs == [-1, 1, 1]
    with pytest.raises(UsageError, match=r"unet\.timestep: expected shape \('b',\), got \(2, 1\)"):
        runs.rehearsal({**shapes, "timestep": (2, 1)})


def test_where_recording_fails_it_goes_on_without() -> None:
    others: list[Watched] = []

    def reopened() -> Watched:
        others.append(Watched())
        return others[-1]

    runs = BoundRuns(Watched(fails_recording=True), SPEC, device="cpu", without_graphs=reopened)
    for seed in range(4):
        feeds = feeds_of(seed)
        assert_same(runs(feeds), expected(plain_session(), feeds))
    runs.close()
    assert runs.why_no_graph == "operation not permitted when stream is capturing"
    assert [other.graphs for other in others] == [[-1] * 3]


def test_threads_take_turns_on_one_thread(runs: BoundRuns, watched: Watched) -> None:
    calls = [feeds_of(seed, rows=1 + seed % 2, side=4 + 2 * (seed % 3)) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(runs, calls))
    plain = plain_session()
    for result, feeds in zip(found, calls, strict=True):
        assert_same(result, expected(plain, feeds))
    assert len(watched.threads) == 1


def test_after_a_failed_copy_everything_is_copied_again(
    runs: BoundRuns, copied: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = {**feeds_of(0), "text": freeze(feeds_of(0)["text"])}
    runs(feeds)
    with monkeypatch.context() as patch:
        patch.setattr(io_binding, "checked_input", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs(feeds)
    copied.clear()
    assert_same(runs(feeds), expected(plain_session(), feeds))
    assert sorted(copied) == sorted(feeds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, r"unet: expected inputs \['sample', 'scale', 'text', 'timestep'\], got"),
        ({"timestep": np.zeros((2, 2), np.float32)}, r"unet\.timestep: expected shape \('b',\), got \(2, 2\)"),
    ],
)
def test_inputs_that_do_not_fit_are_named(runs: BoundRuns, change: dict[str, Any], message: str) -> None:
    feeds = {name: value for name, value in {**feeds_of(0), **change}.items() if value is not None}
    with pytest.raises(UsageError, match=message):
        runs(feeds)
    good = feeds_of(0)
    assert_same(runs(good), expected(plain_session(), good))
