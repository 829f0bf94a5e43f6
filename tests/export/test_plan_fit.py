from __future__ import annotations

import re

import pytest

from latentrt.export.build_options import BuildOptions
from latentrt.export.plan_cards import Card, card_of, parse_card, sizes_in_trade
from latentrt.export.plan_fit import fits_on, ways_to_fit
from latentrt.runtime.errors import UsageError
from latentrt.runtime.machine import Gpu
from latentrt.runtime.residency_plan import ComponentMemory


@pytest.mark.parametrize(
    ("text", "memory"),
    [
        ("8GB", 8 * 10**9),
        ("8 GiB", 8 << 30),
        ("7800MiB", 7800 << 20),
        ("RTX 4060", 8 << 30),
        ("nvidia geforce rtx-4060", 8 << 30),
        ("RTX 4060 Ti 16GB", 16 << 30),
    ],
)
def test_a_card_is_a_size_or_a_name(text: str, memory: int) -> None:
    assert parse_card(text).memory == memory


@pytest.mark.parametrize("text", ["", "8", "-8GB", "0GB", "RTX 4061", "GB", "nanGB"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^vram: expected"):
        parse_card(text)


def test_what_cuda_takes_grows_with_the_multiprocessors() -> None:
    # 3 MiB each, and 128 MiB: 34 of them on an RTX 4060 Ti, 188 on an RTX PRO 6000.
    assert parse_card("RTX 4060 Ti").context_bytes == (34 * 3 + 128) << 20
    assert parse_card("RTX PRO 6000").context_bytes == (188 * 3 + 128) << 20
    known = card_of(Gpu("NVIDIA GeForce RTX 3090", "sm86", 25_300_000_000))
    assert (known.multiprocessors, known.memory, known.sm) == (82, 25_300_000_000, "sm86")
    contexts = [card.context_bytes for card in sizes_in_trade()]
    assert contexts == sorted(contexts)


def memory_of(options: BuildOptions) -> list[ComponentMemory]:
    """Of every 64 x 64 pixels a U-Net that takes 3000 bytes an image, and a decoder that takes 10 000."""
    sides = [int(side) for side in (options.size or "512").split("x")]
    area = sides[0] * sides[-1] // 64**2
    unet = ComponentMemory("unet", 50_000, int(options.batch) * area * 3_000, 0, least_weights=1_000)
    parts = [unet, ComponentMemory("vae_decoder", 5_000, area * 10_000, 0)]
    return [part for part in parts if options.components is None or part.name in options.components]


def ways(memory: int, *, size: str, batch: int) -> dict[str, tuple[str, int]]:
    """What to do: the policy with that, and what is left of the memory."""
    options = BuildOptions(size=size, batch=str(batch))
    card = Card("card", memory + Card("", 0, 0).context_bytes, 0)
    assert all(fit.spare < 0 for fit in fits_on(card, memory_of(options)))
    sides = [int(side) for side in size.split("x")]
    found = ways_to_fit(card, options, (batch, sides[0], sides[-1]), memory_of)
    return {re.sub(r" \(latentrt.*\)", "", way.what): (way.fit.residency.policy, way.fit.spare) for way in found}


def test_a_large_decoder_wants_tiles_or_smaller_pictures() -> None:
    # The U-Net takes 2304 thousand, the decoder 2560, and all weights 55. Tiles of 512 take 640.
    assert ways(2_500_000, size="1024", batch=3) == {
        "VAE tiles": ("all", 2_500_000 - 2_304_000 - 55_000),
        "--size 896": ("all", 2_500_000 - 1_960_000 - 55_000),
    }


def test_a_large_unet_wants_fewer_images_or_smaller_pictures() -> None:
    # Four images take 768 thousand and the decoder 640; three take 576. Pictures of 512 are no larger than a tile.
    assert ways(700_000, size="512", batch=4) == {
        "--batch 3": ("all", 700_000 - 640_000 - 55_000),
        "--size 448": ("all", 700_000 - 588_000 - 55_000),
    }


def test_sides_keep_their_proportion_and_the_policy_that_fits_is_named() -> None:
    assert ways(1_800_000, size="1024x512", batch=6) == {
        "--batch 4": ("all", 1_800_000 - 1_536_000 - 55_000),
        "--size 896x448": ("stream", 0),
    }


def test_tiles_and_fewer_images_are_tried_together_where_neither_does_alone() -> None:
    # Of 100 images none of the sizes helps, and one image has a decoder of 2560 thousand without tiles.
    assert ways(1_000_000, size="1024", batch=100) == {"--batch 1 and VAE tiles": ("all", 1_000_000 - 768_000 - 55_000)}


def test_where_nothing_helps_there_is_no_way() -> None:
    assert ways(1_000, size="1024", batch=2) == {}
