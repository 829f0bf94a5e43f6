"""How a bundle keeps LoRAs: every kind of factor there and back, and files that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.lora_delta import Delta, Factor, delta_of, fused_values
from latentrt.runtime.lora_store import StoredLora, lora_bytes, read_stored_lora
from latentrt.runtime.safetensors import open_safetensors, safetensors_bytes

RNG = np.random.default_rng(2)


def factor(*shape: int, dtype: Any = np.float32) -> Factor:
    values = RNG.standard_normal(shape).astype(dtype)
    return cast(Factor, SimpleNamespace(shape=shape, read=lambda: values))


DELTAS = {
    "lora.weight": Delta({"up": factor(6, 2), "down": factor(2, 4)}, alpha=1.5),
    "rslora.weight": Delta({"up": factor(6, 4), "down": factor(4, 4)}, alpha=2.0, rank_stabilized=True),
    "half.weight": Delta({"up": factor(6, 2, dtype=np.float16), "down": factor(2, 4, dtype=np.float16)}),
    "double.weight": Delta({"up": factor(6, 2, dtype=np.float64), "down": factor(2, 4)}),
    "dora.weight": Delta({"up": factor(6, 2), "down": factor(2, 4)}, magnitude=factor(6)),
    "inputs.weight": Delta({"up": factor(6, 2), "down": factor(2, 4)}, magnitude=factor(1, 4), by_input=True),
    "tucker.weight": Delta({"up": factor(6, 2), "mid": factor(2, 2, 3, 3), "down": factor(2, 4)}),
    "loha.weight": Delta(
        {f"hada_w{n}_{side}": factor(*((6, 2), (2, 4))[side == "b"]) for n in (1, 2) for side in "ab"}
    ),
    "lokr.weight": Delta({"lokr_w1": factor(3, 2), "lokr_w2_a": factor(2, 2), "lokr_w2_b": factor(2, 2)}, alpha=3.0),
    "full.bias": Delta({"diff": factor(6)}),
}


def test_there_and_back(tmp_path: Path) -> None:
    lora = StoredLora("style", 0.75, {"file": "x.safetensors", "sha256": "0"}, {"unet": DELTAS, "text_encoder": {}})
    (tmp_path / "style.safetensors").write_bytes(lora_bytes(lora))
    found = read_stored_lora(tmp_path / "style.safetensors", "style")
    assert (found.name, found.scale, found.source) == (lora.name, lora.scale, lora.source)
    assert found.deltas["unet"].keys() == DELTAS.keys()
    for name, delta in found.deltas["unet"].items():
        shape = DELTAS[name].shape
        np.testing.assert_array_equal(delta_of(delta, shape), delta_of(DELTAS[name], shape))
        weight = RNG.standard_normal(shape).astype(np.float32)
        np.testing.assert_array_equal(fused_values(weight, delta, 0.5), fused_values(weight, DELTAS[name], 0.5))


def test_a_newer_file(tmp_path: Path) -> None:
    note = json.dumps({"version": 9})
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes({}, {"latentrt": note}))
    with pytest.raises(ArtifactError, match=r"version 1 or older, got 9.*upgrade"):
        read_stored_lora(tmp_path / "a.safetensors", "a")


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(ArtifactError, match="lora add"):
        read_stored_lora(path, "a")
    for content in (
        b"",
        safetensors_bytes({}, {}),
        safetensors_bytes({"x": np.ones(2, np.float32)}, {"latentrt": "{}"}),
    ):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"a\.safetensors"):
            read_stored_lora(path, "a")


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_damaged_file_is_one_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.safetensors"
    content = bytearray(lora_bytes(StoredLora("a", 1.0, {}, {"unet": {"lora.weight": DELTAS["lora.weight"]}})))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        for delta in read_stored_lora(path, "a").deltas.get("unet", {}).values():
            delta_of(delta, delta.shape)
    except ArtifactError as err:
        assert "a.safetensors" in str(err)  # noqa: PT017


@given(
    st.dictionaries(st.text(min_size=1), st.lists(st.integers(0, 3), max_size=3)), st.dictionaries(st.text(), st.text())
)
def test_what_is_written_can_be_read(shapes: dict[str, list[int]], metadata: dict[str, str]) -> None:
    shapes.pop("__metadata__", None)
    tensors = {
        name: np.full(shape, index, (np.float16, np.float32)[index % 2])
        for index, (name, shape) in enumerate(shapes.items())
    }
    found = open_safetensors(Path("x"), safetensors_bytes(tensors, metadata))
    assert found.metadata == metadata
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {n: tuple(s) for n, s in shapes.items()}
    for name, tensor in found.tensors.items():
        np.testing.assert_array_equal(tensor.read(), tensors[name])
