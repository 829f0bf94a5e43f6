from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from attention_graphs import FAMILIES, attention_graph, relative_l2, torch_unet, unet_feeds, unet_oracle
from families import Sources
from numpy.testing import assert_array_equal

from latentrt.export.half_precision import HalfPrecisionPass
from latentrt.export.prompt_keys import split_prompt
from latentrt.runtime.errors import ExportError
from latentrt.runtime.prompt_keys import SplitUnet
from latentrt.runtime.session import OnnxSession

TEXT = "encoder_hidden_states"


def saved(model: ir.Model, folder: Path) -> tuple[OnnxSession, OnnxSession]:
    """Sessions of the two graphs of a U-Net, saved as they are and checked."""
    paths = (folder / "prompt.onnx", folder / "cached.onnx")
    for graph, path in zip(split_prompt(model), paths, strict=True):
        ir.save(graph, path)
        onnx.checker.check_model(str(path), full_check=True)
    return OnnxSession(paths[0]), OnnxSession(paths[1])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_two_graphs_are_the_unet_bit_for_bit(
    half: bool,
    family: str,
    family_bundle: Callable[[str], Path],
    family_sources: Callable[[str], Sources],
    tmp_path: Path,
) -> None:
    model = ir.load(family_bundle(family) / "unet/model.onnx")
    if half:
        HalfPrecisionPass()(model)
    ir.save(model, tmp_path / "whole.onnx")
    before = len(model.graph)
    prompt, cached = saved(model, tmp_path)
    assert len(model.graph) == before
    unet = torch_unet(family_sources(family).path)
    feeds = unet_feeds(unet)
    found = SplitUnet(prompt, cached)(feeds)["out_sample"]
    assert_array_equal(found, OnnxSession(tmp_path / "whole.onnx")(feeds)["out_sample"])
    assert relative_l2(unet_oracle(unet, feeds), found) <= (1e-2 if half else 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cross_attention_has_a_key_and_a_value_and_no_weight_is_in_both(
    family: str, family_bundle: Callable[[str], Path], family_sources: Callable[[str], Sources]
) -> None:
    model = ir.load(family_bundle(family) / "unet/model.onnx")
    unet = torch_unet(family_sources(family).path)
    modules = {name: module for name, module in unet.named_modules() if name.endswith(".attn2")}
    shapes = {
        f"{name}.{kind}": ["batch", "sequence_length", module.inner_dim]
        for name, module in modules.items()
        for kind in ("key", "value")
    }
    prompt, cached = split_prompt(model)
    assert [value.name for value in prompt.graph.inputs] == [TEXT]
    given = {str(value.name): value for value in cached.graph.inputs}
    assert given.keys() == {str(v.name) for v in model.graph.inputs} - {TEXT} | shapes.keys()
    for value in (*prompt.graph.outputs, *(given[name] for name in shapes)):
        assert value.shape is not None
        assert [str(dim) for dim in value.shape] == [str(dim) for dim in shapes[str(value.name)]]
    weights = [set(graph.graph.initializers) for graph in (prompt, cached)]
    assert weights[0].isdisjoint(weights[1])
    assert weights[0] == {f"unet.{name}.to_{letter}.weight" for name in modules for letter in "kv"}
    assert {name for name in model.graph.initializers if ".weight" in name} <= weights[0] | weights[1]
    assert len(prompt.graph) == len(shapes)


def test_the_graphs_share_the_external_data_of_the_unet(family_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    model = ir.load(family_bundle("sd15") / "unet/model.onnx")
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx_data", size_threshold_bytes=1024)
    prompt, cached = saved(ir.load(tmp_path / "model.onnx"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cached.onnx",
        "model.onnx",
        "model.onnx_data",
        "prompt.onnx",
    ]
    assert (tmp_path / "cached.onnx").stat().st_size < (tmp_path / "model.onnx_data").stat().st_size / 2
    held = [v.const_value for v in ir.load(tmp_path / "prompt.onnx").graph.initializers.values()]
    assert {tensor.location for tensor in held if isinstance(tensor, ir.ExternalTensor)} == {"model.onnx_data"}
    assert prompt.spec.outputs[0].name in {tensor.name for tensor in cached.spec.inputs}


def crossing(reads: list[str] | None = None) -> ir.Model:
    """A cross-attention whose text is called as a U-Net's."""
    model, _ = attention_graph(cross=True, biases=True, reads=reads)
    next(value for value in model.graph.inputs if value.name == "text").name = TEXT
    return model


def test_no_weight_is_read() -> None:
    reads: list[str] = []
    prompt, _ = split_prompt(crossing(reads))
    assert [value.name for value in prompt.graph.outputs] == ["block.attn.key", "block.attn.value"]
    assert reads == []


def test_a_graph_without_attention_to_the_text_is_refused() -> None:
    model, _ = attention_graph()
    with pytest.raises(ExportError, match="expected attention to encoder_hidden_states, found none"):
        split_prompt(model)


def test_text_that_is_used_elsewhere_too_is_refused() -> None:
    model = crossing()
    text = next(value for value in model.graph.inputs if value.name == TEXT)
    mean = ir.node("ReduceMean", [text], name="mean_of_text")
    mean.outputs[0].name, mean.outputs[0].type = "mean", text.type
    model.graph.append(mean)
    model.graph.outputs.append(mean.outputs[0])
    with pytest.raises(ExportError, match="in cross-attention only, got it read by mean_of_text"):
        split_prompt(model)
