from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.networks import Network, open_network, weights_at_hand
from latentrt.runtime.errors import ArtifactError, ConfigError, LatentrtError
from latentrt.runtime.manifest import sha256_of

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def hashed(folder: Path, *names: str) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in names}


def networks(folder: Path) -> dict[str, Network]:
    return {name: open_network(part) for name, part in open_checkpoint(folder).parts.items()}


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
    assert checkpoint.hashes() == {
        "text_encoder": hashed(tiny_checkpoint, "text_encoder/config.json", TEXT),
        "unet": hashed(tiny_checkpoint, "unet/config.json", UNET),
        "vae": hashed(tiny_checkpoint, "vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
    }
    copied = checkpoint.copied_files()
    vae = (tiny_checkpoint / "vae/config.json").read_bytes()
    assert copied["vae_encoder/config.json"] == copied["vae_decoder/config.json"] == vae
    for name in ("model_index.json", "unet/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        assert copied[name] == (tiny_checkpoint / name).read_bytes()
    scheduler = "scheduler/scheduler_config.json"
    assert json.loads(copied[scheduler]) == json.loads((tiny_checkpoint / scheduler).read_text())


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
    found = networks(copy)
    with weights_at_hand(*found.values()):
        for network, file in ((found["unet"], UNET), (found["text_encoder"], TEXT)):
            stored = load_file(copy / file)
            for name, weight in network.module.state_dict().items():
                assert weight.dtype == torch.float32
                np.testing.assert_array_equal(weight.numpy(), stored[name].float().numpy())


def test_text_encoder_keys_of_older_transformers_load(copy: Path, tiny_loaded: Any) -> None:
    old = {f"text_model.{name}": weight for name, weight in load_file(copy / TEXT).items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, copy / TEXT, metadata={"format": "pt"})
    loaded = networks(copy)["text_encoder"].weights
    wanted = tiny_loaded.text_encoder.state_dict()
    assert list(loaded) == list(wanted)
    for name, weight in wanted.items():
        np.testing.assert_array_equal(loaded[name].read(), weight.numpy())


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (UNET, lambda w: w.pop("conv_in.bias"), "1 missing: conv_in.bias (16,)."),
        (UNET, lambda w: w.update(surplus=torch.zeros(3)), "1 unexpected: surplus (3,)."),
        (
            UNET,
            lambda w: w.update({"conv_in.bias": torch.zeros(5)}),
            "1 of another shape: conv_in.bias (5,) instead of (16,).",
        ),
        (TEXT, lambda w: w.pop(next(k for k in w if k.endswith("fc1.bias"))), "1 missing: "),
        (TEXT, lambda w: w.update(surplus=torch.zeros(3)), "1 unexpected: surplus (3,)."),
        (TEXT, lambda w: w.update({next(k for k in w if k.endswith("fc1.bias")): torch.zeros(5)}), "fc1.bias"),
    ],
)
def test_a_weight_too_few_too_many_or_of_another_shape_is_an_error(
    copy: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    edit_weights(copy / name, change)
    with pytest.raises(ArtifactError) as caught:
        networks(copy)
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


@pytest.mark.parametrize("found", ["nothing", "no model_index.json"])
def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path, found: str) -> None:
    path = tmp_path / "x"
    if found != "nothing":
        path.mkdir()
    with pytest.raises(ArtifactError, match=f"diffusers checkpoint.*or a .safetensors file, found {found}"):
        open_checkpoint(path)


def test_a_file_that_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ArtifactError, match=r"x: expected a safetensors file.*got 0 bytes"):
        open_checkpoint(tmp_path / "x")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("StableDiffusion3Pipeline", " This is Stable Diffusion 3, a diffusion transformer."),
        ("FluxPipeline", " This is Flux, a diffusion transformer."),
        ("SomebodysPipeline", ""),
        (None, ""),
    ],
)
def test_other_pipelines_are_named_and_not_supported_yet(copy: Path, name: str | None, what: str) -> None:
    edit_json(copy / "model_index.json", _class_name=name)
    with pytest.raises(ConfigError, match=re.escape(f"got {name}.{what} It is not supported yet.")):
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
        networks(copy)
