"""One pass of a request: what it is prepared from, and the steps it then takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .brownian import BrownianNoise
from .conditioning import Conditioning
from .denoise import ActiveControl, Denoiser, denoise
from .errors import BackendError, UsageError
from .guidance import Guidance
from .latent_preview import preview_with
from .noise import NoiseSource, Rng
from .opened_model import Model
from .parametrisation import Array, apply_form
from .pixels import load_image
from .request import Request
from .residency import held
from .run_start import check_family, picture_seeds, picture_size, plan_request, start_run
from .sampler_loop import StepResult
from .sampling_plan import SamplingPlan, start_sampler
from .specs import Session
from .start_latents import Start

Floats = NDArray[np.float32]
Preview = Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class StepInfo:
    """A finished step.

    Attributes:
        index: its position in this pass, from 0.
        total: steps of this pass.
        latents: (n, c, h/8, w/8), read-only.
        seconds: since the pass began.
        sigma: noise-to-signal ratio at which the step started.
        timestep: what the model was told.
        preview: makes pictures (n, h, w, 3) of what the latents are about to become, on demand.
        second_pass: whether this is the larger pass of a hi-res fix.
    """

    index: int
    total: int
    latents: Array
    seconds: float
    sigma: float
    timestep: float
    preview: Preview
    second_pass: bool = False


@dataclass(frozen=True, eq=False)
class Pass:
    """A prepared run of the sampler."""

    plan: SamplingPlan
    start: Start
    denoiser: Denoiser
    noise: NoiseSource
    seeds: Sequence[int]
    rng: Rng
    gpu: str
    size: tuple[int, int]

    def brownian(self) -> BrownianNoise | None:
        """The Brownian motion of every image over the noise levels of the steps; None if the plan asks for none.

        The sampler's option `noise_sampler_seed` gives every image the path of that seed instead of its own.
        """
        levels = {sigma for step in self.plan.steps for sigma in (step.sigma, step.sigma_next) if sigma > 0}
        # From a single level the only way is down to a clean latent, and nothing is added there.
        if not self.plan.sampler.brownian or not self.plan.takes_noise or len(levels) < 2:
            return None
        own = self.plan.options.get("noise_sampler_seed")
        seeds = self.seeds if own is None else [own] * len(self.seeds)
        shape = self.start.latents.shape
        return BrownianNoise(seeds, shape, min(levels), max(levels), rng=self.rng, gpu=self.gpu)


def prepare(
    model: Model,
    request: Request,
    noise: NoiseSource,
    *,
    clean: Floats | None = None,
    size: tuple[int, int] | None = None,
    first_pass_steps: int | None = None,
) -> Pass:
    """Everything of a pass up to its first call of the U-Net.

    Args:
        noise: of the batch, from its beginning.
        clean: clean latents to start from instead of the request's image, for the second pass of a hi-res fix.
        size: of the picture, if not the request's.
        first_pass_steps: of the first pass, in the second one.

    Raises:
        UsageError: the request does not fit the bundle.
        BackendError: a network failed.
    """
    facts = model.facts
    check_family(request, facts)
    height, width = size or picture_size(model, request)
    images = len(request.prompts()) * request.batch
    plan = plan_request(model, request)
    start, plan = start_run(model, request, noise, plan, images, (height, width), clean)
    guidance = Guidance(
        scale=model.facts.default_guidance if request.guidance is None else request.guidance,
        end=request.guidance_end,
        curve=request.guidance_curve,
        # As in diffusers, an editing model is guided only where both scales ask for it.
        interval=(0.0, 0.0) if facts.is_editing and request.image_guidance < 1 else request.guidance_interval,
        rescale=request.guidance_rescale,
    )
    steps = len(plan.steps)
    controls = _controls(model, request, images, (height, width))
    with held(*(encoder.session for encoder in model.prompt_encoder.encoders)):
        conditioning = Conditioning(
            model.prompt_encoder,
            request,
            facts,
            steps=steps,
            size=(height, width),
            guided=guidance.anywhere(steps),
            first_pass_steps=first_pass_steps,
        )
        denoiser = Denoiser(
            unet=model.components["unet"],
            conditioning=conditioning,
            guidance=guidance,
            first=plan.steps[0].index,
            count=steps,
            channels=start.channels,
            image_guidance=request.image_guidance if facts.is_editing and guidance.anywhere(steps) else None,
            controls=controls,
            unet_control=model.components["unet_control"] if controls else None,
            time_cond_width=facts.time_cond_width,
            precision=model.components.precision,
        )
        denoiser.encode_texts()
    seeds = picture_seeds(request)[0]
    return Pass(plan, start, denoiser, noise, seeds, request.rng, request.gpu, (height, width))


def _controls(model: Model, request: Request, images: int, size: tuple[int, int]) -> tuple[ActiveControl, ...]:
    active = []
    for control in request.controls:
        name = "controlnet" if control.model == 0 else f"controlnet_{control.model + 1}"
        if not 0 <= control.start <= control.end <= 1:
            raise UsageError(f"control: expected rising shares from 0 to 1, got {control.start}, {control.end}.")
        picture = load_image(control.image, size=size)
        unit = np.float32(picture.transpose(2, 0, 1)[None]) / np.float32(255)
        pictures = np.broadcast_to(unit, (images, *unit.shape[1:]))
        active.append(ActiveControl(model.components[name], pictures, control.scale, control.start, control.end))
    return tuple(active)


def run_pass(model: Model, prepared: Pass, *, second_pass: bool = False) -> Generator[StepInfo, None, Floats]:
    """Run a pass: yields each finished step, returns the final latents in the U-Net's scale.

    Raises:
        BackendError: a network failed or gave NaN or infinity.
    """
    plan, start = prepared.plan, prepared.start
    blend = start.blend
    began = time.perf_counter()
    sampler = start_sampler(
        plan,
        start.latents,
        noise=prepared.noise,
        brownian=prepared.brownian(),
        between=None if blend is None else lambda sigma, latents: blend.at(plan, sigma, latents),
    )
    final: Array = start.latents
    last = plan.steps[-1]
    with held(*prepared.denoiser.sessions):
        for step in denoise(sampler, prepared.denoiser):
            final = step.latents
            if blend is not None and step.index == last.index:
                # The picture itself, at whatever level the last step ends: as in diffusers.
                final = blend.at(plan, 0.0, final)
            if not np.isfinite(final).all():
                raise BackendError(
                    f"sampler {plan.sampler.label}: expected finite latents after step {step.index}, got NaN or "
                    "infinity. Take more steps, less guidance, or precision fp32."
                )
            shown = final.view()
            shown.flags.writeable = False
            yield StepInfo(
                index=step.index - plan.steps[0].index,
                total=len(plan.steps),
                latents=shown,
                seconds=time.perf_counter() - began,
                sigma=step.evaluation.sigma,
                timestep=float(step.evaluation.timestep or 0.0),
                preview=lambda step=step: _preview(model, plan, step),  # type: ignore[misc]
                second_pass=second_pass,
            )
    return final.astype(np.float32)


def _preview(model: Model, plan: SamplingPlan, step: StepResult) -> NDArray[np.uint8]:
    """Pictures of the denoised latents as the model saw them at this step."""
    sigma = step.evaluation.sigma
    latents = step.evaluation.sample / np.float32(plan.model.input_scale(sigma))
    denoised = apply_form(plan.model.form("denoised", sigma), latents, step.prediction)
    if "taesd_decoder" in model.components:
        decoder: Session = model.components["taesd_decoder"]
        return preview_with(decoder, denoised)
    factors = model.latent_rgb()
    if factors is None:
        raise UsageError(
            "preview: expected factors of this VAE, found none. Export the checkpoint again, or with --taesd PATH."
        )
    return factors.preview(denoised)
