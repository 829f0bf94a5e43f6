"""A picture does not change with the batch it is drawn in.

Bit for bit with ONNX Runtime on a CPU: its kernels compute every row of a call alone and add up in one order, whatever
the number of rows, their position and the number of threads (1.32 on x86-64; held to that below). Ours do too: NumPy
works element by element, each image has its own generator, prompts of different lengths are not padded to one another,
and the VAE takes one picture at a time. Libraries for GPUs choose kernels by shape and add up in another order in each:
there a picture may differ by rounding between batches, and in stochastic or guided runs by more than a level. Who
needs the very same bits there draws one picture a call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.runtime import OnnxSession, Pipeline
from latentrt.runtime.sampler_names import SAMPLERS

PROMPT = "a small red circle on a blue background"
SMALL: dict[str, Any] = {"height": 64, "width": 48}
PICTURE = np.random.default_rng(0).integers(0, 255, (64, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def ours(shapes_bundle: Path) -> Pipeline:
    return Pipeline.load(shapes_bundle, precision="fp32")


@pytest.mark.parametrize("name", [spec.label for spec in SAMPLERS if spec.space in ("vp", "ve") and spec.spacings])
def test_every_sampler(name: str, ours: Pipeline) -> None:
    """Those that draw noise, keep a history or threshold too."""
    settings = {"sampler": name, "steps": 3, "guidance": 1.0, **SMALL}
    together = ours(PROMPT, batch=3, seed=50, **settings)
    assert not np.array_equal(together.latents[0], together.latents[2])
    alone = ours(PROMPT, seed=52, **settings)
    np.testing.assert_array_equal(together.latents[2], alone.latents[0])
    np.testing.assert_array_equal(together.images[2], alone.images[0])


TASKS: dict[str, dict[str, Any]] = {
    "guided": {"guidance": 6.0},
    "rescaled": {"guidance": 6.0, "guidance_rescale": 0.7},
    "thresholded": {"sampler": "DPM++ 2M", "sampler_options": {"thresholding": True, "sample_max_value": 4.0}},
    "image": {"image": PICTURE, "strength": 0.7},
    "mask": {"image": PICTURE, "mask": np.eye(64, 48, dtype=np.float32)},
    "numpy": {"rng": "numpy"},
    "cuda": {"rng": "cuda"},
    "resized": {"resize_seed_from": (48, 48)},
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task(task: str, ours: Pipeline) -> None:
    settings = {"sampler": "Euler a", "steps": 3, **SMALL, **TASKS[task]}
    together = ours(PROMPT, batch=3, seed=50, **settings)
    for index in range(3):
        alone = ours(PROMPT, seed=50 + index, **settings)
        np.testing.assert_array_equal(together.latents[index], alone.latents[0])
        np.testing.assert_array_equal(together.images[index], alone.images[0])


def test_different_prompts(ours: Pipeline) -> None:
    """Of different lengths, a composition and a schedule among them."""
    prompts = [PROMPT, "a circle" + ", plain" * 80, "a red circle AND a blue star :0.6", "[a red circle:a star:0.5]"]
    together = ours(prompts, sampler="DPM++ 2M", steps=3, seed=50, **SMALL)
    for index, prompt in enumerate(prompts):
        alone = ours(prompt, sampler="DPM++ 2M", steps=3, seed=50 + index, **SMALL)
        np.testing.assert_array_equal(together.images[index], alone.images[0])


def test_half_precision(shapes_bundle: Path) -> None:
    half = Pipeline.load(shapes_bundle, precision="fp16")
    together = half(PROMPT, batch=3, seed=50, steps=2, sampler="Euler", **SMALL)
    alone = half(PROMPT, seed=51, steps=2, sampler="Euler", **SMALL)
    np.testing.assert_array_equal(together.latents[1], alone.latents[0])


@pytest.mark.parametrize("size", [(4, 4), (12, 10), (18, 34)])
def test_the_rows_of_onnx_runtime(size: tuple[int, int], shapes_bundle: Path) -> None:
    """The same bits alone, in a batch, at another position in it, and with more threads."""
    rng = np.random.default_rng(0)
    feeds: dict[str, NDArray[np.float32]] = {
        "sample": rng.standard_normal((5, 4, *size)).astype(np.float32),
        "timestep": np.full(5, 500, np.float32),
        "encoder_hidden_states": rng.standard_normal((5, 77, 64)).astype(np.float32),
    }
    path = shapes_bundle / "unet" / "model.onnx"
    one, many = OnnxSession(path, threads=1), OnnxSession(path, threads=3)
    whole = one(feeds)["out_sample"]
    np.testing.assert_array_equal(many(feeds)["out_sample"], whole)
    for index in range(5):
        row = {name: value[index : index + 1] for name, value in feeds.items()}
        np.testing.assert_array_equal(one(row)["out_sample"][0], whole[index])
        np.testing.assert_array_equal(many(row)["out_sample"][0], whole[index])
    turned = {name: value[::-1] for name, value in feeds.items()}
    np.testing.assert_array_equal(one(turned)["out_sample"][::-1], whole)
