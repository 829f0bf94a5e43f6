"""The exported graphs against diffusers' and transformers' own modules, at sizes that were not traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from tiny import COMPONENTS

from latentrt.export.graph_builder import components_of
from latentrt.runtime.session import OnnxSession

# Sums in another order; one float32 rounding is 6e-8.
BOUND = 1e-5


def relative_l2(reference: torch.Tensor, found: np.ndarray[Any, Any]) -> float:
    wanted = reference.numpy().astype(np.float64)
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_graph_declares_the_contract_of_its_component(name: str, tiny_bundle: Path, tiny_networks: Any) -> None:
    assert OnnxSession(tiny_bundle / name / "model.onnx").spec == components_of(tiny_networks)[name].spec


@pytest.mark.parametrize("name", COMPONENTS)
def test_an_fp16_graph_has_the_same_contract_and_half_weights(name: str, tiny_bundle: Path) -> None:
    full, half = tiny_bundle / name / "model.onnx", tiny_bundle / name / "model.fp16.onnx"
    assert OnnxSession(half).spec == OnnxSession(full).spec
    weights = [v for v in ir.load(half).graph.initializers.values() if v.const_value is not None]
    floats = {v.name for v in weights if v.dtype == ir.DataType.FLOAT}
    # The frequencies of the timestep's sines and the constants beside them.
    assert sum(w.const_value.size for w in weights if w.const_value is not None and w.name in floats) <= 16


@pytest.mark.parametrize(("rows", "ids"), [(1, 77), (3, 77)])
def test_the_text_encoder_returns_every_hidden_state(rows: int, ids: int, tiny_bundle: Path, tiny_loaded: Any) -> None:
    encoder = tiny_loaded.text_encoder
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(0, 500, (rows, ids), generator=generator)
    tokens[:, 0], tokens[:, 20:] = encoder.config.bos_token_id, encoder.config.eos_token_id
    with torch.no_grad():
        out = encoder(tokens, output_hidden_states=True)
    found = OnnxSession(tiny_bundle / "text_encoder/model.onnx")({"input_ids": tokens.numpy()})
    assert list(found) == ["last_hidden_state", "pooler_output", *(f"hidden_states.{i}" for i in range(3))]
    for value, reference in zip(found.values(), (out[0], out.pooler_output, *out.hidden_states), strict=True):
        assert relative_l2(reference, np.asarray(value)) <= BOUND
    # Clip skip reads states before the final LayerNorm; the last one must not be last_hidden_state itself.
    assert not np.array_equal(found["last_hidden_state"], found["hidden_states.2"])


@pytest.mark.parametrize(
    ("batch", "height", "width", "length"), [(1, 8, 8, 77), (3, 4, 10, 154), (2, 7, 5, 77), (2, 9, 16, 231)]
)
def test_the_unet_takes_every_size_and_a_timestep_for_each_row(
    batch: int, height: int, width: int, length: int, tiny_bundle: Path, tiny_loaded: Any
) -> None:
    generator = torch.Generator().manual_seed(height)
    sample = torch.randn(batch, 4, height, width, generator=generator)
    timestep = torch.tensor([981.0, 1.0, 500.0])[:batch]
    text = torch.randn(batch, length, 32, generator=generator)
    with torch.no_grad():
        rows = [tiny_loaded.unet(sample[i : i + 1], timestep[i], text[i : i + 1]).sample for i in range(batch)]
    found = OnnxSession(tiny_bundle / "unet/model.onnx")(
        {"sample": sample.numpy(), "timestep": timestep.numpy(), "encoder_hidden_states": text.numpy()}
    )
    assert relative_l2(torch.cat(rows), np.asarray(found["out_sample"])) <= BOUND


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 3, 5)])
def test_the_vae_takes_every_size(batch: int, height: int, width: int, tiny_bundle: Path, tiny_loaded: Any) -> None:
    generator = torch.Generator().manual_seed(height)
    latents = torch.randn(batch, 4, height, width, generator=generator)
    pictures = torch.rand(batch, 3, 8 * height, 8 * width, generator=generator) * 2 - 1
    with torch.no_grad():
        decoded = tiny_loaded.vae.decode(latents).sample
        gaussian = tiny_loaded.vae.encode(pictures).latent_dist
    found = OnnxSession(tiny_bundle / "vae_decoder/model.onnx")({"latent_sample": latents.numpy()})["sample"]
    assert relative_l2(decoded, np.asarray(found)) <= BOUND
    found = OnnxSession(tiny_bundle / "vae_encoder/model.onnx")({"sample": pictures.numpy()})["latent_parameters"]
    assert relative_l2(gaussian.mean, np.asarray(found[:, :4])) <= BOUND
    assert relative_l2(gaussian.logvar, np.asarray(found[:, 4:])) <= BOUND


def test_real_inputs_span_the_run_and_hold_what_the_pipeline_saw(tiny_cases: Any, tiny_loaded: Any) -> None:
    unet = {case.name: case for case in tiny_cases["unet"]}
    steps = [case.feeds["timestep"] for name, case in unet.items() if name.startswith("timestep")]
    assert len(steps) == 4
    assert all(len(np.unique(step)) == 1 and step.shape == (4,) for step in steps)
    assert steps[0][0] > 800
    assert steps[-1][0] < 10
    # Rows without the prompt come first, and differ from those with it.
    text = next(iter(unet.values())).feeds["encoder_hidden_states"]
    np.testing.assert_array_equal(text[0], text[1])
    assert not np.array_equal(text[1], text[2])
    assert len(np.unique(unet["mixed timesteps"].feeds["timestep"])) == 4
    assert unet["154 embeddings"].feeds["encoder_hidden_states"].shape == (4, 154, 32)
    height, width = unet["another size"].feeds["sample"].shape[2:]
    assert height != width
    ids = tiny_cases["text_encoder"][0].feeds["input_ids"]
    assert (ids == tiny_loaded.text_encoder.config.eos_token_id).sum(1).tolist()[-1] == 1  # cut at 77


def test_nothing_is_left_on_the_pipeline_after_the_capture(tiny_cases: Any, tiny_loaded: Any) -> None:
    assert not tiny_loaded.unet._forward_hooks
