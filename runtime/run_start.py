"""Where a run starts: its size, seeds and noise, the steps it takes, and its first latents."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .latents import LatentDistribution, encode_sample, latent_shape
from .model_facts import ModelFacts
from .noise import NoiseSource, batch_noise, batch_seeds
from .opened_model import Model
from .pixels import load_image, load_mask, to_sample
from .request import Request
from .residency import held
from .sampler_names import resolve_sampler, resolve_schedule
from .sampling_plan import SamplingPlan, plan_sampling
from .start_latents import (
    Start,
    draw_latents,
    from_noise,
    from_picture,
    share_steps,
    start_editing,
    start_inpainting,
    strength_steps,
)

Floats = NDArray[np.float32]


_XL_ONLY = (
    "prompt_2",
    "negative_prompt_2",
    "original_size",
    "crop",
    "target_size",
    "negative_original_size",
    "negative_crop",
    "negative_target_size",
)


def check_family(request: Request, facts: ModelFacts) -> None:
    """Refuse settings that this family of models does not have, rather than ignore them.

    Raises:
        UsageError: names the setting, and the family that has it.
    """
    wrong = {} if facts.is_sdxl else dict.fromkeys(_XL_ONLY, "an SDXL checkpoint")
    if facts.time_ids != 5:
        wrong |= dict.fromkeys(("aesthetic_score", "negative_aesthetic_score"), "the SDXL refiner")
    if not facts.is_editing:
        wrong["image_guidance"] = "an editing checkpoint (InstructPix2Pix)"
    for name, family in wrong.items():
        value, usual = getattr(request, name), getattr(Request, name)
        if value != usual:
            raise UsageError(f"{name}: expected {usual!r} but for {family}, got {value!r}. Leave it out.")


def picture_size(model: Model, request: Request) -> tuple[int, int]:
    """(height, width) in pixels: as asked for, else the image's or the latents', else what the checkpoint was made for.

    Raises:
        UsageError: a size is not a multiple of 8.
    """
    factor = model.facts.vae_factor
    height, width = request.height, request.width
    if request.latents is not None:
        rows, columns = np.shape(request.latents)[-2:]
        height, width = height or rows * factor, width or columns * factor
    elif request.image is not None and (height is None or width is None):
        picture = load_image(request.image, multiple=max(8, factor))
        height, width = height or picture.shape[0], width or picture.shape[1]
    default = model.facts.default_size
    height, width = height or default if height is None else height, width or default if width is None else width
    latent_shape(1, height, width, channels=model.facts.latent_channels, factor=factor)
    return height, width


def picture_seeds(request: Request) -> tuple[list[int], list[int]]:
    """The seed and the variation seed of every picture."""
    return batch_seeds(
        request.seed,
        len(request.prompts()) * request.batch,
        variation_seed=request.variation_seed,
        variation_strength=request.variation_strength,
    )


def request_noise(model: Model, request: Request) -> NoiseSource:
    """The noise of a request's pictures, from its beginning.

    Raises:
        UsageError: a seed is out of range, there are not as many as pictures, or no such generator.
    """
    factor = model.facts.vae_factor
    resized = request.resize_seed_from
    return batch_noise(
        request.seed,
        len(request.prompts()) * request.batch,
        rng=request.rng,
        gpu=request.gpu,
        variation_seed=request.variation_seed,
        variation_strength=request.variation_strength,
        resize_from=None if resized is None else (resized[0] // factor, resized[1] // factor),
        plain_draws=1 if samples_image(model.facts, request) else 0,
    )


def plan_request(model: Model, request: Request) -> SamplingPlan:
    """The steps of a request, before strength and shares cut them.

    Raises:
        UsageError: the sampler, the spacing or an option is not possible.
        ConfigError: the checkpoint's schedule is not possible with the sampler.
    """
    options = dict(request.sampler_options)
    if request.eta is not None:
        options["eta"] = request.eta
    sampler = resolve_sampler(request.sampler or model.default_sampler)
    schedule = resolve_schedule(request.schedule) or sampler.schedule
    if schedule == "ays" and model.facts.is_sdxl:
        schedule = "ays_sdxl"
    return plan_sampling(
        model.schedules.of(sampler),
        sampler,
        request.steps,
        spacing=schedule,
        timesteps=request.timesteps,
        sigmas=request.sigmas,
        options=options,
    )


def start_run(
    model: Model,
    request: Request,
    noise: NoiseSource,
    plan: SamplingPlan,
    images: int,
    size: tuple[int, int],
    clean: Floats | None,
) -> tuple[Start, SamplingPlan]:
    """Where the pass starts, and the steps that are left of its plan."""
    facts, count = model.facts, request.steps
    if request.timesteps is not None or request.sigmas is not None:
        count = len(plan.steps)
    shape = latent_shape(images, *size, channels=facts.latent_channels, factor=facts.vae_factor)
    given = None if request.latents is None else _checked_latents(request.latents, shape)
    if request.mask is not None and (request.denoising_start is not None or request.denoising_end is not None):
        raise UsageError("denoising_end: expected none with a mask, got one. Paint with one model from start to end.")
    if request.mask is not None and facts.is_editing:
        raise UsageError("mask: expected none for this editing checkpoint, got one. It edits the whole picture.")
    if request.strength is not None and facts.is_editing:
        raise UsageError("strength: expected none for this editing checkpoint, got one. Set image_guidance instead.")
    if given is not None and request.image is not None:
        raise UsageError("latents: expected none beside an image, got both. Give one to start from.")
    if request.strength is not None and request.image is None and given is None and clean is None:
        raise UsageError("strength: expected an image or latents beside it, got none. Give one to start from.")
    if request.denoising_start is not None and given is not None:
        return Start(given), share_steps(plan, request.denoising_start, request.denoising_end)
    if clean is None and given is not None and request.strength is not None:
        clean, given = given, None

    def ended(part: SamplingPlan) -> SamplingPlan:
        return part if request.denoising_end is None else share_steps(part, None, request.denoising_end)

    if clean is not None:
        cut = ended(_cut(model, request, plan, 0.7 if request.strength is None else request.strength, count))
        return Start(from_picture(cut, clean, noise(shape))), cut
    if request.image is None:
        _needs_no_image(facts)
        return Start(from_noise(plan, shape, noise, given)), ended(plan)

    def encode(sample: Floats) -> LatentDistribution:
        encoder = model.components["vae_encoder"]
        with held(encoder):
            return encode_sample(encoder, sample, tiling=model.tiling(request, size))

    picture = load_image(request.image, size=size)
    if facts.is_editing:
        return start_editing(plan, facts, encode, picture, noise, images=images), ended(plan)
    strength = _strength(request)
    if request.mask is not None:
        cut = strength_steps(plan, strength, count)
        mask = load_mask(request.mask, size=size)
        start = start_inpainting(cut, facts, encode, picture, mask, noise, images=images, strength=strength)
        return start, cut
    if facts.is_inpainting:
        raise UsageError("mask: expected one for this inpainting checkpoint, got none. White is where it paints.")
    cut = ended(_cut(model, request, plan, strength, count))
    drawn = draw_latents(facts, encode(to_sample(picture[None])), images, noise)
    return Start(from_picture(cut, drawn, noise(shape))), cut


def _cut(model: Model, request: Request, plan: SamplingPlan, strength: float, count: int) -> SamplingPlan:
    """What a strength leaves of the steps: the last ones, or for an LCM as many over a shorter range.

    As diffusers' `LatentConsistencyModelImg2ImgPipeline`; other models take the last steps of its sampler too.
    """
    if model.facts.is_lcm and "strength" in plan.sampler.options:
        return plan_request(model, request.replace(sampler_options={**request.sampler_options, "strength": strength}))
    return strength_steps(plan, strength, count)


def _strength(request: Request) -> float:
    """How much of a request's image is drawn anew."""
    if request.strength is not None:
        return request.strength
    return 0.8 if request.mask is None else 1.0


def samples_image(facts: ModelFacts, request: Request) -> bool:
    """Whether a sample of the image's latents is drawn before the noise that a run starts from."""
    if request.image is None or request.denoising_start is not None or facts.is_editing:
        return False
    return not (facts.is_inpainting and _strength(request) == 1.0)


def _needs_no_image(facts: ModelFacts) -> None:
    if facts.is_editing or facts.is_inpainting:
        what = "a mask and an image for this inpainting" if facts.is_inpainting else "an image for this editing"
        raise UsageError(f"image: expected {what} checkpoint, got none. Give it with the prompt.")


def _checked_latents(latents: object, shape: tuple[int, ...]) -> Floats:
    array = np.asarray(latents, np.float32)
    if array.shape != shape or not np.isfinite(array).all():
        raise UsageError(f"latents: expected finite numbers of shape {shape}, got shape {array.shape}.")
    return array
