"""Draw pictures from a bundle: NumPy and an inference backend, no PyTorch.

from latentrt.runtime import Pipeline

pipe = Pipeline.load("shapes.bundle")
picture = pipe("a small red circle on a blue background", seed=42).images[0]
"""

from .bundle import Bundle, open_bundle
from .components import Components
from .denoise import denoise
from .drawing import StepInfo
from .errors import (
    ArtifactError,
    BackendError,
    BuildError,
    ConfigError,
    DeadlineError,
    ExportError,
    LatentrtError,
    UsageError,
)
from .image import contact_sheet, save_png, to_uint8
from .latents import decode_latents, latent_shape
from .manifest import Artifact, EngineRecord, FileRecord, Manifest, load_manifest
from .noise import batch_noise
from .noise_schedule import NoiseSchedule
from .pipeline import Pipeline, Result, base_and_refiner
from .request import Control, Hires, Request
from .sampler_loop import Evaluation, StepResult, drive, with_model
from .sampler_names import SAMPLERS, SCHEDULES, resolve_sampler, resolve_schedule
from .sampler_spec import SamplerSpec
from .sampling_plan import SamplingPlan, plan_sampling, start_sampler
from .session import OnnxSession
from .specs import ModelSpec, Session, TensorSpec
from .steps import Step
from .tokenizer import ClipTokenizer, PromptTruncatedWarning, load_tokenizer
from .torch_rng import TorchGenerator, torch_randn

__all__ = [
    # pipeline
    "Pipeline",
    "Result",
    "decode_latents",
    "denoise",
    "StepInfo",
    "Request",
    "Control",
    "Hires",
    "Components",
    "base_and_refiner",
    "latent_shape",
    # samplers
    "SAMPLERS",
    "SCHEDULES",
    "Evaluation",
    "NoiseSchedule",
    "SamplerSpec",
    "SamplingPlan",
    "Step",
    "StepResult",
    "drive",
    "plan_sampling",
    "resolve_sampler",
    "resolve_schedule",
    "start_sampler",
    "with_model",
    # noise
    "TorchGenerator",
    "batch_noise",
    "torch_randn",
    # bundle
    "Artifact",
    "Bundle",
    "EngineRecord",
    "FileRecord",
    "Manifest",
    "load_manifest",
    "open_bundle",
    # sessions
    "ModelSpec",
    "OnnxSession",
    "Session",
    "TensorSpec",
    # text
    "ClipTokenizer",
    "PromptTruncatedWarning",
    "load_tokenizer",
    # pictures
    "contact_sheet",
    "save_png",
    "to_uint8",
    # errors
    "ArtifactError",
    "BackendError",
    "BuildError",
    "ConfigError",
    "DeadlineError",
    "ExportError",
    "LatentrtError",
    "UsageError",
]
