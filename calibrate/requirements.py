"""What a calibration needs, and what of it can be told to be missing before anything is computed."""

from __future__ import annotations

import torch

from latentrt.export.resources import available_memory
from latentrt.runtime.errors import BackendError, UsageError
from latentrt.runtime.latents import latent_shape
from latentrt.runtime.model_facts import read_facts

from .budget import check_measurable
from .calibration_options import CalibrateOptions, captured_by
from .judge import load_judge
from .prompts import PromptSplit
from .source import Source


def check_options(options: CalibrateOptions) -> None:
    """Refuse options that no bundle could be calibrated with.

    Raises:
        UsageError: a budget cannot be measured, or the judge cannot be imported.
        ArtifactError: the weights of LPIPS cannot be read.
        BackendError: PyTorch does not have the device.
    """
    check_measurable(options.budgets, judge=options.judge is not None, lpips=options.lpips is not None, calls=True)
    if options.judge is not None:
        load_judge(options.judge)
    if options.lpips is not None:
        from .lpips import open_lpips

        open_lpips(options.lpips)
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as err:
        raise BackendError(
            f"device: expected one that PyTorch has, got {options.device!r}: {err}. Use cpu, or install PyTorch for "
            "your GPU."
        ) from err


def check_source(source: Source, options: CalibrateOptions, split: PromptSplit) -> None:
    """Refuse a bundle that lacks what results are compared with, and settings that it cannot draw.

    Raises:
        UsageError: the network is not there in fp16, or a setting is out of its range.
    """
    path, component = source.bundle.path, source.component
    if not {"fp16", "mixed"} & set(source.bundle.held(component)):
        raise UsageError(
            f"{path}: expected {component} in fp16 as well, whose noise {options.numbers.precision}'s is compared "
            f"with, found none. Run: latentrt export CHECKPOINT -o {path} --precision fp32,fp16"
        )
    request, facts = captured_by(options, split, "calibration").request(0), read_facts(source.bundle)
    height, width = (facts.default_size if side is None else side for side in (request.height, request.width))
    latent_shape(1, height, width, channels=facts.latent_channels, factor=facts.vae_factor)


def check_memory(source: Source, needed: int, what: str) -> None:
    """Refuse to start what the host's memory cannot hold.

    Args:
        needed: bytes.
        what: they are for, for the message.

    Raises:
        UsageError: less is free.
    """
    available = available_memory()
    if available is not None and not needed <= available:
        raise UsageError(
            f"{source.component}: expected {needed / 1e9:.1f} GB of free memory for {what}, got "
            f"{available / 1e9:.1f} GB. Close other programs, or calibrate on a machine with more."
        )
