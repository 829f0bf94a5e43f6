"""Final latents to pictures, by the decoder that suits the bundle and the size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .components import PICTURES
from .image import Pictures
from .latents import decode_latents, decode_to_uint8
from .opened_model import Model
from .request import Request
from .residency import held
from .start_latents import unscale_latents


def decode_pictures(model: Model, request: Request, latents: NDArray[np.float32]) -> Pictures:
    """Pictures (n, h, w, 3) of latents (n, c, h/8, w/8) as the U-Net has them.

    Large ones are decoded in tiles, which are blended before they are rounded: by the decoder that gives floats.

    Raises:
        BackendError: the decoder failed, or gave NaN or infinity.
    """
    components, factor = model.components, model.facts.vae_factor
    tiling = model.tiling(request, (latents.shape[2] * factor, latents.shape[3] * factor))
    whole = tiling is None and components.picture_decoder == PICTURES
    session = components[PICTURES if whole else "vae_decoder"]
    with held(session):
        if whole:
            return decode_to_uint8(session, latents)
        plain = unscale_latents(model.facts, latents)
        return decode_latents(session, plain, scaling_factor=1.0, tiling=tiling)
