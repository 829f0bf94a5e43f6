"""LoRA files that are not what they should be: one error each, which says what it is and which model it is for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from latentrt.export.checkpoint_parts import Part
from latentrt.export.lora import fused
from latentrt.export.lora_file import read_lora
from latentrt.export.lora_names import place_of
from latentrt.export.weights import of_array
from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.lora_delta import Delta, delta_of, fits

WIDTH, TEXT = 8, 768
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
SHAPES = {
    "down_blocks.0.resnets.0.conv2.bias": (WIDTH,),
    f"{BLOCK}.attn1.to_q.weight": (WIDTH, WIDTH),
    f"{BLOCK}.attn2.to_k.weight": (WIDTH, TEXT),
}
KEY = f"lora_unet_{BLOCK.replace('.', '_')}"

Tensors = Mapping[str, np.ndarray[Any, Any]]


def ones(*shape: int) -> np.ndarray[Any, Any]:
    return np.ones(shape, np.float32)


def low_rank(key: str, outputs: int = WIDTH, inputs: int = WIDTH) -> dict[str, np.ndarray[Any, Any]]:
    return {f"{key}.lora_down.weight": ones(2, inputs), f"{key}.lora_up.weight": ones(outputs, 2)}


def parts() -> dict[str, Part]:
    weights = {name: of_array(np.zeros(shape, np.float32)) for name, shape in SHAPES.items()}
    return {"unet": Part("unet", Path("unet"), {}, "UNet2DConditionModel", weights, {})}


def fold(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Mapping[str, Part]:
    save_file(dict(tensors), folder / "lora.safetensors", metadata=metadata)
    return fused(parts(), read_lora(folder / "lora.safetensors"), scale=1.0)


def test_it_fits(tmp_path: Path) -> None:
    weights = fold(tmp_path, low_rank(f"{KEY}_attn1_to_q"))["unet"].weights
    np.testing.assert_array_equal(weights[f"{BLOCK}.attn1.to_q.weight"].read(), 2 * ones(WIDTH, WIDTH))


@pytest.mark.parametrize(
    ("width", "family"), [(1024, "Stable Diffusion 2.x"), (2048, "SDXL"), (1280, "the SDXL refiner")]
)
def test_the_lora_of_another_model(tmp_path: Path, width: int, family: str) -> None:
    tensors = low_rank(f"{KEY}_attn2_to_k", inputs=width)
    with pytest.raises(ArtifactError, match=rf"\(8, {width}\) instead of \(8, 768\).*for {family}: use"):
        fold(tmp_path, tensors)


def test_the_first_ten_misfits_are_named(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {}
    for number in range(12):
        tensors |= low_rank(f"lora_unet_double_blocks_{number:02}_img_attn_proj")
    with pytest.raises(ArtifactError, match=r"got 12 .*blocks_09\S* and 2 more.*seems to be for FLUX"):
        fold(tmp_path, tensors)


def test_a_component_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="lora_te2_text_model_encoder_layers_0_mlp_fc1"):
        fold(tmp_path, low_rank("lora_te2_text_model_encoder_layers_0_mlp_fc1"))


def test_what_the_trainer_noted(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="seems to be for stable-diffusion-v2-768-v"):
        fold(tmp_path, low_rank("lora_unet_x"), {"modelspec.architecture": "stable-diffusion-v2-768-v"})
    with pytest.raises(ArtifactError, match=r"shape: .*Use one that was made for this model"):
        fold(tmp_path, low_rank("lora_unet_x"))


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_x.oft_blocks", "OFT"),
        ("lora_unet_x.on_input", "IA3"),
        ("lora_unet_x.a1.weight", "GLoRA"),
        ("unet.x.to_q.lora_B.bias", "biases"),
        ("bundle_emb.x.string_to_param.*", "textual inversion"),
        ("conv_in.weight", "another kind"),
        ("lora_unet_.alpha", "another kind"),
    ],
)
def test_other_kinds_of_files(tmp_path: Path, key: str, kind: str) -> None:
    with pytest.raises(ArtifactError, match=rf"got 1 of .*{kind}.*") as raised:
        fold(tmp_path, {**low_rank(f"{KEY}_attn1_to_q"), key: ones(2, 2)})
    assert key in str(raised.value)


def test_the_lora_of_a_transformer(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="seems to be for FLUX"):
        fold(tmp_path, low_rank("transformer.single_transformer_blocks.0.attn.to_q"))


@pytest.mark.parametrize(
    "tensors",
    [
        {"x.lora_down.weight": ones(2, 8)},
        {"x.alpha": ones(1)},
        {"x.lora_down.weight": ones(2, 8), "x.lora_up.weight": ones(8, 3)},
        {"x.lora_down.weight": ones(0, 8), "x.lora_up.weight": ones(8, 0)},
        {"x.lora_down.weight": ones(2, 8), "x.lora_up.weight": ones(8, 2), "x.alpha": ones(2)},
        {"x.lora_down.weight": ones(2, 8), "x.lora_up.weight": ones(8, 2), "x.lora_mid.weight": ones(2)},
        {"x.lora_down.weight": ones(2, 8), "x.lora_up.weight": ones(8, 2), "x.diff": ones(8, 8)},
        {f"x.hada_w{n}_{side}": ones(2 + n, 2 + n) for n in (1, 2) for side in "ab"},
        {
            "x.lora_down.weight": ones(2, 8),
            "x.lora_up.weight": ones(8, 2),
            "x.dora_scale": ones(8, 1),
            "x.lora_magnitude_vector": ones(8),
        },
        {"x.lokr_w1": ones(2, 2, 3), "x.lokr_w2": ones(4, 4)},
        {"x.lokr_w1": ones(2, 2), "x.lokr_w1_a": ones(2, 2), "x.lokr_w2": ones(4, 4)},
        {"x.diff": np.array(1, np.float32)},
    ],
)
def test_factors_that_do_not_belong_together(tmp_path: Path, tensors: Tensors) -> None:
    with pytest.raises(ArtifactError, match=r"lora_unet_x\..*incomplete"):
        fold(tmp_path, {f"lora_unet_{key}": value for key, value in tensors.items()})


def test_one_module_twice(tmp_path: Path) -> None:
    one, other = low_rank(f"{KEY}_attn1_to_q"), low_rank(f"unet.{BLOCK}.attn1.to_q")
    with pytest.raises(ArtifactError, match="each change once"):
        fold(tmp_path, {**one, **other})
    original = low_rank("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q")
    with pytest.raises(ArtifactError, match="beside"):
        fold(tmp_path, {**one, **original})


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (3,)])
def test_magnitudes_that_do_not_fit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {**low_rank(f"{KEY}_attn1_to_q"), f"{KEY}_attn1_to_q.dora_scale": ones(*shape)}
    with pytest.raises(ArtifactError, match="attn1_to_q"):
        fold(tmp_path, tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    tensors = low_rank(f"{KEY}_attn1_to_q")
    tensors[f"{KEY}_attn1_to_q.lora_up.weight"][3, 1] = value
    with pytest.raises(ArtifactError, match=r"attn1_to_q\.lora_up\.weight.*finite"):
        fold(tmp_path, tensors)


def test_no_file_and_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"missing\.safetensors"):
        read_lora(tmp_path / "missing.safetensors")
    with pytest.raises(ArtifactError, match="without tensors"):
        fold(tmp_path, {})


@pytest.mark.parametrize(
    "settings", ["[1]", "{", '"x"', '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": {}}', '{"unet.lora_alpha": NaN}']
)
def test_settings_that_are_none(tmp_path: Path, settings: str) -> None:
    with pytest.raises(ArtifactError, match="settings"):
        fold(tmp_path, low_rank(f"{KEY}_attn1_to_q"), {"lora_adapter_metadata": settings})


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf])
def test_scales_that_are_no_numbers(tmp_path: Path, scale: float) -> None:
    save_file(low_rank(f"{KEY}_attn1_to_q"), tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match="finite scale"):
        fused(parts(), read_lora(tmp_path / "lora.safetensors"), scale=scale)


@settings(deadline=None, max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from(
            ["down", "up", "mid", "diff"]
            + [
                f"{method}_{part}"
                for method in ("hada", "lokr")
                for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
            ]
            + ["lokr_w1", "lokr_w2"]
        ),
        st.lists(st.sampled_from([0, 1, 2, 3, 4]), max_size=5).map(tuple),
        max_size=6,
    ),
    st.lists(st.sampled_from([1, 2, 4, 8]), max_size=4).map(tuple),
)
def test_whatever_fits_can_be_computed(shapes: dict[str, tuple[int, ...]], weight: tuple[int, ...]) -> None:
    try:
        delta = Delta({role: of_array(ones(*shape)) for role, shape in shapes.items()}, alpha=1.0)
    except ValueError:
        return
    assert delta_of(delta, delta.shape).shape == delta.shape
    if fits(delta, weight):
        assert delta_of(delta, weight).shape == weight


@given(st.text(max_size=60))
def test_any_key_is_a_place_or_none(key: str) -> None:
    place = place_of(key)
    assert place is None or (place.module and place.component in ("unet", "text_encoder", "text_encoder_2"))
