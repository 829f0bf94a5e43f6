from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from attention_graphs import FAMILIES, HEADS, WIDTH, attention_graph, torch_unet
from families import Sources

from latentrt.export.attention_pattern import find_attention


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_attention_is_found_with_all_its_parts(cross: bool, biases: bool, mask: bool) -> None:
    model, _ = attention_graph(cross=cross, biases=biases, mask=mask)
    (found,) = find_attention(model)
    assert found.name == "block.attn"
    assert (found.heads, found.width) == (HEADS, WIDTH)
    assert found.is_self is not cross
    assert found.scale == pytest.approx(0.36)
    assert (found.mask is not None and found.mask.name) == (mask and "mask")
    for letter, operand in zip("qkv", (found.query, found.key, found.value), strict=True):
        projection = operand.projection
        assert projection.weight.name == f"block.attn.to_{letter}.weight"
        assert (projection.bias is not None and projection.bias.name) == (biases and f"block.attn.to_{letter}.bias")
        assert projection.source.name == ("text" if cross and letter != "q" else "x")
        assert projection.output.name == letter
        assert operand.value.name == {"q": "q_scaled", "k": "k_scaled", "v": "v_heads"}[letter]
    assert found.output is not None
    assert found.output.weight.name == "block.attn.to_out.weight"


def test_casts_around_the_softmax_are_looked_through() -> None:
    model, _ = attention_graph(mask=True)
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    for value, place in ((softmax.inputs[0], softmax), (softmax.outputs[0], softmax.successors()[0])):
        assert value is not None
        cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT})
        model.graph.insert_before(place, cast)
        place.replace_input_with(place.inputs.index(value), cast.outputs[0])
    (found,) = find_attention(model)
    assert found.mask is not None


def test_a_product_of_values_that_nothing_projects_is_no_attention_of_ours() -> None:
    model, _ = attention_graph()
    reshape = next(node for node in model.graph if node.outputs[0].name == "k_split")
    reshape.replace_input_with(0, model.graph.inputs[0])
    assert find_attention(model) == []


def test_without_their_parameters_names_weights_give_no_name() -> None:
    model, _ = attention_graph()
    for index, value in enumerate(list(model.graph.initializers.values())):
        value.name = f"val_{index}"
    assert find_attention(model)[0].name == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_of_a_unet_is_found_as_diffusers_has_it(
    family: str, family_bundle: Callable[[str], Path], family_sources: Callable[[str], Sources]
) -> None:
    found = find_attention(ir.load(family_bundle(family) / "unet/model.onnx"))
    unet = torch_unet(family_sources(family).path)
    modules = {f"unet.{name}": module for name, module in unet.named_modules() if name.endswith((".attn1", ".attn2"))}
    assert sorted(attention.name for attention in found) == sorted(modules)
    for attention in found:
        module = modules[attention.name]
        assert attention.heads == module.heads
        assert attention.width == module.inner_dim // module.heads
        np.testing.assert_allclose(attention.scale, module.scale, rtol=1e-6)
        assert attention.is_self is not module.is_cross_attention
        assert attention.mask is None
        assert attention.output is not None
        assert attention.output.bias is not None
