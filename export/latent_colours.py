"""The linear map from latents to colours that previews use, fitted to a checkpoint's own VAE."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentrt.runtime.latent_preview import LatentRgb, fit_latent_rgb

PATCHWORKS = 12
SIDE_IN_LATENTS = 8


def fit_colours(vae: Any) -> LatentRgb:
    """Fit on what the VAE's encoder makes of patchworks of plain colours.

    They cover the colours evenly. The few pictures that an export samples do not: a map fitted to two of them gave
    previews of others a correlation of 0.69 on the shapes checkpoint, one fitted to these 0.76.

    Args:
        vae: an `AutoencoderKL` in float32, eval.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    pictures = patchworks(PATCHWORKS, SIDE_IN_LATENTS * factor)
    with torch.no_grad():
        means = [vae.encode(torch.from_numpy(picture[None])).latent_dist.mode() for picture in pictures]
    latents = torch.cat(means).numpy() * np.float32(vae.config.scaling_factor)
    return fit_latent_rgb(latents, pictures)


def patchworks(count: int, side: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Pictures (count, 3, side, side) in [-1, 1]: rectangles of random colours on random colours."""
    rng = np.random.default_rng(seed)
    pictures = np.empty((count, 3, side, side), np.float32)
    for picture in pictures:
        picture[:] = rng.uniform(-1, 1, (3, 1, 1))
        for _ in range(rng.integers(2, 7)):
            height, width = rng.integers(side // 8, side // 2 + 1, 2)
            top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
            picture[:, top : top + height, left : left + width] = rng.uniform(-1, 1, (3, 1, 1))
    return pictures
