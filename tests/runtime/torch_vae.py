"""The shapes VAE as sessions that run in PyTorch, for comparisons with diffusers on the same operators."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray

from latentrt.runtime.specs import Array, ModelSpec

SHAPES = Path(__file__).parents[2] / "examples" / "shapes"
Floats = NDArray[np.float32]


class TorchSession:
    """A session around a function of one tensor."""

    backend = "torch"

    def __init__(self, name: str, output: str, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.spec = ModelSpec(name, (), ())
        self.shapes: list[tuple[int, ...]] = []
        self._output, self._run = output, run

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Any]:
        (value,) = feeds.values()
        self.shapes.append(value.shape)
        with torch.no_grad():
            return {self._output: self._run(torch.from_numpy(value)).numpy()}

    def close(self) -> None:
        """Nothing to give back."""


@cache
def shapes_vae() -> Any:
    return AutoencoderKL.from_pretrained(SHAPES / "vae").eval()


def decoder() -> TorchSession:
    return TorchSession("vae_decoder", "sample", lambda z: shapes_vae().decode(z, return_dict=False)[0])


def encoder() -> TorchSession:
    return TorchSession("vae_encoder", "latent_parameters", lambda x: shapes_vae()._encode(x))


def scene_pictures(count: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """Pictures (n, 128, 128, 3) of the kind the VAE was trained on."""
    if str(SHAPES) not in sys.path:
        sys.path.insert(0, str(SHAPES))
    from scenes import draw, random_scene

    rng = np.random.default_rng(seed)
    return np.stack([np.asarray(draw(random_scene(rng), rng)) for _ in range(count)])
