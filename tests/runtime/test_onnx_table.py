"""The embedding table in a graph's file: found, read and made longer; onnx and ONNX Runtime are the judges."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from tiny_text_graph import TOKENS, WIDTH, write_encoder

from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.onnx_table import find_token_table, graph_with_rows, read_rows


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_longer_table(tmp_path: Path, dtype: Any, external: bool) -> None:
    path = tmp_path / "model.onnx"
    table = write_encoder(path, dtype=dtype, external=external)
    found = find_token_table(path)
    assert found.shape == (TOKENS, WIDTH)
    assert found.dtype == dtype
    assert found.name == "text_model.embeddings.token_embedding.weight"
    np.testing.assert_array_equal(read_rows(found, np.array([3, TOKENS - 1])), table[[3, TOKENS - 1]])

    rows = np.random.default_rng(1).standard_normal((4, WIDTH)).astype(np.float32)
    before, after = onnx.load(path), onnx.load_from_string(graph_with_rows(found, rows))
    held = {tensor.name: tensor for tensor in after.graph.initializer}
    np.testing.assert_array_equal(numpy_helper.to_array(held[found.name]), np.concatenate([table, rows.astype(dtype)]))
    # Everything else is what it was.
    assert [info.name for info in after.graph.value_info] == ["embedded"]
    assert after.graph.node == before.graph.node
    assert list(held) == [tensor.name for tensor in before.graph.initializer]
    assert after.opset_import == before.opset_import


@pytest.mark.parametrize("argmax", [False, True])
def test_how_the_graph_pools(tmp_path: Path, argmax: bool) -> None:
    write_encoder(tmp_path / "model.onnx", argmax=argmax)
    assert find_token_table(tmp_path / "model.onnx").pools_at_argmax is argmax


def test_a_table_that_lost_its_name_is_the_longest(tmp_path: Path) -> None:
    write_encoder(tmp_path / "model.onnx", name="onnx::Gather_1", tokens=300)
    assert find_token_table(tmp_path / "model.onnx").name == "onnx::Gather_1"


def test_no_table(tmp_path: Path) -> None:
    write_encoder(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    for node in model.graph.node:
        node.op_type = "Gatherer" if node.op_type == "Gather" else node.op_type
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match="found none"):
        find_token_table(tmp_path / "model.onnx")


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "inner" / "model.onnx"
    write_encoder(path, external=True)
    (path.parent / "model.onnx.data").rename(tmp_path / "model.onnx.data")
    path.write_bytes(path.read_bytes().replace(b"model.onnx.data", b"../////onnx.dat"))
    (tmp_path / "model.onnx.data").rename(tmp_path / "onnx.dat")
    with pytest.raises(ArtifactError, match="outside the folder"):
        read_rows(find_token_table(path), np.array([0]))


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_a_damaged_file_is_one_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("damaged") / "model.onnx"
    write_encoder(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, min(400, len(content) - 1)))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(ArtifactError):
        graph_with_rows(find_token_table(path), np.zeros((1, WIDTH), np.float32))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.onnx"):
        find_token_table(tmp_path / "none.onnx")
