"""The second, larger pass of a hi-res fix: the first pass's latents enlarged, noised again and drawn on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .decoding import decode_pictures
from .errors import UsageError
from .latents import encode_image
from .model_facts import ModelFacts
from .opened_model import Model
from .request import Hires, Request
from .residency import held
from .start_latents import nearest_multiple, resize_latents, scale_latents

Floats = NDArray[np.float32]
UPSCALERS = ("latent", "latent-nearest", "lanczos")


def check_hires(request: Request, hires: Hires, facts: ModelFacts) -> None:
    """Find what the second pass cannot do before the first one is run.

    Raises:
        UsageError: a setting is out of its range, or the request or the checkpoint does not go with a second pass.
    """
    if not 0 < hires.scale <= 16:
        raise UsageError(f"hires.scale: expected a number above 0 and up to 16, got {hires.scale}.")
    if hires.upscaler not in UPSCALERS:
        raise UsageError(f"hires.upscaler: expected one of {', '.join(UPSCALERS)}, got {hires.upscaler!r}.")
    steps = request.steps if hires.steps is None else hires.steps
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise UsageError(f"hires.steps: expected a whole number of at least 1, got {steps!r}.")
    if not 0 <= hires.strength <= 1 or int(steps * hires.strength) < 1:
        raise UsageError(
            f"hires.strength: expected {1 / steps:.3g} to 1 with {steps} steps, got {hires.strength:g}. "
            "Below that no step is left."
        )
    if facts.is_inpainting or facts.is_editing:
        raise UsageError("hires: expected none with a checkpoint for inpainting or editing, got one. Enlarge later.")
    for name in ("mask", "denoising_start", "denoising_end"):
        if getattr(request, name) is not None:
            raise UsageError(f"hires: expected none with {name}, got one. Do one after the other.")


def larger_size(size: tuple[int, int], hires: Hires, factor: int) -> tuple[int, int]:
    """(height, width) of the second pass, multiples of 8."""
    step = max(8, factor)
    return nearest_multiple(size[0] * hires.scale, step), nearest_multiple(size[1] * hires.scale, step)


def enlarge(model: Model, request: Request, latents: Floats, hires: Hires, size: tuple[int, int]) -> Floats:
    """Clean latents (n, c, h/8, w/8) at the size of the second pass."""
    facts = model.facts
    rows, columns = size[0] // facts.vae_factor, size[1] // facts.vae_factor
    if hires.upscaler in ("latent", "latent-nearest"):
        return resize_latents(latents, rows, columns, nearest=hires.upscaler == "latent-nearest")
    from .pixels import load_image

    encoder = model.components["vae_encoder"]
    pictures = decode_pictures(model, request, latents)
    larger = np.stack([load_image(picture, size=size) for picture in pictures])
    with held(encoder):
        encoded = encode_image(encoder, larger, tiling=model.tiling(request, size))
    # The mode of the distribution: the second pass adds noise of its own.
    return scale_latents(facts, encoded.mean)


def second_request(request: Request, hires: Hires) -> Request:
    """The request of the second pass, without what belongs to the first alone.

    Its noise is that of the same seeds, variations and all, as in AUTOMATIC1111's web UI.
    """
    return request.replace(
        steps=request.steps if hires.steps is None else hires.steps,
        strength=hires.strength,
        timesteps=None,
        sigmas=None,
        image=None,
        mask=None,
        latents=None,
        hires=None,
    )
