"""The safety checker of Stable Diffusion 1: which pictures it flags, and what is shown in their place.

The arithmetic is that of diffusers' `StableDiffusionSafetyChecker`, rounding included, the preprocessing that of
transformers' `CLIPImageProcessor` with Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .image import Pictures
from .specs import Array, Session

if TYPE_CHECKING:
    from .components import Components

COMPONENT, PROCESSOR_FILE = "safety_checker", "feature_extractor/preprocessor_config.json"
# Added to every concept's score once a special one is found, so that less is needed.
_SPECIAL_CARE = np.float32(0.01)
_DECIMALS = 3
_BICUBIC = 3
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


@dataclass(frozen=True)
class ClipProcessor:
    """Pictures to what CLIP sees: scaled, cut to a square, normalised.

    Attributes:
        shortest: pixels of the shorter side after scaling.
        crop: height and width that are cut out of the middle.
        mean: of the colours, subtracted; in units of 1.
        std: of the colours.
        scale: of uint8 values to units of 1.
        resample: the filter, by Pillow's number.
    """

    shortest: int
    crop: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    resample: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ClipProcessor:
        """From preprocessor_config.json, of `CLIPImageProcessor` or of the older `CLIPFeatureExtractor`.

        Raises:
            ConfigError: a step is switched off, a value is missing, or sizes are given in another way.
        """
        for step in _STEPS:
            if not config.get(step, True):
                raise ConfigError(f"{PROCESSOR_FILE}: expected {step} true, got {config[step]!r}. It is not supported.")
        size, crop = config.get("size"), config.get("crop_size")
        sizes: list[Any] = [size.get("shortest_edge") if isinstance(size, Mapping) else size]
        sizes += [crop.get("height"), crop.get("width")] if isinstance(crop, Mapping) else [crop, crop]
        try:
            whole, height, width = (int(value) for value in sizes)
            mean, std = (tuple(float(value) for value in config[name]) for name in ("image_mean", "image_std"))
            if not 1 <= max(height, width) <= whole or len(mean) != 3 or len(std) != 3 or not min(std) > 0:
                raise ValueError("out of range")
            resample = int(config.get("resample", _BICUBIC))
            if resample not in range(6):
                raise ValueError("no such filter")
        except (KeyError, TypeError, ValueError) as err:
            raise ConfigError(
                f"{PROCESSOR_FILE}: expected a shortest edge, a crop that fits into it, three means and deviations, "
                f"and a filter of Pillow's, got size {size}, crop_size {crop}, image_mean {config.get('image_mean')}, "
                f"image_std {config.get('image_std')}, resample {config.get('resample')}. "
                "Export the checkpoint again, with the file as it was published."
            ) from err
        return cls(
            shortest=whole,
            crop=(height, width),
            mean=mean,
            std=std,
            scale=float(config.get("rescale_factor", 1 / 255)),
            resample=resample,
        )

    def __call__(self, pictures: Pictures) -> NDArray[np.float32]:
        """Pictures (n, h, w, 3) to (n, 3, *crop)."""
        height, width = pictures.shape[1:3]
        short = min(height, width)
        size = (self.shortest * width // short, self.shortest * height // short)
        top, left = (size[1] - self.crop[0]) // 2, (size[0] - self.crop[1]) // 2
        cut = np.stack([_scaled(picture, size, self.resample) for picture in pictures])
        cut = cut[:, top : top + self.crop[0], left : left + self.crop[1]]
        unit = (cut.astype(np.float64) * self.scale).astype(np.float32)
        normal = (unit - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))


def _scaled(picture: Pictures, size: tuple[int, int], resample: int) -> Pictures:
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling(resample)))


def flagged(scores: Mapping[str, Array]) -> NDArray[np.bool_]:
    """Which pictures are flagged, (n,).

    Args:
        scores: `special_scores` (n, 3) and `concept_scores` (n, 17): cosine similarities less thresholds.
    """
    special, concepts = (scores[name].astype(np.float32) for name in ("special_scores", "concept_scores"))
    care = (special.round(_DECIMALS) > 0).any(axis=1, keepdims=True)
    near = (concepts + _SPECIAL_CARE * care).round(_DECIMALS) > 0
    return np.asarray(near.any(axis=1))


@dataclass(frozen=True, eq=False)
class SafetyChecker:
    """The checker of a bundle.

    Attributes:
        session: of the component `safety_checker`.
        processor: of the pictures that it is given.
    """

    session: Session
    processor: ClipProcessor

    def __call__(self, pictures: Pictures) -> tuple[Pictures, tuple[bool, ...]]:
        """Pictures (n, h, w, 3) with those black that are flagged, and which these are."""
        flags = flagged(self.session({"clip_input": self.processor(pictures)}))
        shown = np.where(flags[:, None, None, None], np.uint8(0), pictures)
        return shown, tuple(flags.tolist())


def open_safety_checker(components: Components, wanted: bool | None) -> SafetyChecker | None:
    """A bundle's checker, or None if it is not wanted.

    Args:
        wanted: None takes it if the bundle holds one.

    Raises:
        UsageError: it is wanted and the bundle holds none.
        ArtifactError: a file of it is missing, damaged or changed.
        ConfigError: its preprocessing is not supported.
        BackendError: the backend cannot be used here.
    """
    if not (COMPONENT in components if wanted is None else wanted):
        return None
    session = components[COMPONENT]
    return SafetyChecker(session, ClipProcessor.from_config(components.bundle.config(PROCESSOR_FILE)))
