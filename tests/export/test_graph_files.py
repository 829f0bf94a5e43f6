"""Graphs on disk: weights streamed beside them, and shared between graphs of one network."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.testing import assert_array_equal
from small_graphs import model_of, outputs_of

from latentrt.export import graph_files
from latentrt.export.graph_files import external_tensors, files_of, save_onnx, save_sharing, weight_bytes
from latentrt.export.lazy_weight import lazy_tensor
from latentrt.export.weights import Values, Weight
from latentrt.runtime.errors import ArtifactError

RNG = np.random.default_rng(0)
CHAIN = """
    chain (float[b,30] x) => (float[b,30] out) {
        first = MatMul(x, one)
        second = MatMul(first, two)
        shifted = Add(second, small)
        out = MatMul(shifted, three)
    }
"""
# 3600 bytes are no multiple of a cache line, and 120 are few enough to stay in the graph.
WEIGHTS: dict[str, Values] = {
    **{name: RNG.standard_normal((30, 30), np.float32) / 5 for name in ("one", "two", "three")},
    "small": RNG.standard_normal(30, np.float32),
}
FEEDS = {"x": RNG.standard_normal((2, 30), np.float32)}


@pytest.fixture
def external(monkeypatch: pytest.MonkeyPatch) -> None:
    """All graphs are large."""
    monkeypatch.setattr(graph_files, "EXTERNAL_DATA_BYTES", 1000)


def stored(path: Path) -> dict[str, Values]:
    """The weights of a graph as onnx reads them."""
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def assert_stored(path: Path, weights: dict[str, Values]) -> None:
    found = stored(path)
    assert found.keys() == weights.keys()
    for name, values in weights.items():
        assert found[name].dtype == values.dtype
        assert_array_equal(found[name], values)


def test_weights_up_to_the_bound_stay_in_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(CHAIN, WEIGHTS)
    monkeypatch.setattr(graph_files, "EXTERNAL_DATA_BYTES", weight_bytes(model))
    path = tmp_path / "new" / "model.onnx"
    assert save_onnx(model, path) == (path,)
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    assert files_of(path) == [path]
    assert_stored(path, WEIGHTS)
    monkeypatch.setattr(graph_files, "EXTERNAL_DATA_BYTES", weight_bytes(model) - 1)
    assert len(save_onnx(model, path)) == 2


@pytest.mark.usefixtures("external")
def test_streamed_weights_are_those_that_onnx_ir_writes(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.onnx", tmp_path / "theirs.onnx"
    model = model_of(CHAIN, WEIGHTS)
    assert save_onnx(model, ours) == (ours, tmp_path / "ours.onnx_data")
    ir.save(model_of(CHAIN, WEIGHTS), theirs, external_data="theirs.onnx_data", size_threshold_bytes=1024)
    assert_stored(ours, WEIGHTS)
    assert_stored(theirs, WEIGHTS)
    onnx.checker.check_model(str(ours), full_check=True)
    found, wanted = ir.load(ours), ir.load(theirs)
    assert [str(node) for node in found.graph] == [str(node) for node in wanted.graph]
    assert (
        {t.name for t in external_tensors(found)}
        == {t.name for t in external_tensors(wanted)}
        == WEIGHTS.keys() - {"small"}
    )
    assert_array_equal(outputs_of(ours, FEEDS)["out"], outputs_of(theirs, FEEDS)["out"])
    # The model goes on with what was written.
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        assert isinstance(value.const_value, ir.ExternalTensor) == (name != "small")
        assert_array_equal(value.const_value.numpy(), WEIGHTS[name])


@pytest.mark.usefixtures("external")
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT64, ir.DataType.INT8])
def test_weights_of_any_type_are_streamed(dtype: ir.DataType, tmp_path: Path) -> None:
    values = np.arange(-600, 600).astype(dtype.numpy()).reshape(3, 400)
    model = model_of("g (float[a] x) => (float[a] out) { out = Neg(x) }")
    weight = ir.Value(name="w", const_value=lazy_tensor(Weight(values.shape, values.dtype, lambda: values), "w"))
    model.graph.register_initializer(weight)
    save_onnx(model, tmp_path / "model.onnx")
    read = ir.load(tmp_path / "model.onnx").graph.initializers["w"].const_value
    assert read is not None
    assert read.dtype == dtype
    assert_array_equal(read.numpy(), values)


@pytest.mark.usefixtures("external")
def test_streamed_weights_are_aligned_and_in_the_graphs_order(tmp_path: Path) -> None:
    path, data = save_onnx(model_of(CHAIN, WEIGHTS), tmp_path / "model.onnx")
    tensors = list(external_tensors(ir.load(path)))
    assert [tensor.name for tensor in tensors] == ["one", "two", "three"]
    assert [tensor.offset for tensor in tensors] == [0, 3648, 7296]
    assert all((tensor.offset or 0) % 64 == 0 for tensor in tensors)
    assert [tensor.length for tensor in tensors] == [3600] * 3
    assert data.stat().st_size == 7296 + 3600
    content = data.read_bytes()
    assert content[3600:3648] == bytes(48)
    assert content[3648:7248] == WEIGHTS["two"].tobytes()


class Watched:
    """Lazy weights that know how often they were read, and how many are in memory at once."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.live = self.most = 0

    def model(self) -> ir.Model:
        model = model_of(CHAIN, WEIGHTS)
        for name, values in WEIGHTS.items():
            weight = Weight(values.shape, values.dtype, lambda name=name: self._read(name))  # type: ignore[misc]
            model.graph.initializers[name].const_value = lazy_tensor(weight, name)
        return model

    def _read(self, name: str) -> Values:
        values = WEIGHTS[name].copy()
        self.reads.append(name)
        self.live += 1
        self.most = max(self.most, self.live)
        weakref.finalize(values, self._gone)
        return values

    def _gone(self) -> None:
        self.live -= 1


@pytest.mark.parametrize(("large", "most"), [(False, 1), (True, 1), (True, 2)])
def test_each_weight_is_read_once_and_a_few_at_a_time(
    large: bool, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_files, "_AHEAD", most)
    if large:
        monkeypatch.setattr(graph_files, "EXTERNAL_DATA_BYTES", 1000)
    watched = Watched()
    model = watched.model()
    assert weight_bytes(model) == sum(values.nbytes for values in WEIGHTS.values())
    assert watched.reads == []
    save_onnx(model, tmp_path / "model.onnx")
    assert sorted(watched.reads) == sorted(WEIGHTS)
    assert watched.most <= most
    assert watched.live == 0


def test_a_weight_is_read_while_the_one_before_it_is(
    external: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_files, "_AHEAD", 2)
    together = threading.Barrier(2, timeout=20)

    def read(name: str) -> Values:
        if name != "three":
            together.wait()
        return WEIGHTS[name]

    model = model_of(CHAIN, WEIGHTS)
    for name in ("one", "two", "three"):
        weight = Weight(WEIGHTS[name].shape, WEIGHTS[name].dtype, lambda name=name: read(name))  # type: ignore[misc]
        model.graph.initializers[name].const_value = lazy_tensor(weight, name)
    assert_stored(save_onnx(model, tmp_path / "model.onnx")[0], WEIGHTS)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("broken", ["two", "small"])
def test_an_error_of_a_weight_is_said_as_it_is(
    large: bool, broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(graph_files, "EXTERNAL_DATA_BYTES", 1000)

    def read() -> Values:
        raise ArtifactError("unet: expected numbers, got NaN")

    model = model_of(CHAIN, WEIGHTS)
    values = WEIGHTS[broken]
    model.graph.initializers[broken].const_value = lazy_tensor(Weight(values.shape, values.dtype, read), broken)
    with pytest.raises(ArtifactError, match=r"^unet: expected numbers, got NaN$"):
        save_onnx(model, tmp_path / "model.onnx")


def test_another_error_of_a_weight_is_not_hidden(tmp_path: Path, external: None) -> None:
    def read() -> Values:
        raise OSError("the disk is gone")

    model = model_of(CHAIN, WEIGHTS)
    values = WEIGHTS["one"]
    model.graph.initializers["one"].const_value = lazy_tensor(Weight(values.shape, values.dtype, read), "one")
    with pytest.raises(OSError, match="the disk is gone"):
        save_onnx(model, tmp_path / "model.onnx")


@pytest.fixture
def holder(external: None, tmp_path: Path) -> Path:
    return save_onnx(model_of(CHAIN, WEIGHTS), tmp_path / "model.onnx")[0]


# The chain with its weights in another place, and a small one of its own.
OTHER = """
    other (float[b,30] x) => (float[b,30] out) {
        first = MatMul(x, three)
        second = MatMul(first, two)
        third = MatMul(second, one)
        out = Add(third, own)
    }
"""


def other_weights(**changed: Values) -> dict[str, Values]:
    large = {name: WEIGHTS[name] for name in ("one", "two", "three")}
    return {**large, "own": RNG.standard_normal(30, np.float32), **changed}


def test_a_graph_with_the_same_weights_shares_them(holder: Path, tmp_path: Path) -> None:
    data, weights = holder.with_name("model.onnx_data"), other_weights()
    before, path = data.read_bytes(), tmp_path / "other.onnx"
    files = save_sharing(model_of(OTHER, weights), path, holder)
    assert list(files) == files_of(path) == [path, data]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data", "other.onnx"]
    assert data.read_bytes() == before
    assert_stored(path, weights)
    whole = tmp_path / "whole.onnx"
    ir.save(model_of(OTHER, weights), whole)
    assert_array_equal(outputs_of(path, FEEDS)["out"], outputs_of(whole, FEEDS)["out"])
    assert path.stat().st_size < 2000


@pytest.mark.parametrize(
    "change",
    [
        {"two": np.nextafter(WEIGHTS["two"], np.float32(9))},
        {"two": WEIGHTS["two"].view(np.int32)},
        {"two": WEIGHTS["two"].reshape(60, 15)},
        {"own": RNG.standard_normal((30, 60), np.float32)},
    ],
    ids=["another value", "another type", "another shape", "another weight"],
)
def test_a_graph_with_other_weights_is_written_whole(change: dict[str, Values], holder: Path, tmp_path: Path) -> None:
    model, path = model_of("g (float[b] x) => (float[b] out) { out = Neg(x) }"), tmp_path / "other.onnx"
    weights = other_weights(**change)
    for name, values in weights.items():
        tensor = lazy_tensor(Weight(values.shape, values.dtype, lambda values=values: values), name)  # type: ignore[misc]
        model.graph.register_initializer(ir.Value(name=name, const_value=tensor))
    assert save_sharing(model, path, holder) == (path, tmp_path / "other.onnx_data")
    assert_stored(path, weights)
    assert_stored(holder, WEIGHTS)


def test_the_weights_that_differ_stay_in_a_graph_that_shares_most(
    holder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_files, "_SHARE", 0.6)
    path, weights = tmp_path / "other.onnx", other_weights(two=WEIGHTS["two"] + 1)
    files = save_sharing(model_of(OTHER, weights), path, holder)
    assert files == (path, tmp_path / "model.onnx_data")
    assert {tensor.name for tensor in external_tensors(ir.load(path))} == {"one", "three"}
    assert_stored(path, weights)


def test_beside_a_graph_that_holds_its_weights_itself_nothing_is_shared(tmp_path: Path) -> None:
    holder, path = tmp_path / "model.onnx", tmp_path / "other.onnx"
    save_onnx(model_of(CHAIN, WEIGHTS), holder)
    assert save_sharing(model_of(OTHER, other_weights()), path, holder) == (path,)
    assert files_of(path) == [path]


def test_a_graph_can_be_written_over_its_own(holder: Path, tmp_path: Path) -> None:
    """What is loaded from a file and saved again is copied elsewhere, not read while it is overwritten."""
    model = ir.load(holder)
    again = save_onnx(model, tmp_path / "again.onnx")
    assert_stored(again[0], WEIGHTS)
    assert_stored(holder, WEIGHTS)


def test_large_components_answer_the_same(
    external: None, tiny_bundle: Path, tiny_cases: dict[str, Any], tmp_path: Path
) -> None:
    whole = tiny_bundle / "text_encoder/model.onnx"
    files = save_onnx(ir.load(whole), tmp_path / "model.onnx")
    assert files == (tmp_path / "model.onnx", tmp_path / "model.onnx_data")
    assert files[1].stat().st_size > 100_000 > files[0].stat().st_size
    feeds = tiny_cases["text_encoder"][0].feeds
    for name, value in outputs_of(whole, feeds).items():
        assert_array_equal(outputs_of(files[0], feeds)[name], value)
