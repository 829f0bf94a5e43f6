"""One timestep for all rows of a call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from small_graphs import model_of

from latentrt.export.timestep_rows import TimestepRowsPass
from latentrt.runtime.session import OnnxSession

# SDXL's sum of embeddings, in which ONNX Runtime reuses memory by the names of dimensions.
GRAPH = """g (float[batch, 2] sample, float[batch] timestep) => (float[batch, 1] out_sample) {
    axes = Constant <value_ints = [1]> ()
    column = Unsqueeze (timestep, axes)
    angle = Sin (column)
    mean = ReduceMean <keepdims = 1> (sample, axes)
    out_sample = Add (angle, mean)
}"""


def run(model: ir.Model, path: Path, timestep: list[float]) -> np.ndarray:
    ir.save(model, path)
    sample = np.array([[1, 2], [3, 5], [7, 9]], np.float32)
    return OnnxSession(path)({"sample": sample, "timestep": np.array(timestep, np.float32)})["out_sample"]


def test_one_timestep_serves_all_rows_and_many_serve_one_each(tmp_path: Path) -> None:
    before = run(model_of(GRAPH), tmp_path / "before.onnx", [1, 20, 300])
    model = model_of(GRAPH)
    assert TimestepRowsPass()(model).modified
    each = run(model, tmp_path / "after.onnx", [1, 20, 300])
    np.testing.assert_array_equal(each, before)
    np.testing.assert_array_equal(
        run(model, tmp_path / "one.onnx", [20]), run(model, tmp_path / "same.onnx", [20, 20, 20])
    )
    assert [node.op_type for node in model.graph][:2] == ["Shape", "Expand"]


def test_a_graph_without_timesteps_is_left_alone() -> None:
    model = model_of("g (float[batch] sample) => (float[batch] out) { out = Sin (sample) }")
    assert not TimestepRowsPass()(model).modified
    assert len(model.graph) == 1
