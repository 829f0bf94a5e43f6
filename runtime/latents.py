"""Latents: where they start and how they become pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, UsageError
from .image import Pictures, to_uint8
from .specs import Session


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent along each side: the VAE halves the picture between consecutive blocks.

    Raises:
        ConfigError: the config names no blocks.
    """
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, Sequence) or not blocks:
        raise ConfigError(f"vae config: expected block_out_channels, got {blocks!r}. Export the checkpoint again.")
    return int(2 ** (len(blocks) - 1))


def latent_shape(batch: int, height: int, width: int, *, channels: int, factor: int) -> tuple[int, int, int, int]:
    """Shape (b, c, h/f, w/f) of the latents of pictures of height and width in pixels.

    Raises:
        UsageError: a size is not a positive multiple of 8 and of the VAE's factor.
    """
    step = max(8, factor)
    for name, size in (("height", height), ("width", width)):
        if size < step or size % step:
            lower = max(step, size // step * step)
            raise UsageError(
                f"{name}: expected a positive multiple of {step}, got {size}. Use {lower} or {lower + step}."
            )
    return batch, channels, height // factor, width // factor


def decode_latents(
    session: Session, latents: NDArray[np.floating], *, scaling_factor: float, shift_factor: float = 0.0
) -> Pictures:
    """Pictures (b, h, w, 3) of final latents (b, c, h/f, w/f), one at a time so that memory does not grow with b."""
    rows = (latents / np.float32(scaling_factor) + np.float32(shift_factor)).astype(np.float32)
    return np.concatenate([to_uint8(session({"latent_sample": row[None]})["sample"]) for row in rows])
