"""An opened bundle with what its configs say: what every run is given."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .components import Components
from .latent_preview import LATENT_RGB_FILE, LatentRgb, published_latent_rgb
from .model_facts import ModelFacts, Schedules
from .request import Request
from .text_encoding import PromptEncoder
from .textual_inversion import TextualInversion
from .vae_tiling import Tiling, auto_tile


@dataclass(frozen=True, eq=False)
class Model:
    """An opened bundle, as passes use it: networks, text encoders, configs."""

    components: Components
    prompt_encoder: PromptEncoder
    facts: ModelFacts
    schedules: Schedules
    default_sampler: str
    inversions: tuple[TextualInversion, ...] = ()

    def tiling(self, request: Request, size: tuple[int, int]) -> Tiling | None:
        """How the VAE's pictures are tiled."""
        tiling = auto_tile(*size, tile=request.tile, factor=self.facts.vae_factor)
        return None if tiling is None else replace(tiling, blend=request.tile_blend)

    def latent_rgb(self) -> LatentRgb | None:
        """The linear preview of its latents: the bundle's own, or the published one of its VAE."""
        path = self.components.bundle.path / LATENT_RGB_FILE
        if path.exists():
            return LatentRgb.from_json(path.read_text(encoding="utf-8"))
        return published_latent_rgb(self.facts.latent_channels, self.facts.scaling_factor)
