from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.export.engine_memory import tensor_bytes
from latentrt.export.engine_profiles import (
    Range,
    ShapeRequest,
    largest_shapes,
    parse_range,
    parse_requests,
    parse_sizes,
    profiles_of,
)
from latentrt.runtime.engine_sidecar import ShapeProfile
from latentrt.runtime.errors import BuildError, ConfigError, UsageError
from latentrt.runtime.latents import vae_factor
from latentrt.runtime.specs import TensorSpec

SAMPLE = TensorSpec("sample", "float32", ("b", 4, "h", "w"))
TIMESTEP = TensorSpec("timestep", "float32", ("b",))
TEXT = TensorSpec("encoder_hidden_states", "float32", ("b", "n", 64))
REQUEST = ShapeRequest(Range(1, 4, 8), Range(64, 128, 256), Range(64, 192, 512), text_chunks=Range(1, 1, 3))


@pytest.mark.parametrize(
    ("text", "expected"), [("4", (4, 4, 4)), ("1..8", (1, 1, 8)), ("1..4..8", (1, 4, 8)), (" 2 .. 3 ", (2, 2, 3))]
)
def test_ranges(text: str, expected: tuple[int, int, int]) -> None:
    assert parse_range("batch", text) == Range(*expected)


@pytest.mark.parametrize("text", ["", "0", "8..1", "1..9..8", "1..2..3..4", "a", "1..", "-1", "1.5", "1...3", "²"])
def test_other_ranges_are_usage_errors_that_name_the_option(text: str) -> None:
    with pytest.raises(UsageError, match=r"^batch: expected"):
        parse_range("batch", text)


@pytest.mark.parametrize(
    ("text", "height", "width"),
    [
        ("512", (512, 512, 512), (512, 512, 512)),
        ("64..256", (64, 128, 256), (64, 128, 256)),
        ("256..512", (256, 512, 512), (256, 512, 512)),
        ("64..72..256", (64, 72, 256), (64, 72, 256)),
        ("512x768", (512, 512, 512), (768, 768, 768)),
        ("64..512x768", (64, 128, 512), (64, 128, 768)),
        ("64x128..256x256..512x768", (64, 256, 512), (128, 256, 768)),
    ],
)
def test_sizes_are_height_by_width_with_the_native_size_as_optimum(
    text: str, height: tuple[int, int, int], width: tuple[int, int, int]
) -> None:
    assert parse_sizes(text, factor=8, native=128) == (Range(*height), Range(*width))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("65", "multiples of 8, got 65. Nearest: 64 or 72"),
        ("4", "multiples of 8, got 4. Nearest: 8"),
        ("64..100", "got 100. Nearest: 96 or 104"),
        ("512x770", "got 770"),
        ("256..64", "rising"),
        ("512x", "expected sizes"),
        ("0", "expected sizes"),
        ("big", "expected sizes"),
        ("8..8..8..8", "expected 512"),
    ],
)
def test_other_sizes_are_usage_errors(text: str, said: str) -> None:
    with pytest.raises(UsageError, match="size") as caught:
        parse_sizes(text, factor=8)
    assert said in str(caught.value)


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9), st.integers(1, 64))
def test_every_rising_range_of_multiples_is_taken_as_it_is(low: int, more: int, still: int, factor: int) -> None:
    sizes = [low * factor, (low + more) * factor, (low + more + still) * factor]
    assert parse_sizes("..".join(map(str, sizes)), factor=factor) == (Range(*sizes), Range(*sizes))


def shapes_of(component: str, inputs: Sequence[TensorSpec], *requests: ShapeRequest) -> list[dict[str, Any]]:
    """The profiles, a static input's three shapes given once."""
    profiles = profiles_of(component, inputs, requests, factor=8)
    return [
        {name: p.max if p.min == p.max else (p.min, p.opt, p.max) for name, p in profile.items()}
        for profile in profiles
    ]


def static(batch: int, height: int, width: int | None = None) -> ShapeRequest:
    images, tall, wide = (Range(*[size] * 3) for size in (batch, height, height if width is None else width))
    return ShapeRequest(images, tall, wide)


def test_commas_list_buckets_and_every_combination_is_a_request() -> None:
    requests = parse_requests(size="512,768x512", batch="1,2..4", text_chunks="1", factor=8)
    assert requests == (
        static(1, 512),
        replace(static(2, 512), batch=Range(2, 2, 4)),
        static(1, 768, 512),
        replace(static(2, 768, 512), batch=Range(2, 2, 4)),
    )
    assert parse_requests(size="512,512", batch="1", text_chunks="1,2", factor=8) == (
        static(1, 512),
        replace(static(1, 512), text_chunks=Range(2, 2, 2)),
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": "1,,2"}, "batch: expected a number"),
        ({"batch": "1,x"}, "batch: expected whole numbers such as 1,2,4"),
        ({"size": "512,"}, "size: expected 512"),
        ({"size": "512,500"}, "size: expected multiples of 8, got 500"),
        ({"text_chunks": "0"}, "text-chunks: expected rising"),
    ],
)
def test_a_bad_part_of_a_list_names_its_option(changes: dict[str, str], said: str) -> None:
    options: dict[str, Any] = {"size": "512", "batch": "1", "text_chunks": "1", "factor": 8, **changes}
    with pytest.raises(UsageError, match=said):
        parse_requests(**options)


def rows_of(guidance: str, *batches: int, inputs: Sequence[TensorSpec] = (SAMPLE, TIMESTEP, TEXT)) -> list[Any]:
    requests = [replace(static(batch, 64), guidance=guidance) for batch in batches]
    shapes = [profile["timestep"] for profile in profiles_of("unet", inputs, requests, factor=8)]
    return [(shape.min[0], shape.opt[0], shape.max[0]) for shape in shapes]


def test_a_bucket_of_images_serves_guidance_on_and_off_or_what_it_is_told() -> None:
    assert rows_of("both", 1, 2, 4) == [(1, 2, 2), (2, 4, 4), (4, 8, 8)]
    assert rows_of("on", 1, 2, 4) == [(2, 2, 2), (4, 4, 4), (8, 8, 8)]
    assert rows_of("off", 1, 2, 2) == [(1, 1, 1), (2, 2, 2)]
    with pytest.raises(UsageError, match="guidance: expected both, on or off, got 'yes'"):
        parse_requests(size="64", batch="1", text_chunks="1", factor=8, guidance="yes")
    (request,) = parse_requests(size="64x128", batch="1", text_chunks="1", factor=8, guidance="on")
    assert shapes_of("unet", (SAMPLE, TIMESTEP, TEXT), request) == [
        {"sample": (2, 4, 8, 16), "timestep": (2,), "encoder_hidden_states": (2, 77, 64)}
    ]


def test_a_range_is_one_profile_of_rows_without_guidance_up_to_those_with_it() -> None:
    (profile,) = profiles_of("unet", (SAMPLE, TIMESTEP, TEXT), (REQUEST,), factor=8)
    assert profile == {
        "sample": ShapeProfile((1, 4, 8, 8), (8, 4, 16, 24), (16, 4, 32, 64)),
        "timestep": ShapeProfile((1,), (8,), (16,)),
        "encoder_hidden_states": ShapeProfile((1, 77, 64), (8, 77, 64), (16, 231, 64)),
    }


def test_a_model_that_is_told_the_guidance_runs_each_image_once() -> None:
    told = (SAMPLE, TIMESTEP, TEXT, TensorSpec("timestep_cond", "float32", ("batch", 256)))
    assert rows_of("both", 1, 3, inputs=told) == rows_of("on", 1, 3, inputs=told) == [(1, 1, 1), (3, 3, 3)]


def test_a_model_that_edits_pictures_runs_each_image_three_times() -> None:
    editing = (TensorSpec("sample", "float32", ("b", 8, "h", "w")), TIMESTEP)
    assert rows_of("both", 2, inputs=editing) == [(2, 6, 6)]


def test_sdxl_conditions_have_rows_and_fixed_features() -> None:
    inputs = (SAMPLE, TensorSpec("text_embeds", "float32", ("b", 1280)), TensorSpec("time_ids", "float32", ("b", 6)))
    (profile,) = profiles_of("unet", inputs, (REQUEST,), factor=8)
    assert profile["text_embeds"] == ShapeProfile((1, 1280), (8, 1280), (16, 1280))
    assert profile["time_ids"].max == (16, 6)


def test_residuals_follow_their_level_and_halve_upwards() -> None:
    inputs = (
        SAMPLE,
        TensorSpec("down_block_additional_residual_0", "float32", ("b", 320, "latent_height", "latent_width")),
        TensorSpec("down_block_additional_residual_9", "float32", ("b", 1280, "latent_height_4", "latent_width_4")),
        TensorSpec("mid_block_additional_residual", "float32", ("b", 1280, "latent_height_8", "latent_width_8")),
    )
    profile = shapes_of("unet_control", inputs, replace(static(1, 520, 512), guidance="on"))[0]
    assert list(profile.values()) == [(2, 4, 65, 64), (2, 320, 65, 64), (2, 1280, 17, 16), (2, 1280, 9, 8)]


def test_controlnets_take_pictures_beside_latents() -> None:
    picture = TensorSpec("controlnet_cond", "float32", ("b", 3, "height", "width"))
    strength = TensorSpec("conditioning_scale", "float32", ("b",))
    profile = shapes_of("controlnet_2", (SAMPLE, picture, strength), replace(static(1, 64, 128), guidance="on"))[0]
    assert profile == {
        "sample": (2, 4, 8, 16),
        "controlnet_cond": (2, 3, 64, 128),
        "conditioning_scale": (2,),
    }


def test_the_two_graphs_of_a_split_unet_share_rows_and_text() -> None:
    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.key"
    cached = (SAMPLE, TIMESTEP, TensorSpec(key, "float16", ("b", "n", 320)))
    longer = replace(static(1, 64), text_chunks=Range(1, 1, 2), guidance="on")
    assert shapes_of("unet_cached", cached, longer)[0][key] == ((2, 77, 320), (2, 77, 320), (2, 154, 320))
    assert shapes_of("unet_prompt", (TEXT,), static(1, 64)) == [
        {"encoder_hidden_states": ((1, 77, 64), (2, 77, 64), (2, 77, 64))}
    ]


@pytest.mark.parametrize("width", ["n", 77])
def test_text_encoders_run_one_prompt_whatever_is_asked_for(width: int | str) -> None:
    ids = TensorSpec("input_ids", "int64", ("b", width))
    assert shapes_of("text_encoder_2", (ids,), REQUEST, static(4, 512), static(1, 64)) == [{"input_ids": (1, 77)}]


def test_the_vae_runs_one_picture_and_larger_ones_in_tiles() -> None:
    latent = TensorSpec("latent_sample", "float32", ("b", 4, "h", "w"))
    picture = TensorSpec("sample", "float32", ("b", 3, "h", "w"))
    (profile,) = profiles_of("vae_decoder", (latent,), (REQUEST,), factor=8)
    assert profile["latent_sample"] == ShapeProfile((1, 4, 8, 8), (1, 4, 16, 24), (1, 4, 32, 64))
    sizes = (static(4, 64, 128), static(1, 64, 128), static(1, 1024), static(1, 1536), static(1, 2048, 256))
    assert [profile["latent_sample"] for profile in shapes_of("vae_decoder_uint8", (latent,), *sizes)] == [
        (1, 4, 8, 16),
        (1, 4, 128, 128),
        (1, 4, 64, 64),
        (1, 4, 256, 32),
    ]
    assert shapes_of("vae_encoder", (picture,), static(2, 1536)) == [{"sample": (1, 3, 512, 512)}]
    assert shapes_of("taesd_decoder", (latent,), static(2, 1536)) == [{"latent_sample": (1, 4, 192, 192)}]


def test_the_safety_checker_takes_all_pictures_of_its_own_size() -> None:
    inputs = (TensorSpec("clip_input", "float32", ("batch", 3, 224, 224)),)
    assert shapes_of("safety_checker", inputs, static(2, 512)) == [{"clip_input": (2, 3, 224, 224)}]


def test_a_graph_with_a_fixed_size_refuses_a_range() -> None:
    fixed = TensorSpec("sample", "float32", ("b", 4, 16, 16))
    with pytest.raises(UsageError, match=r"unet\.sample: expected sizes 8\.\.32 on axis 2, and the graph fixes 16"):
        profiles_of("unet", (fixed,), (REQUEST,), factor=8)


def test_an_input_that_no_rule_knows_is_named() -> None:
    with pytest.raises(BuildError, match=r"unet\.mask: .* axis 2"):
        profiles_of("unet", (TensorSpec("mask", "float32", ("b", 320, "h", "w")),), (REQUEST,), factor=8)


@pytest.mark.parametrize(("blocks", "factor"), [([1], 1), ([1, 2], 2), ([1, 2, 3, 4], 8)])
def test_the_vae_halves_between_blocks(blocks: list[int], factor: int) -> None:
    assert vae_factor({"block_out_channels": blocks}) == factor


def test_a_vae_without_blocks_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="block_out_channels"):
        vae_factor({})


def test_tensor_bytes_are_those_of_the_largest_profile() -> None:
    latent = TensorSpec("latent_sample", "float32", ("b", 4, "h", "w"))
    picture = TensorSpec("sample", "uint8", ("b", "8*h", "w * 8", 3))
    small, large = ({"latent_sample": ShapeProfile(*[(rows, 4, 8, 16)] * 3)} for rows in (1, 2))
    assert tensor_bytes((latent,), (picture,), (large, small)) == 2 * 4 * 8 * 16 * 4 + 2 * 64 * 128 * 3
    parameters = TensorSpec("latent_parameters", "float16", ("b", 8, "h / 4", "w / 8"))
    assert tensor_bytes((latent,), (parameters,), (large,)) == 2 * 4 * 8 * 16 * 4 + 2 * 8 * 2 * 2 * 2
    residual = TensorSpec("down_block_res_sample_9", "float32", ("b", 2, "h_3", "w_16"))
    assert tensor_bytes((latent,), (residual,), (large,)) == 4096 + 2 * 2 * 3 * 1 * 4
    unknown = TensorSpec("sample", "uint8", ("b", "8*h + 1", "8*w", 3))
    assert tensor_bytes((latent,), (unknown,), (large,)) is None


def test_the_largest_shapes_are_those_of_all_profiles_side_by_side() -> None:
    profiles = profiles_of("unet", (SAMPLE, TEXT), (static(1, 64, 256), static(2, 128, 64)), factor=8)
    assert largest_shapes(profiles) == {"sample": (4, 4, 16, 32), "encoder_hidden_states": (4, 77, 64)}
