"""Maps of text encoders: diffusers' converters, and models of the published sizes, are the oracles."""

from __future__ import annotations

from pathlib import Path

import ldm_layout
import numpy as np
import pytest
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

from latentrt.export.clip_names import clip_config, clip_layers, clip_names, open_clip_names, open_clip_weight
from latentrt.export.published_configs import published_configs
from latentrt.export.renaming import Renaming
from latentrt.export.weights import of_array
from latentrt.runtime.errors import ArtifactError

ORIGIN = Path("model.safetensors")
OPEN_CLIP = [("sd2", "text_encoder"), ("sdxl", "text_encoder_2"), ("refiner", "text_encoder_2")]


@pytest.mark.parametrize("wrapped", [True, False])
def test_openais_encoder_keeps_its_weights(wrapped: bool) -> None:
    config = ldm_layout.configs("sd1")["text_encoder"]
    state = ldm_layout.state_of("text_encoder", ldm_layout.model("text_encoder", config))
    prefix = "cond_stage_model.transformer."
    theirs = convert_ldm_clip_checkpoint({prefix + name: tensor for name, tensor in state.items()})
    assert theirs.keys() == state.keys()
    in_file = {name if wrapped else name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    weights = {name: of_array(tensor.numpy()) for name, tensor in in_file.items()}
    names = clip_names(clip_layers(weights), wrapped=wrapped)
    assert sorted(names.values()) == sorted(weights)
    own = Renaming("", names).apply(weights)
    assert own.keys() == state.keys()
    for name, tensor in state.items():
        np.testing.assert_array_equal(own[name].read(), tensor.numpy(), err_msg=name, strict=True)
    assert clip_config(3, own, published_configs("sd1")["text_encoder"], ORIGIN) == config


@pytest.mark.parametrize(("family", "part"), OPEN_CLIP)
def test_open_clips_encoder_keeps_its_weights(family: str, part: str) -> None:
    config = ldm_layout.configs(family)[part]
    model = ldm_layout.model(part, config)
    state = ldm_layout.state_of(part, model)
    original = ldm_layout.to_ldm(part, state, config, open_clip=True)
    theirs = convert_open_clip_checkpoint(model, dict(original), prefix="")
    assert theirs.keys() == state.keys()
    weights = {name: of_array(tensor.numpy()) for name, tensor in original.items()}
    names = open_clip_names(clip_layers(weights), projected=part == "text_encoder_2")
    assert set(names.values()) == weights.keys()
    own = Renaming("", names, open_clip_weight).apply(weights)
    assert own.keys() == state.keys()
    for name, tensor in state.items():
        assert own[name].shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(theirs[name].numpy(), tensor.numpy(), err_msg=name, strict=True)
        np.testing.assert_array_equal(own[name].read(), tensor.numpy(), err_msg=name, strict=True)
    assert clip_config(clip_layers(weights), own, published_configs(family)[part], ORIGIN) == config


@pytest.mark.parametrize(("family", "part"), [("sd1", "text_encoder"), ("sdxl", "text_encoder"), *OPEN_CLIP])
def test_at_full_size_all_names_and_the_published_config_come_out(family: str, part: str) -> None:
    config = published_configs(family)[part]
    state = ldm_layout.state_of(part, ldm_layout.meta_model(part, config))
    open_clip = (family, part) in OPEN_CLIP
    weights = ldm_layout.shapes_only(ldm_layout.to_ldm(part, state, config, open_clip=open_clip))
    layers = clip_layers(weights)
    if open_clip:
        renaming = Renaming("", open_clip_names(layers, projected=part == "text_encoder_2"), open_clip_weight)
    else:
        renaming = Renaming("", clip_names(layers, wrapped=True))
    own = renaming.apply(weights)
    assert {name: weight.shape for name, weight in own.items()} == {n: tuple(t.shape) for n, t in state.items()}
    assert clip_config(layers, own, config, ORIGIN) == config


def test_an_encoder_without_tokens_is_an_error() -> None:
    with pytest.raises(ArtifactError, match=r"token_embedding\.weight of 2 axes, found none"):
        clip_config(3, {}, published_configs("sd1")["text_encoder"], ORIGIN)
