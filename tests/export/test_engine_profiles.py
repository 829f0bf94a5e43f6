import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.export.engine_memory import tensor_bytes
from latentrt.export.engine_profiles import (
    Range,
    ShapeRequest,
    parse_range,
    parse_sizes,
    profile_of,
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


def test_unet_rows_are_images_without_guidance_up_to_twice_the_images_with_it() -> None:
    profiles = profile_of("unet", (SAMPLE, TIMESTEP, TEXT), REQUEST, factor=8)
    assert profiles == {
        "sample": ShapeProfile((1, 4, 8, 8), (8, 4, 16, 24), (16, 4, 32, 64)),
        "timestep": ShapeProfile((1,), (8,), (16,)),
        "encoder_hidden_states": ShapeProfile((1, 77, 64), (8, 77, 64), (16, 231, 64)),
    }


def test_sdxl_conditions_have_rows_and_fixed_features() -> None:
    inputs = (
        SAMPLE,
        TensorSpec("text_embeds", "float32", ("b", 1280)),
        TensorSpec("time_ids", "float32", ("b", 6)),
    )
    profiles = profile_of("unet", inputs, REQUEST, factor=8)
    assert profiles["text_embeds"] == ShapeProfile((1, 1280), (8, 1280), (16, 1280))
    assert profiles["time_ids"].max == (16, 6)


@pytest.mark.parametrize(
    ("component", "tensor", "expected"),
    [
        ("text_encoder", TensorSpec("input_ids", "int64", ("b", "n")), ((1, 77), (8, 77), (48, 77))),
        ("text_encoder", TensorSpec("input_ids", "int64", ("b", 77)), ((1, 77), (8, 77), (48, 77))),
        ("text_encoder_2", TensorSpec("input_ids", "int64", ("b", 77)), ((1, 77), (8, 77), (48, 77))),
        (
            "vae_decoder",
            TensorSpec("latent_sample", "float32", ("b", 4, "h", "w")),
            ((1, 4, 8, 8), (4, 4, 16, 24), (8, 4, 32, 64)),
        ),
        (
            "vae_encoder",
            TensorSpec("sample", "float32", ("b", 3, "h", "w")),
            ((1, 3, 64, 64), (4, 3, 128, 192), (8, 3, 256, 512)),
        ),
    ],
)
def test_profiles_of_the_other_components(
    component: str, tensor: TensorSpec, expected: tuple[tuple[int, ...], ...]
) -> None:
    assert profile_of(component, (tensor,), REQUEST, factor=8) == {tensor.name: ShapeProfile(*expected)}


def test_a_graph_with_a_fixed_size_refuses_a_range() -> None:
    fixed = TensorSpec("sample", "float32", ("b", 4, 16, 16))
    with pytest.raises(UsageError, match=r"unet\.sample: expected sizes 8\.\.32 on axis 2, and the graph fixes 16"):
        profile_of("unet", (fixed,), REQUEST, factor=8)


def test_an_input_that_no_rule_knows_is_named() -> None:
    with pytest.raises(BuildError, match=r"unet\.residual: .* axis 2"):
        profile_of("unet", (TensorSpec("residual", "float32", ("b", 320, "h", "w")),), REQUEST, factor=8)


@pytest.mark.parametrize(("blocks", "factor"), [([1], 1), ([1, 2], 2), ([1, 2, 3, 4], 8)])
def test_the_vae_halves_between_blocks(blocks: list[int], factor: int) -> None:
    assert vae_factor({"block_out_channels": blocks}) == factor


def test_a_vae_without_blocks_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="block_out_channels"):
        vae_factor({})


def test_tensor_bytes_follow_names_and_multiples_of_them() -> None:
    latent = TensorSpec("latent_sample", "float32", ("b", 4, "h", "w"))
    picture = TensorSpec("sample", "uint8", ("b", "8*h", "w * 8", 3))
    profiles = {"latent_sample": ShapeProfile((1, 4, 8, 8), (1, 4, 8, 8), (2, 4, 8, 16))}
    assert tensor_bytes((latent,), (picture,), profiles, {}) == 2 * 4 * 8 * 16 * 4 + 2 * 64 * 128 * 3
    parameters = TensorSpec("latent_parameters", "float16", ("b", 8, "h / 4", "w / 8"))
    assert tensor_bytes((latent,), (parameters,), profiles, {}) == 2 * 4 * 8 * 16 * 4 + 2 * 8 * 2 * 2 * 2
    unknown = TensorSpec("sample", "uint8", ("b", "8*h + 1", "8*w", 3))
    assert tensor_bytes((latent,), (unknown,), profiles, {}) is None
    named = TensorSpec("sample", "uint8", ("b", "height", "width", 3))
    assert tensor_bytes((latent,), (named,), profiles, {"height": 64, "width": 128}) == 4096 + 49152
