"""Draw pictures from a bundle: NumPy and an inference backend, no PyTorch.

from latentrt.runtime import Pipeline

pipe = Pipeline.load("shapes.bundle")
picture = pipe("a small red circle on a blue background", seed=42).images[0]
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Names are loaded when they are first asked for: a process that wants one part does not pay for the rest.
if TYPE_CHECKING:
    from .bundle import Bundle, open_bundle
    from .components import Components
    from .denoise import denoise
    from .drawing import StepInfo
    from .engine_host import EngineHost
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
    from .onnx_cuda import CudaOptions
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
    "CudaOptions",
    "EngineHost",
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

_MODULES = {
    "bundle": (
        "Bundle",
        "open_bundle",
    ),
    "components": ("Components",),
    "denoise": ("denoise",),
    "drawing": ("StepInfo",),
    "engine_host": ("EngineHost",),
    "errors": (
        "ArtifactError",
        "BackendError",
        "BuildError",
        "ConfigError",
        "DeadlineError",
        "ExportError",
        "LatentrtError",
        "UsageError",
    ),
    "image": (
        "contact_sheet",
        "save_png",
        "to_uint8",
    ),
    "latents": (
        "decode_latents",
        "latent_shape",
    ),
    "manifest": (
        "Artifact",
        "EngineRecord",
        "FileRecord",
        "Manifest",
        "load_manifest",
    ),
    "noise": ("batch_noise",),
    "noise_schedule": ("NoiseSchedule",),
    "onnx_cuda": ("CudaOptions",),
    "pipeline": (
        "Pipeline",
        "Result",
        "base_and_refiner",
    ),
    "request": (
        "Control",
        "Hires",
        "Request",
    ),
    "sampler_loop": (
        "Evaluation",
        "StepResult",
        "drive",
        "with_model",
    ),
    "sampler_names": (
        "SAMPLERS",
        "SCHEDULES",
        "resolve_sampler",
        "resolve_schedule",
    ),
    "sampler_spec": ("SamplerSpec",),
    "sampling_plan": (
        "SamplingPlan",
        "plan_sampling",
        "start_sampler",
    ),
    "session": ("OnnxSession",),
    "specs": (
        "ModelSpec",
        "Session",
        "TensorSpec",
    ),
    "steps": ("Step",),
    "tokenizer": (
        "ClipTokenizer",
        "PromptTruncatedWarning",
        "load_tokenizer",
    ),
    "torch_rng": (
        "TorchGenerator",
        "torch_randn",
    ),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
