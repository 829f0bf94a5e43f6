"""Latents: their shape, how they become pictures, and how pictures become latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BackendError, ConfigError, UsageError
from .image import Pictures, check_finite, to_uint8
from .pixels import to_sample
from .specs import Array, Session
from .vae_tiling import Tiling, decode_tiled, encode_tiled


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
    session: Session,
    latents: NDArray[np.floating],
    *,
    scaling_factor: float,
    shift_factor: float = 0.0,
    tiling: Tiling | None = None,
) -> Pictures:
    """Pictures (b, h, w, 3) of final latents (b, c, h/f, w/f), one at a time so that memory does not grow with b.

    Args:
        tiling: decode each picture in tiles, so that memory does not grow with its size either.

    Raises:
        BackendError: the backend failed, or decoded to NaN or infinity.
    """
    rows = (latents / np.float32(scaling_factor) + np.float32(shift_factor)).astype(np.float32)
    name = f"{session.spec.name} ({session.backend})"

    def decoded(row: NDArray[np.float32]) -> Array:
        return decode_tiled(session, row, tiling) if tiling else session({"latent_sample": row})["sample"]

    return np.concatenate([to_uint8(decoded(row[None]), name=name) for row in rows])


def decode_to_uint8(session: Session, latents: NDArray[np.floating]) -> Pictures:
    """The pictures of `decode_latents`, to the byte, from a decoder that scales and rounds inside its graph.

    A quarter of the bytes leave the device, and nothing is left to do with them here.

    Args:
        session: of `vae_decoder_uint8`.
        latents: (b, c, h/f, w/f) as the U-Net has them.

    Raises:
        BackendError: the backend failed, or decoded to NaN or infinity.
    """
    name = f"{session.spec.name} ({session.backend})"
    pictures = []
    for row in latents.astype(np.float32):
        outputs = session({"latent_sample": row[None]})
        check_finite(outputs["finite"].astype(np.bool_), name=name)
        pictures.append(outputs["picture"].astype(np.uint8, copy=False))
    return np.concatenate(pictures)


def check_pictures(pictures: Pictures) -> None:
    """Refuse pictures (b, h, w, 3) of which one is black in every pixel: no prompt gives that, a broken decoder does.

    Raises:
        BackendError: names the pictures, the usual cause and the remedy.
    """
    black = np.flatnonzero(~pictures.any(axis=(1, 2, 3))).tolist()
    if black:
        raise BackendError(
            f"picture {black} of {len(pictures)}: expected more than black, got 0 in every pixel. "
            "The usual cause is a VAE that overflows in fp16; decode with the VAE in fp32."
        )


@dataclass(frozen=True, eq=False)
class LatentDistribution:
    """The Gaussian that the VAE encodes a picture to; `mean` and `std` are (b, c, h/f, w/f), before scaling."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]


def encode_image(session: Session, pictures: Pictures, *, tiling: Tiling | None = None) -> LatentDistribution:
    """`encode_sample` of pictures (b, h, w, 3).

    Raises:
        BackendError: as `encode_sample`.
        UsageError: the pictures are not uint8 (b, h, w, 3).
    """
    return encode_sample(session, to_sample(pictures), tiling=tiling)


def encode_sample(session: Session, sample: NDArray[np.float32], *, tiling: Tiling | None = None) -> LatentDistribution:
    """The latent distribution of samples (b, 3, h, w) in [-1, 1], encoded one at a time.

    The log-variance is clipped to [-30, 20], as in diffusers' DiagonalGaussianDistribution.

    Args:
        tiling: encode each picture in tiles.

    Raises:
        BackendError: the backend failed, or encoded to NaN or infinity.
    """

    def encoded(row: NDArray[np.float32]) -> Array:
        return encode_tiled(session, row, tiling) if tiling else session({"sample": row})["latent_parameters"]

    parameters = np.concatenate([encoded(row[None]) for row in sample]).astype(np.float32)
    if not np.isfinite(parameters).all():
        raise BackendError(
            f"{session.spec.name} ({session.backend}): expected finite numbers, got NaN or infinity. "
            "The usual cause is a VAE that overflows in fp16; encode with the VAE in fp32."
        )
    mean, logvar = np.split(parameters, 2, axis=1)
    return LatentDistribution(mean=mean, std=np.exp(np.float32(0.5) * np.clip(logvar, -30, 20)))


def sample_latents(
    distribution: LatentDistribution,
    noise: NDArray[np.float32] | None,
    *,
    scaling_factor: float,
    shift_factor: float = 0.0,
) -> NDArray[np.float32]:
    """Latents (b, c, h/f, w/f) as the U-Net takes them, drawn with standard normal noise of that shape.

    Args:
        noise: None gives the mode.

    Raises:
        UsageError: noise of another shape.
    """
    mean, std = distribution.mean, distribution.std
    if noise is not None and noise.shape != mean.shape:
        raise UsageError(f"noise: expected shape {mean.shape}, got {noise.shape}.")
    drawn = mean if noise is None else mean + std * noise.astype(np.float32)
    return np.asarray((drawn - np.float32(shift_factor)) * np.float32(scaling_factor), dtype=np.float32)
