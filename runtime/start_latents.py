"""Where a run starts: noise, a noised picture, and what inpainting and editing models are shown besides.

Random numbers are drawn in the order of diffusers' pipelines (the sampling of the VAE's latents, the noise, the
sampling of the masked picture's latents), so that the same seed gives the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .latents import LatentDistribution
from .model_facts import ModelFacts
from .noise import NoiseSource
from .parametrisation import Array
from .pixels import to_sample
from .sampling_plan import SamplingPlan

Floats = NDArray[np.float32]
Encode = Callable[[Floats], LatentDistribution]
"""The VAE's encoder for samples (b, 3, h, w) in [-1, 1]."""


@dataclass(frozen=True, eq=False)
class Blend:
    """The known part of a picture that is painted in with an ordinary model: kept at every noise level.

    Attributes:
        mask: 1 where to paint, (n, 1, h/8, w/8).
        known: the picture's latents, (n, c, h/8, w/8).
        noise: what they are noised with.
    """

    mask: Floats
    known: Floats
    noise: Floats

    def at(self, plan: SamplingPlan, sigma: float, latents: Array) -> Array:
        """The latents with the known part put back at a noise level; sigma 0 is the picture itself."""
        alpha, sigma_t = plan.model.levels(sigma)
        known = self.known if sigma == 0 else np.float32(alpha) * self.known + np.float32(sigma_t) * self.noise
        blended: Array = (1 - self.mask) * known + self.mask * latents
        return blended


@dataclass(frozen=True, eq=False)
class Start:
    """The beginning of a run.

    Attributes:
        latents: of the plan's first step, in its sampler's space.
        blend: put the known part back after every step; None for other tasks.
        channels: what follows the latents in the U-Net's input, (n, c', h/8, w/8); None for ordinary models.
    """

    latents: Floats
    blend: Blend | None = None
    channels: Floats | None = None


def scale_latents(facts: ModelFacts, latents: Floats) -> Floats:
    """The VAE's latents as the U-Net takes them."""
    if facts.latents_mean is not None and facts.latents_std is not None:
        return (latents - facts.latents_mean) * np.float32(facts.scaling_factor) / facts.latents_std
    return np.asarray((latents - np.float32(facts.shift_factor)) * np.float32(facts.scaling_factor), np.float32)


def unscale_latents(facts: ModelFacts, latents: Array) -> Floats:
    """The inverse: latents as the VAE decodes them."""
    if facts.latents_mean is not None and facts.latents_std is not None:
        plain = latents * facts.latents_std / np.float32(facts.scaling_factor) + facts.latents_mean
    else:
        plain = latents / np.float32(facts.scaling_factor) + np.float32(facts.shift_factor)
    return plain.astype(np.float32)


def strength_steps(plan: SamplingPlan, strength: float, count: int) -> SamplingPlan:
    """The last steps of a plan, as many as the strength asks for: diffusers' `get_timesteps`.

    Raises:
        UsageError: none is left.
    """
    kept = min(int(count * strength), count)
    if kept < 1:
        raise UsageError(
            f"strength: expected at least {1 / count:.3g} with {count} steps, got {strength:g}, which leaves no step. "
            "Raise it, or take more steps."
        )
    return plan.sliced(count - kept)


def share_steps(plan: SamplingPlan, start: float | None, end: float | None) -> SamplingPlan:
    """The steps of a plan between two shares of the training timesteps: how base and refiner divide a picture.

    Raises:
        UsageError: none is left.
    """
    total = plan.schedule.num_train_timesteps
    first, last = 0, len(plan.steps)
    if start is not None:
        first = sum(step.timestep >= round(total - start * total) for step in plan.steps)
    if end is not None:
        last = sum(step.timestep >= round(total - end * total) for step in plan.steps)
    if first >= last:
        raise UsageError(
            f"denoising_end: expected a share of the noise levels with a step in it, got {start} to {end} of "
            f"{len(plan.steps)} steps. Take more steps, or a wider share."
        )
    return plan.sliced(first, last)


def from_noise(plan: SamplingPlan, shape: tuple[int, ...], noise: NoiseSource, given: Floats | None = None) -> Floats:
    """Initial latents of pure noise, drawn unless given."""
    return (noise(shape) if given is None else given) * np.float32(plan.init_noise_sigma)


def from_picture(plan: SamplingPlan, clean: Floats, drawn: Floats) -> Floats:
    """Clean latents noised to the level of the plan's first step."""
    return plan.add_noise(clean, drawn).astype(np.float32)


def draw_latents(facts: ModelFacts, distribution: LatentDistribution, images: int, noise: NoiseSource) -> Floats:
    """A sample of the VAE's latents for each image, from the noise of that image."""
    mean, std = distribution.mean, distribution.std
    shape = (images, *mean.shape[1:])
    return scale_latents(facts, np.asarray(mean + std * noise(shape), np.float32))


def start_inpainting(
    plan: SamplingPlan,
    facts: ModelFacts,
    encode: Encode,
    picture: NDArray[np.uint8],
    mask: Floats,
    noise: NoiseSource,
    *,
    images: int,
    strength: float,
) -> Start:
    """Inpainting as diffusers' `StableDiffusionInpaintPipeline`, with an inpainting model or an ordinary one.

    Args:
        picture: (h, w, 3).
        mask: (h, w), 1 where to paint.
        strength: 1 starts from pure noise.
    """
    factor = facts.vae_factor
    sample = to_sample(picture[None])
    height, width = sample.shape[2] // factor, sample.shape[3] // factor
    shape = (images, facts.latent_channels, height, width)
    from_start = strength == 1.0
    known = None
    if not facts.is_inpainting or not from_start:
        known = draw_latents(facts, encode(sample), images, noise)
    drawn = noise(shape)
    latents = drawn * np.float32(plan.init_noise_sigma) if known is None or from_start else plan.add_noise(known, drawn)
    # Nearest neighbour, as torch.nn.functional.interpolate by default: the first pixel of each latent's square.
    small = np.broadcast_to(mask[::factor, ::factor][:height, :width], (images, 1, height, width)).astype(np.float32)
    masked = draw_latents(facts, encode(sample * (mask < 0.5)), images, noise)
    if facts.is_inpainting:
        return Start(latents.astype(np.float32), channels=np.concatenate([small, masked], axis=1))
    assert known is not None
    return Start(latents.astype(np.float32), blend=Blend(small, known, drawn))


def start_editing(
    plan: SamplingPlan,
    facts: ModelFacts,
    encode: Encode,
    picture: NDArray[np.uint8],
    noise: NoiseSource,
    *,
    images: int,
) -> Start:
    """Editing as diffusers' `StableDiffusionInstructPix2PixPipeline`: pure noise, shown the picture's own latents."""
    mode = encode(to_sample(picture[None])).mean
    shape = (images, facts.latent_channels, *mode.shape[2:])
    channels = np.broadcast_to(mode, (images, *mode.shape[1:])).astype(np.float32)
    return Start(from_noise(plan, shape, noise), channels=channels)


def resize_latents(latents: Floats, height: int, width: int, *, nearest: bool = False) -> Floats:
    """Latents (n, c, h, w) at another size, as `torch.nn.functional.interpolate` does it: bilinear, or nearest."""
    rows, columns = (
        _positions(new, old, nearest) for new, old in ((height, latents.shape[2]), (width, latents.shape[3]))
    )
    if nearest:
        return latents[:, :, rows[0]][:, :, :, columns[0]]
    low, high, weight = rows
    tall = latents[:, :, low] * (1 - weight)[:, None] + latents[:, :, high] * weight[:, None]
    low, high, weight = columns
    return np.asarray(tall[..., low] * (1 - weight) + tall[..., high] * weight, np.float32)


def _positions(new: int, old: int, nearest: bool) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """For every new position the two old ones beside it and the weight of the second."""
    if nearest:
        place = np.minimum((np.arange(new) * (old / new)).astype(np.intp), old - 1)
        return place, place, np.zeros(new, np.float32)
    centre = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, None)
    low = np.minimum(centre.astype(np.intp), old - 1)
    weight = (centre - low).astype(np.float32)
    return low, np.minimum(low + 1, old - 1), weight


def nearest_multiple(value: float, step: int) -> int:
    """The nearest multiple of a step, at least one."""
    return max(step, step * math.floor(value / step + 0.5))
