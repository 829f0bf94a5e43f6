"""What optimum's pipelines need of a bundle, as `benchmarks/scripts/optimum_interop.py` runs them on one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from latentrt.runtime.session import OnnxSession

FAMILIES = ("sd15", "sdxl_base")
# Inputs by name, any order; outputs by place, except hidden states.
INPUTS = {
    "text_encoder": {"input_ids"},
    "text_encoder_2": {"input_ids"},
    "unet": {"sample", "timestep", "encoder_hidden_states"},
    "vae_decoder": {"latent_sample"},
    "vae_encoder": {"sample"},
}
OUTPUTS = {
    "text_encoder": ["last_hidden_state", "pooler_output"],
    "text_encoder_2": ["text_embeds", "last_hidden_state"],
    "unet": ["out_sample"],
    "vae_decoder": ["sample"],
    "vae_encoder": ["latent_parameters"],
}


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def components(family: str) -> list[str]:
    return [name for name in INPUTS if family == "sdxl_base" or name != "text_encoder_2"]


def dimensions(values: Any) -> dict[str, list[int | str]]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_have_its_names(family_bundle: Callable[[str], Path], family: str) -> None:
    for name in components(family):
        session = OnnxSession(family_bundle(family) / name / "model.onnx")
        more = {"text_embeds", "time_ids"} if family == "sdxl_base" and name == "unet" else set()
        assert {tensor.name for tensor in session.spec.inputs} == INPUTS[name] | more
        outputs = [tensor.name for tensor in session.spec.outputs]
        assert outputs[: len(OUTPUTS[name])] == OUTPUTS[name]
        layers = read(family_bundle(family) / name / "config.json").get("num_hidden_layers", -1)
        assert outputs[len(OUTPUTS[name]) :] == [f"hidden_states.{index}" for index in range(layers + 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_outputs_follow_from_names_of_inputs(family_bundle: Callable[[str], Path], family: str) -> None:
    """With IO binding, on with CUDA, optimum computes them; only the U-Net's it knows."""
    known = {"batch": 3, "latent_height": 5, "latent_width": 7, "height": 40, "width": 56}
    made = {"sample": [3, 3, 40, 56], "latent_parameters": [3, 8, 5, 7]}
    for name in set(components(family)) - {"unet"}:
        graph = onnx.load(family_bundle(family) / name / "model.onnx").graph
        named = {d for shape in dimensions(graph.input).values() for d in shape if isinstance(d, str)}
        for output, shape in dimensions(graph.output).items():
            words = [word for d in shape if isinstance(d, str) for word in d.split(" ")]
            assert {word for word in words if not word.isdigit()} - {"*", "/"} <= named, f"{name}.{output}: {shape}"
            sizes = [d if isinstance(d, int) else int(eval(d, {}, known)) for d in shape]
            assert output not in made or sizes == made[output]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_timestep_serves_all_rows(family_bundle: Callable[[str], Path], family: str) -> None:
    path = family_bundle(family) / "unet" / "model.onnx"
    session = OnnxSession(path)
    sizes: dict[int | str, int | str] = {"batch": 2, "sequence_length": 77, "latent_height": 8, "latent_width": 8}
    rng = np.random.default_rng(0)
    feeds = {
        tensor.name: rng.standard_normal([int(sizes.get(size, size)) for size in tensor.shape], dtype=np.float32)
        for tensor in session.spec.inputs
    }
    single = session({**feeds, "timestep": np.array([321.0], np.float32)})
    each = session({**feeds, "timestep": np.array([321.0, 321.0], np.float32)})
    np.testing.assert_array_equal(single["out_sample"], each["out_sample"])
    other = session({**feeds, "timestep": np.array([321.0, 20.0], np.float32)})["out_sample"]
    np.testing.assert_allclose(other[0], each["out_sample"][0], rtol=0, atol=1e-5)
    assert np.abs(other[1] - each["out_sample"][1]).max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_say_what_it_reads(family_bundle: Callable[[str], Path], family: str) -> None:
    bundle = family_bundle(family)
    index = read(bundle / "model_index.json")
    assert index["_class_name"] == {"sd15": "StableDiffusionPipeline", "sdxl_base": "StableDiffusionXLPipeline"}[family]
    assert index["unet"]
    encoders = [name for name in components(family) if name.startswith("text_encoder")]
    for name in encoders:
        tokenizer = name.replace("text_encoder", "tokenizer")
        assert index[tokenizer] == ["transformers", "CLIPTokenizer"]
        # transformers 4 reads no others.
        assert (bundle / tokenizer / "vocab.json").is_file()
        assert (bundle / tokenizer / "merges.txt").is_file()
        assert read(bundle / name / "config.json")["num_hidden_layers"] > 0
    assert index["scheduler"][0] == "diffusers"
    assert "time_cond_proj_dim" in read(bundle / "unet" / "config.json")
    for half in ("vae_decoder", "vae_encoder"):
        config = read(bundle / half / "config.json")
        assert config["scaling_factor"] > 0
        assert 2 ** (len(config["block_out_channels"]) - 1) == 8
