"""Maps of U-Nets, ControlNets and VAEs: diffusers' converters, and models of the published sizes, are the oracles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ldm_layout
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)

from latentrt.export.ldm_names import controlnet_names, unet_names
from latentrt.export.ldm_vae import vae_config, vae_names, vae_structure, vae_weight
from latentrt.export.published_configs import published_configs
from latentrt.export.renaming import Renaming
from latentrt.export.unet_config import controlnet_config, unet_config
from latentrt.export.unet_structure import diffusers_structure, ldm_structure
from latentrt.export.weights import Weight, Weights, of_array
from latentrt.runtime.errors import ArtifactError, ConfigError

ORIGIN = Path("model.safetensors")
FAMILIES = ("sd1", "sd2", "sdxl", "refiner")
CONTROLNET_ONLY = ("out_channels", "up_block_types", "sample_size", "center_input_sample", "dual_cross_attention")


def arrays(state: ldm_layout.State) -> dict[str, Weight]:
    return {name: of_array(tensor.numpy()) for name, tensor in state.items()}


def renamed_unet(weights: Weights) -> dict[str, Weight]:
    names = unet_names(ldm_structure(weights, ORIGIN, goes_up=True))
    assert sorted(names.values()) == sorted(weights)
    return Renaming("", names).apply(weights)


def assert_same(found: Weights, expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(found[name].read(), tensor.numpy(), err_msg=name, strict=True)


def built_alike(part: str, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Hold a config to the expected one, both as diffusers completes them."""
    ours, theirs = (dict(ldm_layout.meta_model(part, options).config) for options in (config, expected))
    for completed in (ours, theirs):
        del completed["_use_default_values"]
    assert ours == theirs


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("sd1", {}),
        ("sd1", {"in_channels": 9}),
        ("sd1", {"in_channels": 8}),
        ("sd2", {}),
        ("sdxl", {}),
        ("sdxl", {"in_channels": 9}),
        ("refiner", {}),
    ],
)
def test_a_unet_keeps_its_weights_and_gets_its_config(family: str, options: dict[str, Any]) -> None:
    config = ldm_layout.configs(family, **options)["unet"]
    state = ldm_layout.model("unet", config).state_dict()
    original = ldm_layout.to_ldm("unet", state, config)
    theirs = convert_ldm_unet_checkpoint({f"model.diffusion_model.{n}": t for n, t in original.items()}, config)
    assert_same(arrays(theirs), state)
    own = renamed_unet(arrays(original))
    assert_same(own, state)
    structure = ldm_structure(arrays(original), ORIGIN, goes_up=True)
    assert unet_config(structure, own, published_configs(family)["unet"], ORIGIN) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_size_all_names_and_the_published_config_come_out(family: str) -> None:
    config = published_configs(family)["unet"]
    state = ldm_layout.meta_model("unet", config).state_dict()
    original = ldm_layout.shapes_only(ldm_layout.to_ldm("unet", state, config))
    own = renamed_unet(original)
    assert {name: weight.shape for name, weight in own.items()} == {n: tuple(t.shape) for n, t in state.items()}
    assert unet_config(ldm_structure(original, ORIGIN, goes_up=True), own, config, ORIGIN) == config


PRUNED: dict[str, tuple[str, dict[str, Any]]] = {
    # SSD-1B: fewer transformer blocks, differently on the way up, and none in the middle.
    "ssd_1b": (
        "sdxl",
        {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": [1, 2, 4],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        },
    ),
    # KOALA-700M: a residual block fewer in each level, no middle.
    "koala_700m": (
        "sdxl",
        {
            "layers_per_block": 1,
            "mid_block_type": None,
            "transformer_layers_per_block": [1, 2, 5],
        },
    ),
    # tiny-sd: the same for Stable Diffusion 1, with a level fewer.
    "tiny_sd": (
        "sd1",
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "layers_per_block": 1,
            "mid_block_type": None,
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        },
    ),
    "asymmetric_down": (
        "sdxl",
        {
            "transformer_layers_per_block": [1, [1, 2], 3],
            "reverse_transformer_layers_per_block": [3, [2, 2, 1], 1],
        },
    ),
    "one_level": (
        "sd1",
        {
            "block_out_channels": [320],
            "down_block_types": ["CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D"],
        },
    ),
}


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_unets_are_read_from_their_weights(name: str) -> None:
    family, options = PRUNED[name]
    published = published_configs(family)["unet"]
    config = {**published, **options}
    state = ldm_layout.meta_model("unet", config).state_dict()
    original = ldm_layout.shapes_only(ldm_layout.to_ldm("unet", state, config))
    own = renamed_unet(original)
    assert own.keys() == state.keys()
    found = unet_config(ldm_structure(original, ORIGIN, goes_up=True), own, published, ORIGIN)
    again = ldm_layout.meta_model("unet", found).state_dict()
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in state.items()}
    built_alike("unet", found, config)


def controlnet_config_of(family: str, *, narrow: bool) -> dict[str, Any]:
    unet = ldm_layout.configs(family)["unet"] if narrow else published_configs(family)["unet"]
    return {
        **{option: value for option, value in unet.items() if option not in CONTROLNET_ONLY},
        "_class_name": "ControlNetModel",
        "conditioning_embedding_out_channels": [16, 32, 96, 256],
    }


def controlnet_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those that ControlNetModel has: published U-Nets of SDXL have more, all at their defaults."""
    import inspect

    import diffusers

    known = inspect.signature(diffusers.ControlNetModel.__init__).parameters
    return {option: value for option, value in config.items() if option in known}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_controlnet_keeps_its_weights_and_gets_its_config(family: str, layout: str) -> None:
    config = controlnet_options(controlnet_config_of(family, narrow=True))
    state = ldm_layout.model("controlnet", config).state_dict()
    original = ldm_layout.to_ldm("controlnet", state, config)
    if family != "sdxl":  # of which diffusers converts no embedding
        assert_same(arrays(convert_controlnet_checkpoint(dict(original), config)), state)
    if layout == "original":
        weights = arrays(original)
        structure = ldm_structure(weights, ORIGIN, goes_up=False)
        names = controlnet_names(structure, hints=8)
        assert sorted(names.values()) == sorted(weights)
        own = Renaming("", names).apply(weights)
    else:
        own = arrays(state)
        structure = diffusers_structure(own, ORIGIN)
        assert controlnet_names(structure, hints=8).keys() == own.keys()
    assert_same(own, state)
    found = controlnet_config(structure, own, published_configs(family)["unet"], ORIGIN)
    built_alike("controlnet", found, config)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_at_full_size_a_controlnet_gets_all_names_and_its_config(family: str) -> None:
    config = controlnet_options(controlnet_config_of(family, narrow=False))
    state = ldm_layout.meta_model("controlnet", config).state_dict()
    weights = ldm_layout.shapes_only(ldm_layout.to_ldm("controlnet", state, config))
    structure = ldm_structure(weights, ORIGIN, goes_up=False)
    own = Renaming("", controlnet_names(structure, hints=8)).apply(weights)
    assert {name: weight.shape for name, weight in own.items()} == {n: tuple(t.shape) for n, t in state.items()}
    built_alike("controlnet", controlnet_config(structure, own, published_configs(family)["unet"], ORIGIN), config)


@pytest.mark.parametrize("square", [True, False])
def test_a_vae_keeps_its_weights_and_gets_its_config(square: bool) -> None:
    config = ldm_layout.configs("sd1")["vae"]
    state = ldm_layout.model("vae", config).state_dict()
    original = ldm_layout.to_ldm("vae", state, config)
    if not square:  # written by tools that have linear layers there
        original = {n: t[:, :, 0, 0] if ".attn_1." in n and t.ndim == 4 else t for n, t in original.items()}
    theirs = convert_ldm_vae_checkpoint({f"first_stage_model.{n}": t for n, t in original.items()}, config)
    assert_same(arrays(theirs), state)
    weights = arrays(original)
    structure = vae_structure(weights, ORIGIN)
    assert sorted(vae_names(structure).values()) == sorted(weights)
    own = Renaming("", vae_names(structure), vae_weight).apply(weights)
    assert_same(own, state)
    assert vae_config(structure, own, published_configs("sd1")["vae"], ORIGIN) == config


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_at_full_size_a_vae_gets_all_names_and_the_published_config(family: str) -> None:
    config = published_configs(family)["vae"]
    state = ldm_layout.meta_model("vae", config).state_dict()
    weights = ldm_layout.shapes_only(ldm_layout.to_ldm("vae", state, config))
    structure = vae_structure(weights, ORIGIN)
    own = Renaming("", vae_names(structure), vae_weight).apply(weights)
    assert {name: weight.shape for name, weight in own.items()} == {n: tuple(t.shape) for n, t in state.items()}
    assert vae_config(structure, own, config, ORIGIN) == config


def full_unet(family: str = "sd2") -> dict[str, Weight]:
    config = published_configs(family)["unet"]
    state = ldm_layout.meta_model("unet", config).state_dict()
    return ldm_layout.shapes_only(ldm_layout.to_ldm("unet", state, config))


def reshaped(weights: dict[str, Weight], name: str, shape: tuple[int, ...]) -> dict[str, Weight]:
    return {**weights, name: Weight(shape, weights[name].dtype, weights[name].read)}


def config_of(weights: Weights) -> dict[str, Any]:
    structure = ldm_structure(weights, ORIGIN, goes_up=True)
    own = Renaming("", unet_names(structure)).apply(weights)
    return unet_config(structure, own, published_configs("sd2")["unet"], ORIGIN)


def test_heads_that_weights_cannot_tell_are_asked_for() -> None:
    weights = full_unet()
    name = "input_blocks.1.0.out_layers.3.bias"
    with pytest.raises(ConfigError, match="multiples of 64 channels"):
        config_of(reshaped(weights, name, (330,)))


@pytest.mark.parametrize(
    ("drop", "said"),
    [
        ("middle_block.1.transformer_blocks.9.", "as many transformer blocks in the middle.* 10, got 9"),
        ("input_blocks.5.1.", r"all residual blocks of a level or none, got \(2, 0\)"),
        ("output_blocks.4.1.", r"all residual blocks of a level or none, got \(2, 0, 2\)"),
    ],
)
def test_attention_that_diffusers_cannot_place_is_named(drop: str, said: str) -> None:
    weights = {name: weight for name, weight in full_unet("sdxl").items() if not name.startswith(drop)}
    with pytest.raises(ConfigError, match=said):
        config_of(weights)


@pytest.mark.parametrize("shape", [(), (0,), (320, 3)])
def test_weights_of_a_shape_that_cannot_be_are_errors(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArtifactError, match=r"input_blocks\.1\.0\.out_layers\.3\.bias of 1 axes"):
        config_of(reshaped(full_unet(), "input_blocks.1.0.out_layers.3.bias", shape))


def test_numbers_of_any_size_in_names_take_no_time() -> None:
    weights = full_unet()
    weights |= {f"input_blocks.{10**12}.0.x": weights["out.0.bias"], "input_blocks.99.0.x": weights["out.0.bias"]}
    structure = ldm_structure(weights, ORIGIN, goes_up=True)
    assert sum(map(len, structure.down)) < 100
