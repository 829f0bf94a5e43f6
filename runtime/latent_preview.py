"""Previews of latents without the VAE decoder: a linear map of channels to colours, or a tiny decoder.

A latent's channels are close to linear in the mean colour of the pixels it stands for. `fit_latent_rgb` finds the map
by least squares for the VAE at hand; the factors that others published for the VAEs of Stable Diffusion 1 and XL serve
a bundle without one. The latents are those of the sampler (after the VAE's scaling factor), best the denoised estimate
of a step: the sample itself still holds the step's noise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ArtifactError, UsageError
from .image import Pictures, to_uint8
from .specs import Session

Floats = NDArray[np.float32]

LATENT_RGB_FILE = "vae_decoder/latent_rgb.json"


@dataclass(frozen=True, eq=False)
class LatentRgb:
    """Colour in [-1, 1] as a linear map of a latent: `weights` (c, 3) and `bias` (3,)."""

    weights: Floats
    bias: Floats

    def preview(self, latents: NDArray[np.floating]) -> Pictures:
        """Pictures (b, h/f, w/f, 3) of latents (b, c, h/f, w/f), a pixel for each latent.

        Raises:
            UsageError: the latents have another number of channels.
            BackendError: the latents hold NaN or infinity.
        """
        if latents.ndim != 4 or latents.shape[1] != len(self.weights):
            raise UsageError(f"latents: expected (b, {len(self.weights)}, h, w), got {latents.shape}.")
        sample = np.einsum("bchw,cr->brhw", latents.astype(np.float32), self.weights)
        return to_uint8(sample + self.bias[:, None, None], name="latents")

    def to_json(self) -> str:
        """The content of `vae_decoder/latent_rgb.json`."""
        return json.dumps({"weights": self.weights.tolist(), "bias": self.bias.tolist()}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LatentRgb:
        """What `to_json` wrote, to the bit.

        Raises:
            ArtifactError: not that JSON, or numbers of another shape, or not finite.
        """
        try:
            content = json.loads(text)
            weights = np.asarray(content["weights"], dtype=np.float32)
            bias = np.asarray(content["bias"], dtype=np.float32)
        except (ValueError, TypeError, KeyError, RecursionError) as err:
            raise ArtifactError(f"{LATENT_RGB_FILE}: expected weights and bias, got {err!r}. Fit it again.") from err
        if weights.ndim != 2 or weights.shape[1] != 3 or bias.shape != (3,):
            raise ArtifactError(
                f"{LATENT_RGB_FILE}: expected weights (c, 3) and bias (3,), got {weights.shape} and {bias.shape}. "
                "Fit it again."
            )
        if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
            raise ArtifactError(f"{LATENT_RGB_FILE}: expected finite numbers, got others. Fit it again.")
        return cls(weights, bias)


# Stable Diffusion 1: keturn, "Decoding latents to RGB without upscaling" (2022), discuss.huggingface.co/t/23204.
# XL: T. A. Vass, "Explaining the SDXL latent space" (2024), huggingface.co/blog, of 0 to 255 there.
_PUBLISHED = {
    0.18215: (
        ((0.298, 0.207, 0.208), (0.187, 0.286, 0.173), (-0.158, 0.189, 0.264), (-0.184, -0.271, -0.473)),
        (0.0, 0.0, 0.0),
    ),
    0.13025: (
        tuple(
            (r / 127.5, g / 127.5, b / 127.5)
            for r, g, b in [(60, 60, 60), (-60, -5, 10), (25, 15, -5), (-70, -50, -35)]
        ),
        (150 / 127.5 - 1, 140 / 127.5 - 1, 130 / 127.5 - 1),
    ),
}


def published_latent_rgb(channels: int, scaling_factor: float) -> LatentRgb | None:
    """The factors published for a VAE, which its scaling factor tells apart; None for any other."""
    if channels != 4 or scaling_factor not in _PUBLISHED:
        return None
    weights, bias = _PUBLISHED[scaling_factor]
    return LatentRgb(np.array(weights, np.float32), np.array(bias, np.float32))


def fit_latent_rgb(latents: NDArray[np.floating], pictures: NDArray[np.floating]) -> LatentRgb:
    """The linear map that is nearest to the mean colour of each latent's pixels, by least squares.

    Args:
        latents: (n, c, h/f, w/f), as the sampler holds them.
        pictures: (n, 3, h, w) in [-1, 1], what the VAE decodes them to or what it encoded.

    Raises:
        UsageError: the shapes do not belong together, or there are fewer latents than numbers to fit.
    """
    if latents.ndim != 4 or pictures.ndim != 4 or pictures.shape[1] != 3 or len(latents) != len(pictures):
        raise UsageError(f"latents: expected (n, c, h, w) and (n, 3, H, W), got {latents.shape}, {pictures.shape}.")
    channels, height, width = latents.shape[1:]
    colours = area_average(pictures, height, width)
    points = latents.astype(np.float64).transpose(0, 2, 3, 1).reshape(-1, channels)
    if len(points) <= channels:
        raise UsageError(f"latents: expected more than {channels} to fit, got {len(points)}. Give more pictures.")
    design = np.column_stack([points, np.ones(len(points))])
    solution = np.linalg.lstsq(design, colours.transpose(0, 2, 3, 1).reshape(-1, 3), rcond=None)[0]
    return LatentRgb(solution[:-1].astype(np.float32), solution[-1].astype(np.float32))


def area_average(pictures: NDArray[np.floating], height: int, width: int) -> NDArray[np.float64]:
    """Pictures (n, c, H, W) averaged over equal blocks to (n, c, height, width).

    Raises:
        UsageError: the blocks would not be equal.
    """
    count, channels, tall, wide = pictures.shape
    if not height or not width or tall % height or wide % width:
        raise UsageError(f"pictures: expected multiples of {height} x {width} pixels, got {tall} x {wide}.")
    blocks = pictures.astype(np.float64).reshape(count, channels, height, tall // height, width, wide // width)
    return np.asarray(blocks.mean(axis=(3, 5)))


def preview_with(session: Session, latents: NDArray[np.floating]) -> Pictures:
    """Pictures (b, h, w, 3) of latents (b, c, h/f, w/f) by a tiny decoder (TAESD, `taesd_decoder`), one at a time.

    Like diffusers' AutoencoderTiny it takes the latents as the sampler holds them.

    Raises:
        BackendError: the backend failed, or gave NaN or infinity.
    """
    rows = latents.astype(np.float32)
    name = f"{session.spec.name} ({session.backend})"
    return np.concatenate([to_uint8(session({"latent_sample": row[None]})["sample"], name=name) for row in rows])
