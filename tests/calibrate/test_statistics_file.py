from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from latentrt.calibrate.histogram import histogram_of
from latentrt.calibrate.reservoir import reservoir_of
from latentrt.calibrate.statistics import InputStatistics, Statistics, merged
from latentrt.calibrate.statistics_file import load_statistics, save_statistics
from latentrt.runtime.errors import ArtifactError


def some_input(seed: int) -> InputStatistics:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((50, 3)).astype(np.float32)
    return InputStatistics(
        amax=np.abs(values).max(0),
        sums=values.sum(0, dtype=np.float64),
        count=50,
        histogram=histogram_of(torch.from_numpy(values)),
        reservoir=reservoir_of(
            np.square(values).max(1).astype(np.float64),
            1 - rng.random(50),
            lambda chosen: values[chosen].astype(np.float16),
            capacity=8,
        ),
    )


def some_statistics(seed: int = 0) -> Statistics:
    inputs = {
        "unet.a.weight": {0: some_input(seed), 5: some_input(seed + 1)},
        "unet.b.weight": {5: some_input(seed + 2)},
    }
    return Statistics(inputs, bins=8, steps=1000, rows=12, capacity=64, seed=7)


def assert_same(one: Statistics, other: Statistics) -> None:
    assert (one.bins, one.steps, one.rows, one.capacity, one.seed) == (
        other.bins,
        other.steps,
        other.rows,
        other.capacity,
        other.seed,
    )
    assert {name: list(bins) for name, bins in one.inputs.items()} == {
        name: list(bins) for name, bins in other.inputs.items()
    }
    for name, bins in one.inputs.items():
        for index, own in bins.items():
            read = other.inputs[name][index]
            assert (own.count, own.histogram.least, own.histogram.largest) == (
                read.count,
                read.histogram.least,
                read.histogram.largest,
            )
            assert own.reservoir.capacity == read.reservoir.capacity
            for mine, theirs in (
                (own.amax, read.amax),
                (own.sums, read.sums),
                (own.histogram.counts, read.histogram.counts),
                (own.reservoir.priorities, read.reservoir.priorities),
                (own.reservoir.importance, read.reservoir.importance),
                (own.reservoir.rows, read.reservoir.rows),
            ):
                assert mine.dtype == theirs.dtype
                np.testing.assert_array_equal(mine, theirs)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    save_statistics(some_statistics(), path)
    assert_same(load_statistics(path), some_statistics())
    # It goes on from there.
    both = merged(load_statistics(path), some_statistics(10))
    assert_same(both, merged(some_statistics(), some_statistics(10)))
    save_statistics(both, path)
    assert_same(load_statistics(path), both)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["statistics.json", "statistics.safetensors"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def without_a_number(path: Path) -> None:
    content = json.loads(path.with_suffix(".json").read_text())
    del content["inputs"]["unet.a.weight"]["5"]["least"]
    path.with_suffix(".json").write_text(json.dumps(content))


def of_others(path: Path) -> None:
    save_statistics(some_statistics(3), path.with_name("other.safetensors"))
    path.with_name("other.json").replace(path.with_suffix(".json"))


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        cut,
        Path.unlink,
        without_a_number,
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: path.with_suffix(".json").write_text("[]"),
        lambda path: path.with_suffix(".json").write_text('{"file": '),
        of_others,
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = tmp_path / "statistics.safetensors"
    save_statistics(some_statistics(), path)
    damage(path)
    with pytest.raises(ArtifactError, match=r"statistics\.safetensors: expected (statistics|a readable file)"):
        load_statistics(path)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "statistics.safetensors"
    save_statistics(some_statistics(), path)

    def full(_: object, scratch: Path) -> None:
        Path(scratch).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_statistics(some_statistics(3), path)
    assert_same(load_statistics(path), some_statistics())
    assert sorted(each.name for each in tmp_path.iterdir()) == ["statistics.json", "statistics.safetensors"]
