from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.checkpoint_weights import load_pipeline
from latentrt.runtime.errors import ArtifactError, ConfigError, LatentrtError
from latentrt.runtime.manifest import sha256_of

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_the_layout_is_read_without_the_weights(tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    assert checkpoint.pipeline_class == "StableDiffusionPipeline"
    assert checkpoint.scheduler_class == "PNDMScheduler"
    assert checkpoint.hashes("unet") == {name: sha256_of(tiny_checkpoint / name) for name in ("unet/config.json", UNET)}
    copied = checkpoint.copied_files()
    assert copied["vae_encoder/config.json"] == copied["vae_decoder/config.json"] == tiny_checkpoint / "vae/config.json"
    assert {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"} <= copied.keys()


def test_loaded_weights_are_those_of_the_files(tiny_checkpoint: Path, tiny_loaded: Any) -> None:
    stored = load_file(tiny_checkpoint / UNET)
    loaded = tiny_loaded.unet.state_dict()
    assert stored.keys() == loaded.keys()
    for name, weight in stored.items():
        np.testing.assert_array_equal(loaded[name].numpy(), weight.numpy())
    assert not tiny_loaded.unet.training


def test_half_precision_weights_are_raised_to_float32(copy: Path) -> None:
    for name in (UNET, TEXT):
        weights = {key: value.half() for key, value in load_file(copy / name).items()}
        save_file(weights, copy / name, metadata={"format": "pt"})
    pipeline = load_pipeline(open_checkpoint(copy))
    stored = load_file(copy / UNET)
    for name, weight in pipeline.unet.state_dict().items():
        assert weight.dtype == torch.float32
        np.testing.assert_array_equal(weight.numpy(), stored[name].float().numpy())
    assert pipeline.text_encoder.dtype == torch.float32


def test_text_encoder_keys_of_older_transformers_load(copy: Path, tiny_loaded: Any) -> None:
    old = {f"text_model.{name}": weight for name, weight in load_file(copy / TEXT).items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, copy / TEXT, metadata={"format": "pt"})
    loaded = load_pipeline(open_checkpoint(copy)).text_encoder.state_dict()
    for name, weight in tiny_loaded.text_encoder.state_dict().items():
        np.testing.assert_array_equal(loaded[name].numpy(), weight.numpy())


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (UNET, lambda w: w.pop("conv_in.bias"), "1 missing: conv_in.bias"),
        (UNET, lambda w: w.update(surplus=torch.zeros(3)), "1 unexpected: surplus"),
        (UNET, lambda w: w.update({"conv_in.bias": torch.zeros(5)}), "conv_in.bias"),
        (TEXT, lambda w: w.pop(next(k for k in w if k.endswith("fc1.bias"))), "1 missing: "),
        (TEXT, lambda w: w.update(surplus=torch.zeros(3)), "1 unexpected: surplus"),
        (TEXT, lambda w: w.update({next(k for k in w if k.endswith("fc1.bias")): torch.zeros(5)}), "fc1.bias"),
    ],
)
def test_a_weight_too_few_too_many_or_of_another_shape_is_an_error(
    copy: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    edit_weights(copy / name, change)
    with pytest.raises(ArtifactError) as caught:
        load_pipeline(open_checkpoint(copy))
    assert said in str(caught.value)
    assert name.split("/")[0] in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 200, -7])
@pytest.mark.parametrize("name", [UNET, TEXT])
def test_a_truncated_file_is_named_before_anything_is_loaded(copy: Path, name: str, keep: int) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[:keep])
    with pytest.raises(ArtifactError, match="truncated") as caught:
        open_checkpoint(copy)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [UNET, TEXT, "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "model_index.json"],
)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ArtifactError) as caught:
        open_checkpoint(copy)
    assert name in str(caught.value)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / UNET).rename(copy / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ArtifactError, match="pickle"):
        open_checkpoint(copy)


@pytest.mark.parametrize("found", ["nothing", "a file", "no model_index.json"])
def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path, found: str) -> None:
    path = tmp_path / "x"
    if found == "a file":
        path.write_text("")
    elif found != "nothing":
        path.mkdir()
    with pytest.raises(ArtifactError, match=f"diffusers checkpoint.*found {found}"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline", None])
def test_other_pipelines_are_named_and_not_supported_yet(copy: Path, name: str | None) -> None:
    edit_json(copy / "model_index.json", _class_name=name)
    with pytest.raises(ConfigError, match=f"got {name}. It is not supported yet"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("model_index.json", {"unet": ["diffusers", "UNetMotionModel"]}, "UNetMotionModel"),
        ("model_index.json", {"prior": ["diffusers", "PriorTransformer"]}, "prior: expected no such.*PriorTransformer"),
        ("model_index.json", {"text_encoder": [None, None]}, "expected a text encoder"),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "T5EncoderModel"),
        ("unet/config.json", {"in_channels": 5}, "in_channels of 4 .* 8 .* or 9 .*got 5"),
        ("unet/config.json", {"out_channels": 8}, "out_channels of 4.*got 8"),
        ("unet/config.json", {"cross_attention_dim": 64}, "cross_attention_dim of 32.*got 64"),
        ("unet/config.json", {"cross_attention_dim": [32, 32]}, r"one cross_attention_dim, got \[32, 32\]"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type.*'text_time' without"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type.*got 'image'"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type None, got 'timestep'"),
        ("unet/config.json", {"num_class_embeds": 3}, "num_class_embeds None, got 3"),
        ("unet/config.json", {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type.*ip_image_proj"),
        ("unet/config.json", {"attention_type": "gated"}, "attention_type.*got 'gated'"),
    ],
)
def test_unsupported_components_are_config_errors(copy: Path, file: str, change: dict[str, Any], said: str) -> None:
    edit_json(copy / file, **change)
    with pytest.raises(ConfigError, match=said):
        open_checkpoint(copy)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "vae/config.json"])
def test_a_config_that_is_not_json_is_one_clear_error(copy: Path, file: str) -> None:
    (copy / file).write_text("{")
    with pytest.raises(LatentrtError) as caught:
        open_checkpoint(copy)
    assert file in str(caught.value)


def test_config_and_weights_of_different_models_do_not_load(copy: Path) -> None:
    edit_json(copy / "unet/config.json", block_out_channels=[16, 64])
    with pytest.raises(ArtifactError, match="unet"):
        load_pipeline(open_checkpoint(copy))
