"""A request: everything that decides a picture besides the bundle it is drawn with."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from .cuda_rng import DEFAULT_GPU
from .errors import UsageError
from .noise import Rng
from .text_encoding import Embeddings
from .vae_tiling import Blend

Text: TypeAlias = str | Embeddings


@dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """One ControlNet at work.

    Attributes:
        image: what it follows: a file, a Pillow image or an array, scaled to the picture's size.
        scale: how strongly.
        start: share of the steps after which it begins.
        end: share of the steps after which it ends.
        model: which of the bundle's ControlNets, from 0 in the order of their export.
    """

    image: Any
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    model: int = 0


@dataclass(frozen=True, kw_only=True)
class Hires:
    """A second pass at a larger size over the first picture ("hi-res fix").

    Attributes:
        scale: of width and height.
        strength: how much of the second pass is drawn anew, as in image to image.
        steps: of the second pass before `strength` cuts them; default the first pass's.
        upscaler: "latent" (bilinear, on latents), "latent-nearest", or "lanczos" (on the decoded picture).
    """

    scale: float = 2.0
    strength: float = 0.7
    steps: int | None = None
    upscaler: str = "latent"


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What to draw and how. Names and defaults are those of diffusers where it has them.

    Attributes:
        prompt: one text (attention grammar, BREAK, AND and schedules allowed), or several; or embeddings.
        negative_prompt: what guidance leads away from: one for all prompts, or one for each.
        prompt_2: for SDXL's second text encoder; default the prompt itself.
        negative_prompt_2: likewise.
        batch: pictures of each prompt.
        width: in pixels, a multiple of 8; default what the checkpoint was trained at, or the image's own.
        height: likewise.
        sampler: in the spelling of A1111, ComfyUI or diffusers; default the checkpoint's own.
        schedule: spacing of the noise levels; default the checkpoint's own.
        steps: sampling steps.
        timesteps: falling training timesteps to visit, instead of `steps`.
        sigmas: falling noise levels instead, the last that of the result.
        eta: stochasticity of samplers that have it; default the sampler's own.
        sampler_options: further options of the sampler, by diffusers' names.
        guidance: scale of classifier-free guidance; 1 and below switch it off. Default as in diffusers: 7.5,
            5 for SDXL, 8.5 for latent consistency models.
        guidance_rescale: phi of Lin et al. 2023, against overexposure; 0 is off.
        guidance_interval: shares of the steps between which guidance is on (Kynkäänniemi et al. 2024).
        guidance_end: scale at the last step; the scale goes there from `guidance` as `guidance_curve` says.
        guidance_curve: "linear" or "cosine", with `guidance_end`.
        image_guidance: how closely an editing model (InstructPix2Pix) keeps to the image; below 1 nothing is guided.
        seed: of the first picture; picture i has seed + i. Or one for each.
        rng: whose random numbers: "cpu" and "cuda" are PyTorch's, "numpy" NumPy's.
        gpu: for "cuda": the GPU whose numbers they are (they differ for large pictures only).
        variation_seed: turn the noise towards this seed's.
        variation_strength: how far, 0 to 1.
        resize_seed_from: (height, width) in pixels of a picture whose composition to keep at another size.
        clip_skip: layers of the text encoder left out at the end: 0 none, 1 the last (the web UI's "2").
        negative_clip_skip: likewise for negative prompts: 0 as in diffusers; the web UI uses `clip_skip` for both.
        image: where to start from (image to image), what to paint in or to edit.
        strength: how much of the image is drawn anew; default 0.8, and 1 with a mask.
        mask: white where to paint, black where to keep.
        controls: ControlNets and what they follow.
        original_size: SDXL: (height, width) of the picture this one pretends to be made from.
        crop: SDXL: (top, left) of the crop it pretends to be.
        target_size: SDXL: (height, width) it pretends to have.
        negative_original_size: likewise for the negative prompt; default as for the prompt.
        negative_crop: likewise; (0, 0) for the refiner, and beside both negative sizes.
        negative_target_size: likewise.
        aesthetic_score: SDXL refiner.
        negative_aesthetic_score: SDXL refiner.
        denoising_start: share of the noise levels that another model has done already; needs `latents`.
        denoising_end: share of the noise levels after which to stop, leaving noisy latents.
        latents: to start from instead of noise, (n, c, h/8, w/8): as diffusers takes them (standard normal), or with
            `denoising_start` another run's; with `strength` clean ones, which are noised first.
        hires: a second, larger pass.
        tile: side in pixels of the VAE's tiles; 0 for none; default 512 above one megapixel.
        tile_blend: "smooth", or "diffusers" for the picture that diffusers' tiling gives.
        decode: whether to decode the latents to pictures.
        safety_checker: whether pictures that the bundle's safety checker flags come out black; default if it has one.
    """

    prompt: Text | Sequence[Text]
    negative_prompt: Text | Sequence[Text] | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    batch: int = 1
    width: int | None = None
    height: int | None = None
    sampler: str | None = None
    schedule: str | None = None
    steps: int = 20
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    eta: float | None = None
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_end: float | None = None
    guidance_curve: str = "linear"
    image_guidance: float = 1.5
    seed: int | Sequence[int] = 0
    rng: Rng = "cpu"
    gpu: str = DEFAULT_GPU
    variation_seed: int | Sequence[int] | None = None
    variation_strength: float = 0.0
    resize_seed_from: tuple[int, int] | None = None
    clip_skip: int = 0
    negative_clip_skip: int = 0
    image: Any = None
    strength: float | None = None
    mask: Any = None
    controls: Sequence[Control] = ()
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    negative_original_size: tuple[int, int] | None = None
    negative_crop: tuple[int, int] | None = None
    negative_target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    denoising_start: float | None = None
    denoising_end: float | None = None
    latents: Any = None
    hires: Hires | None = None
    tile: int | None = None
    tile_blend: Blend = "smooth"
    decode: bool = True
    safety_checker: bool | None = None

    def __post_init__(self) -> None:
        """Check what needs no bundle to be checked.

        Raises:
            UsageError: a value is out of its range, or two exclude each other.
        """
        texts = self.prompts()
        if not texts:
            raise UsageError("prompt: expected at least one, got none.")
        self.negatives()
        _whole("batch", self.batch, 1)
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"guidance: expected a finite number, got {self.guidance}. 5 to 8 are usual.")
        for name in ("guidance_rescale", "strength", "variation_strength", "denoising_start", "denoising_end"):
            _share(name, getattr(self, name))
        low, high = self.guidance_interval
        if not 0 <= low <= high <= 1:
            raise UsageError(f"guidance_interval: expected two rising shares from 0 to 1, got {low}, {high}.")
        if self.guidance_curve not in ("linear", "cosine"):
            raise UsageError(f"guidance_curve: expected linear or cosine, got {self.guidance_curve!r}.")
        if self.mask is not None and self.image is None:
            raise UsageError("image: expected the picture that the mask is for, got none. Give both.")
        if self.denoising_start is not None and self.latents is None:
            raise UsageError("latents: expected another run's beside denoising_start, got none. Give both.")

    def prompts(self) -> list[Text]:
        """The prompts, one for each of them even if it is one."""
        return [self.prompt] if isinstance(self.prompt, str | Embeddings) else list(self.prompt)

    def negatives(self) -> list[Text | None]:
        """The negative prompt of each prompt.

        Raises:
            UsageError: there are several, but not as many as prompts.
        """
        count = len(self.prompts())
        if self.negative_prompt is None or isinstance(self.negative_prompt, str | Embeddings):
            return [self.negative_prompt] * count
        negatives: list[Text | None] = list(self.negative_prompt)
        if len(negatives) != count:
            raise UsageError(f"negative_prompt: expected one, or {count} as there are prompts, got {len(negatives)}.")
        return negatives

    def replace(self, **changes: Any) -> Request:
        """A copy with these attributes changed."""
        return dataclasses.replace(self, **changes)


def request_of(prompt: Any, settings: Mapping[str, Any]) -> Request:
    """A request from keyword arguments.

    Raises:
        UsageError: a name is unknown; the message lists the nearest ones.
    """
    if isinstance(prompt, Request):
        return prompt.replace(**_known(settings))
    return Request(prompt=prompt, **_known(settings))


def _known(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    names = {item.name for item in dataclasses.fields(Request)}
    for name in settings:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)
            raise UsageError(f"{name}: expected a setting such as {', '.join(near)}, got an unknown one. Correct it.")
    return settings


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UsageError(f"{name}: expected a whole number of at least {least}, got {value!r}.")


def _share(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        raise UsageError(f"{name}: expected a number from 0 to 1, got {value!r}.")


def to_record(request: Request) -> dict[str, Any]:
    """The request as JSON: what differs from the defaults. Pictures and arrays are named by SHA-256 alone."""
    record: dict[str, Any] = {}
    for item in dataclasses.fields(Request):
        value = getattr(request, item.name)
        default = item.default_factory() if callable(item.default_factory) else item.default
        if item.name != "prompt" and _same(value, default):
            continue
        record[item.name] = _plain(value)
    return record


def _same(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, str | int | float | tuple | dict) and bool(value == default))


def _plain(value: Any) -> Any:
    if isinstance(value, Embeddings):
        parts = [value.hidden] + ([] if value.pooled is None else [value.pooled])
        return {"embeddings": [_digest(part) for part in parts]}
    if isinstance(value, np.ndarray):
        return {"array": _digest(value)}
    if isinstance(value, Control | Hires):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return {"file": str(value)} if hasattr(value, "__fspath__") else {"picture": _digest(np.asarray(value))}


def _digest(array: Any) -> str:
    array = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()


def from_record(record: Mapping[str, Any]) -> Request:
    """The request that `to_record` wrote.

    Raises:
        UsageError: it was made from arrays or pictures, which the record does not hold, or holds unknown settings.
    """
    settings: dict[str, Any] = {}
    for name, value in record.items():
        if name == "hires" and isinstance(value, Mapping):
            settings[name] = Hires(**value)
        elif name == "controls" and isinstance(value, list):
            settings[name] = tuple(
                Control(**{key: _revived(f"controls.{key}", part) for key, part in inner.items()}) for inner in value
            )
        else:
            settings[name] = _revived(name, value)
    prompt = settings.pop("prompt", None)
    if prompt is None:
        raise UsageError("record: expected a prompt, found none. The picture was not made by this version.")
    return request_of(prompt, settings)


def _revived(name: str, value: Any) -> Any:
    if isinstance(value, list):
        pair = ("guidance_interval", "resize_seed_from", "crop")
        return tuple(value) if name in pair or name.endswith(("_size", "_crop")) else value
    if isinstance(value, Mapping) and name != "sampler_options":
        if "file" in value:
            return str(value["file"])
        kind = next(iter(value), "nothing")
        raise UsageError(
            f"{name}: expected a value that a picture can record, found the hash of {kind}. "
            "The picture was made from data that it does not hold; pass them again."
        )
    return value
