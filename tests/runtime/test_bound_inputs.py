"""Inputs that stay where they are: who promises it, and what is made of the promise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latentrt.runtime.bound_inputs import HeldInputs, freeze, is_frozen
from latentrt.runtime.conditioning import Conditioning
from latentrt.runtime.model_facts import ModelFacts
from latentrt.runtime.request import Request
from latentrt.runtime.text_encoding import Embeddings


def test_frozen_is_what_nothing_can_change() -> None:
    array = np.arange(6.0)
    assert not is_frozen(array)
    view = array[2:]
    view.flags.writeable = False
    assert not is_frozen(view), "the array behind it can be written"
    assert not is_frozen(np.broadcast_to(array, (2, 6)))
    assert freeze(array) is array
    assert is_frozen(array)
    assert is_frozen(view)
    assert is_frozen(np.frombuffer(b"12345678"))


def test_only_the_very_same_frozen_array_is_held() -> None:
    held, text, latents = HeldInputs(), freeze(np.ones(3)), np.ones(3)
    feeds = {"text": text, "sample": latents}
    assert held.stale(feeds) == feeds
    for name, array in feeds.items():
        held.copied(name, array)
    assert held.stale(feeds).keys() == {"sample"}
    assert held.stale({"text": freeze(text.copy())}).keys() == {"text"}
    held.copied("text", latents)
    assert held.stale(feeds).keys() == {"text", "sample"}, "the buffer holds something else now"
    held.copied("text", text)
    held.forget()
    assert held.stale(feeds).keys() == {"text", "sample"}


class Encoder:
    """Gives every text the same embeddings, of 77 tokens."""

    encoders = (SimpleNamespace(tokenizer=SimpleNamespace(length=77)),)

    def chunk_count(self, text: str, *, text_2: str | None = None) -> int:
        return 1

    def __call__(self, text: str, **_: Any) -> Embeddings:
        return Embeddings(np.full((77, 8), len(text), np.float32), np.ones(4, np.float32))


@pytest.mark.parametrize("guided", [True, False])
def test_a_unet_is_told_the_same_arrays_at_every_step(guided: bool) -> None:
    """Text, pooled text and sizes, as SDXL takes them."""
    facts = ModelFacts(
        latent_channels=4,
        unet_channels=4,
        vae_factor=8,
        scaling_factor=0.13025,
        shift_factor=0.0,
        latents_mean=None,
        latents_std=None,
        default_size=1024,
        time_ids=6,
        time_cond_width=0,
        zero_negative=True,
    )
    encoder: Any = Encoder()
    told = Conditioning(encoder, Request(prompt="red"), facts, steps=4, size=(64, 64), guided=True)
    (first,) = told.at(0, guided=guided)
    for position in range(1, 4):
        (rows,) = told.at(position, guided=guided)
        for name in ("hidden", "text_embeds", "time_ids"):
            array = getattr(rows, name)
            assert array is getattr(first, name)
            assert is_frozen(array)
            assert len(array) == (2 if guided else 1)
