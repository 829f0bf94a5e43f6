from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from engine_bundle import unet_graph
from onnx import TensorProto, helper

from latentrt.export.engine_graph import check_types, graph_tensors, load_graph, mixed_types
from latentrt.runtime.errors import ArtifactError, BuildError
from latentrt.runtime.specs import TensorSpec


def test_a_graph_of_one_type_passes() -> None:
    assert mixed_types(unet_graph()) == []


def test_a_node_of_half_and_float_is_named_with_its_inputs() -> None:
    with pytest.raises(BuildError, match=r"Add node 'add_text' mixes h float16, k_map float\. TensorRT is strongly"):
        check_types("unet", unet_graph(mixed=True))


def test_a_concat_of_half_and_float_is_named_and_operators_that_may_mix_are_not() -> None:
    info = helper.make_tensor_value_info
    inputs = [info("a", TensorProto.FLOAT16, [2]), info("b", TensorProto.FLOAT, [2]), info("i", TensorProto.INT64, [1])]
    nodes = [
        helper.make_node("Gather", ["a", "i"], ["g"]),
        helper.make_node("Concat", ["a", "a", "b"], ["c"], axis=0),
        helper.make_node("Custom", ["a", "b"], ["d"], domain="elsewhere"),
    ]
    graph = helper.make_graph(nodes, "g", inputs, [info("d", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("elsewhere", 1)]
    assert mixed_types(helper.make_model(graph, opset_imports=opsets)) == [
        "Concat node '(unnamed)' mixes a float16, a float16, b float"
    ]


def test_tensors_keep_names_of_dynamic_sizes() -> None:
    assert graph_tensors(unet_graph().graph.input)[2] == TensorSpec("encoder_hidden_states", "float32", ("b", "n", 64))


def test_a_truncated_graph_is_an_artifact_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(unet_graph(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model\.onnx: expected an ONNX graph"):
        load_graph(path)
    with pytest.raises(ArtifactError, match=r"none\.onnx"):
        load_graph(tmp_path / "none.onnx")
