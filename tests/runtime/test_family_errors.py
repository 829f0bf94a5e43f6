"""Requests that a bundle cannot serve: one clear message each, before anything is drawn."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_oracle import PROMPT, rectangle, square
from task_oracle import watched

from latentrt.runtime import Control, Pipeline, UsageError, base_and_refiner
from latentrt.runtime.text_encoding import Embeddings

Bundles = Callable[[str], Path]


@pytest.fixture(scope="module")
def pipelines(family_bundle: Bundles) -> dict[str, Pipeline]:
    """By family."""
    names = ("sd15", "sd15_inpaint", "instruct_pix2pix", "sdxl_base", "sdxl_refiner")
    return {name: Pipeline.load(family_bundle(name)) for name in names}


def hidden(width: int, tokens: int = 77) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Embeddings of a text."""
    return np.ones((tokens, width), np.float32)


CASES: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "no ControlNet": ("sd15", PROMPT, {"controls": [Control(image=square())]}, r"expected controlnet, .*--controlnet"),
    "no mask": ("sd15_inpaint", PROMPT, {"image": square()}, r"^mask: expected one for this inpainting checkpoint"),
    "neither": ("sd15_inpaint", PROMPT, {}, r"^image: expected a mask and an image for this inpainting checkpoint"),
    "no image": ("instruct_pix2pix", PROMPT, {}, r"^image: expected an image for this editing checkpoint"),
    "a mask to edit": (
        "instruct_pix2pix", PROMPT, {"image": square(), "mask": rectangle()},
        r"^mask: expected none for this editing checkpoint",
    ),
    "a strength to edit": (
        "instruct_pix2pix", PROMPT, {"image": square(), "strength": 0.5},
        r"^strength: expected none for this editing checkpoint",
    ),
    "embeddings of another width": (
        "sd15", Embeddings(hidden(64)), {}, r"^embeddings.hidden: expected width 32, got 64",
    ),
    "a negative of another width": (
        "sd15", PROMPT, {"negative_prompt": Embeddings(hidden(64))}, r"^embeddings.hidden: expected width 32, got 64",
    ),
    "half a chunk": (
        "sd15", Embeddings(hidden(32, 100)), {}, r"^embeddings.hidden: expected a multiple of 77 tokens, got 100",
    ),
    "no tokens to speak of": (
        "sd15", Embeddings(hidden(32, 5)), {}, r"^embeddings.hidden: expected a multiple of 77 tokens, got 5",
    ),
    "nothing pooled": (
        "sdxl_base", Embeddings(hidden(64)), {}, r"^embeddings.pooled: expected shape \(32,\) for this U-Net, got None",
    ),
    "pooled of another width": (
        "sdxl_base", Embeddings(hidden(64), hidden(8)[0]), {}, r"^embeddings.pooled: expected shape \(32,\) .*\(8,\)",
    ),
    "the base's embeddings": (
        "sdxl_refiner", Embeddings(hidden(64), hidden(32)[0]), {"image": square()}, r"expected width 32, got 64",
    ),
    "latents of another size": (
        "sd15", PROMPT, {"latents": np.zeros((1, 4, 8, 9), np.float32), "width": 64},
        r"^latents: expected finite numbers of shape \(1, 4, 8, 8\), got shape \(1, 4, 8, 9\)",
    ),
    "a control that ends before it starts": (
        "sd15", PROMPT, {"controls": [Control(image=square(), start=0.7, end=0.2)]}, r"^control: expected rising",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit(name: str, pipelines: dict[str, Pipeline]) -> None:
    family, prompt, settings, message = CASES[name]
    with watched(pipelines[family], "unet") as unet, pytest.raises(UsageError, match=message):
        pipelines[family](prompt, steps=2, **settings)
    assert unet.feeds == []


def test_without_the_encoder(family_bundle: Bundles, tmp_path: Path) -> None:
    """Text to image works; an image names what is missing."""
    folder = tmp_path / "bundle"
    shutil.copytree(family_bundle("sd15"), folder, ignore=shutil.ignore_patterns("vae_encoder", "manifest.json"))
    pipe = Pipeline.load(folder)
    assert pipe(PROMPT, steps=1).images.shape == (1, 64, 64, 3)
    with pytest.raises(UsageError, match=r"expected vae_encoder, found .*unet.*Export the checkpoint again"):
        pipe(PROMPT, image=square(), steps=2)


def test_a_refiner_without_a_base(pipelines: dict[str, Pipeline]) -> None:
    with pytest.raises(UsageError, match=r"^latents: expected another run's beside denoising_start"):
        pipelines["sdxl_refiner"](PROMPT, steps=5, denoising_start=0.8)
    with pytest.raises(UsageError, match=r"expected a share of the noise levels with a step in it"):
        base_and_refiner(pipelines["sdxl_base"], pipelines["sdxl_refiner"], PROMPT, steps=2, switch=0.999)
