"""Text to image: `Pipeline.load(path)(prompt, …)`, a chain of encode_prompt, denoise and decode_latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .backends import open_session
from .bundle import TEXT_TO_IMAGE, Bundle, open_bundle, pipeline_files
from .denoise import denoise, guided
from .errors import UsageError
from .image import Pictures
from .latents import decode_latents, latent_shape, vae_factor
from .noise_schedule import NoiseSchedule
from .prompt import encode_prompt
from .sampler_loop import StepResult
from .sampler_names import resolve_sampler
from .sampling_plan import SamplingPlan, plan_sampling, start_sampler
from .specs import Session
from .tokenizer import ClipTokenizer, load_tokenizer
from .torch_rng import batch_noise


@dataclass(frozen=True, eq=False)
class Result:
    """What a call drew.

    Attributes:
        images: (n, h, w, 3) uint8; the pictures of the first prompt come first.
        latents: final latents (n, c, h/8, w/8) float32, as the VAE takes them before its scaling factor.
        seeds: of each picture.
        parameters: of each picture, in the form that web UIs write into PNG files.
    """

    images: Pictures
    latents: NDArray[np.float32]
    seeds: tuple[int, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A bundle ready to draw. Make one with `Pipeline.load`."""

    name: str
    precision: str
    tokenizer: ClipTokenizer
    text_encoder: Session
    unet: Session
    vae_decoder: Session
    schedule: NoiseSchedule
    default_sampler: str
    latent_channels: int
    vae_factor: int
    scaling_factor: float
    shift_factor: float
    default_size: int

    @classmethod
    def load(
        cls, path: str | Path, *, precision: str | None = None, backend: str = "auto", verify: bool = True
    ) -> Pipeline:
        """Open a bundle, or a folder that `optimum-cli export onnx` wrote.

        Args:
            precision: fp32, fp16…; default the first of these that every component has.
            backend: auto, onnxruntime, cuda, tensorrt or tensorrt_rtx.
            verify: compare the files' SHA-256 with the manifest before they are loaded; sizes are always compared.

        Raises:
            ArtifactError: the bundle or a file of it is missing, damaged or changed.
            UsageError: the bundle lacks that precision, or no such backend.
            ConfigError: the scheduler's config holds what is not supported.
            BackendError: the backend cannot be used here.
        """
        bundle = open_bundle(Path(path))
        precision = _precision_of(bundle, precision)
        if verify and bundle.manifest is not None:
            bundle.check(pipeline_files(bundle, precision, TEXT_TO_IMAGE))
        unet, vae = bundle.config("unet/config.json"), bundle.config("vae_decoder/config.json")
        scheduler = bundle.config("scheduler/scheduler_config.json")
        factor = vae_factor(vae)
        sessions = [open_session(bundle, component, precision, backend=backend) for component in TEXT_TO_IMAGE]
        return cls(
            name=bundle.manifest.name if bundle.manifest else bundle.path.name,
            precision=precision,
            tokenizer=load_tokenizer(bundle.path / "tokenizer"),
            text_encoder=sessions[0],
            unet=sessions[1],
            vae_decoder=sessions[2],
            schedule=NoiseSchedule.from_config(scheduler),
            default_sampler=str(scheduler.get("_class_name")),
            latent_channels=int(unet["in_channels"]),
            vae_factor=factor,
            scaling_factor=float(vae.get("scaling_factor") or 0.18215),
            shift_factor=float(vae.get("shift_factor") or 0.0),
            default_size=int(unet.get("sample_size") or 64) * factor,
        )

    @property
    def backend(self) -> str:
        """Which backend runs the U-Net, for people."""
        return self.unet.backend

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        sampler: str | None = None,
        schedule: str | None = None,
        steps: int = 20,
        guidance: float = 7.5,
        seed: int = 0,
        batch: int = 1,
        width: int | None = None,
        height: int | None = None,
        eta: float | None = None,
        on_step: Callable[[StepResult], None] | None = None,
    ) -> Result:
        """Draw `batch` pictures of each prompt.

        Args:
            prompt: what to draw; more than 75 tokens are cut, with a warning that shows what.
            negative_prompt: what guidance leads away from.
            sampler: in the spelling of A1111, ComfyUI or diffusers; default the checkpoint's own.
            schedule: leading, linspace, trailing, karras or exponential; default the checkpoint's own.
            steps: sampling steps, at least 1.
            guidance: scale of classifier-free guidance; 1 and below switch it off, as in diffusers.
            seed: of the first picture; picture i has seed + i, and is the same whatever batch it is drawn in.
            width, height: in pixels, multiples of 8; default what the checkpoint was trained at.
            eta: stochasticity of DDIM (default 0) and Euler a (default 1).
            on_step: called after each step with its index and latents; raising from it cancels the run.

        Raises:
            UsageError: an argument is out of its range, or a name is unknown (lists the near ones).
            BackendError: the backend failed, or the U-Net gave NaN or infinity.

        Warns:
            PromptTruncatedWarning: a prompt has more than 75 tokens.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows = [text for text in prompts for _ in range(_whole("batch", batch))]
        if not rows:
            raise UsageError("prompt: expected at least one, got none.")
        if not math.isfinite(guidance):
            raise UsageError(f"guidance: expected a finite number, got {guidance}. 5 to 8 are usual.")
        height = self.default_size if height is None else height
        width = self.default_size if width is None else width
        shape = latent_shape(len(rows), height, width, channels=self.latent_channels, factor=self.vae_factor)
        plan = plan_sampling(self.schedule, resolve_sampler(sampler or self.default_sampler), steps, spacing=schedule)
        noise = batch_noise(seed, len(rows))
        start = noise(shape) * np.float32(plan.init_noise_sigma)

        embeddings = self._embed(rows)
        negative = self._embed([negative_prompt] * len(rows)) if guidance > 1 else None
        solver = start_sampler(plan, start, noise=noise, eta=eta)
        latents = start
        for step in denoise(solver, guided(self.unet, embeddings, negative, guidance)):
            latents = step.latents
            if on_step is not None:
                on_step(step)
        images = decode_latents(
            self.vae_decoder, latents, scaling_factor=self.scaling_factor, shift_factor=self.shift_factor
        )
        seeds = tuple(int(seed) + index for index in range(len(rows)))
        note = f"Negative prompt: {negative_prompt}\n" if negative_prompt else ""
        settings = _settings(plan, steps, guidance, f"{width}x{height}", self.name)
        parameters = tuple(f"{row}\n{note}{settings.format(seed=s)}" for row, s in zip(rows, seeds, strict=True))
        return Result(images=images, latents=latents.astype(np.float32), seeds=seeds, parameters=parameters)

    def _embed(self, rows: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings of rows, each different prompt encoded once and alone, so that its batch cannot change it."""
        known = {text: encode_prompt(self.text_encoder, self.tokenizer, [text]) for text in dict.fromkeys(rows)}
        return np.concatenate([known[text] for text in rows])


def _precision_of(bundle: Bundle, wanted: str | None) -> str:
    held = bundle.precisions()
    if wanted is None and not held:
        raise UsageError(
            f"{bundle.path}: expected text_encoder, unet and vae_decoder in one precision, found none complete. "
            f"Run: latentrt export CHECKPOINT -o {bundle.path}"
        )
    if bundle.manifest is None:
        return held[0]
    return wanted or held[0]


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UsageError(f"{name}: expected a whole number of at least 1, got {value!r}.")
    return int(value)


def _settings(plan: SamplingPlan, steps: int, guidance: float, size: str, model: str) -> str:
    """The settings line of A1111, the seed left open."""
    spaced = plan.schedule
    spacing = spaced.timestep_spacing if spaced.sigma_spacing == "timesteps" else spaced.sigma_spacing
    kind = f"Schedule type: {spacing.capitalize()}, " if spacing else ""
    return (
        f"Steps: {steps}, Sampler: {plan.sampler.label}, {kind}CFG scale: {guidance:g}, Seed: {{seed}}, "
        f"Size: {size}, Model: {model.replace('{', '(').replace('}', ')')}"
    )
