"""A short sampling run of a checkpoint's own diffusers pipeline, with every call of its U-Net recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .networks import libraries_quiet

PROMPTS = (
    "a small red circle at the top left of a blue background",
    "a photograph of a lighthouse on a cliff at sunset, highly detailed",
)
GUIDANCE = 5.0
# The U-Net's conditions as diffusers hands them over: those below `added_cond_kwargs`, then those beside it.
ADDED, BESIDE = ("text_embeds", "time_ids"), ("timestep_cond",)

Feeds = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Effort:
    """How much a reference run draws.

    Attributes:
        name: as the manifest has it.
        prompts: how many of `PROMPTS`.
        steps: of the sampler.
        largest_latent: latents are at most this large on a side.
        variations: also ask for what the run itself does not hold: other sizes, longer texts, single rows.
        plain: also run half-precision graphs as ONNX Runtime would, not only rounded as they are written.
    """

    name: str
    prompts: int
    steps: int
    largest_latent: int
    variations: bool = True
    plain: bool = True


# Beyond 64, a run on a CPU takes minutes a step and shows nothing new.
THOROUGH = Effort("full", prompts=2, steps=6, largest_latent=64)
# For networks of hundreds of millions of weights, whose activations shall not be what takes the memory.
LARGE = Effort("full", prompts=1, steps=4, largest_latent=24)
# For graphs that are proven and only have other weights, each of which takes part in a single call. What costs time is
# reading them, whatever the size of the picture.
QUICK = Effort("quick", prompts=1, steps=1, largest_latent=8, variations=False, plain=False)
# For graphs that are proven, by those who will look at the pictures themselves.
NONE = Effort("none", prompts=0, steps=0, largest_latent=0, variations=False, plain=False)


@dataclass(frozen=True)
class Call:
    """What the U-Net was given, by the names of the component contract, and what it answered."""

    feeds: Feeds
    output: torch.Tensor


def sample_and_record(pipeline: Any, *, seed: int, effort: Effort) -> tuple[list[Call], torch.Tensor]:
    """Draw some of `PROMPTS` and return the U-Net's calls, and the final latents (prompts, c, h, w).

    Pipelines that start from a picture get a drawn one; those that inpaint, a mask of its left half.

    Args:
        pipeline: float32, on the CPU; its scheduler is the checkpoint's own.
        seed: of the initial noise.
        effort: how much to draw.
    """
    prompts = PROMPTS[: effort.prompts]
    calls: list[Call] = []

    def record(_module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        sample, timestep = args[0], torch.as_tensor(args[1])
        feeds = {
            "sample": sample.clone(),
            "timestep": timestep.to(torch.float32).expand(len(sample)).clone(),
            "encoder_hidden_states": kwargs["encoder_hidden_states"].clone(),
        }
        conditions = {**(kwargs.get("added_cond_kwargs") or {}), **{name: kwargs.get(name) for name in BESIDE}}
        feeds |= {
            n: conditions[n].to(torch.float32).clone() for n in (*ADDED, *BESIDE) if conditions.get(n) is not None
        }
        calls.append(Call(feeds, output[0].clone()))

    hook = pipeline.unet.register_forward_hook(record, with_kwargs=True)
    try:
        with libraries_quiet(), torch.no_grad():
            latents = pipeline(
                list(prompts),
                num_inference_steps=effort.steps,
                guidance_scale=GUIDANCE,
                generator=[torch.Generator().manual_seed(seed + i) for i in range(len(prompts))],
                output_type="latent",
                **_picture_arguments(pipeline, effort),
            ).images
    finally:
        hook.remove()
    return calls, latents


def _picture_arguments(pipeline: Any, effort: Effort) -> dict[str, Any]:
    largest = effort.largest_latent
    side = min(int(pipeline.unet.config.sample_size or largest), largest) * pipeline.vae_scale_factor
    picture = drawn_picture(side).expand(effort.prompts, -1, -1, -1)
    name = type(pipeline).__name__
    if "Inpaint" in name:
        mask = (torch.arange(side) < side // 2).float().expand(effort.prompts, 1, side, side)
        return {"image": picture, "mask_image": mask, "strength": 1.0, "height": side, "width": side}
    if "InstructPix2Pix" in name:
        return {"image": picture}
    if "Img2Img" in name:
        return {"image": picture, "strength": 1.0}
    return {"height": side, "width": side}


def drawn_picture(side: int) -> torch.Tensor:
    """A disc before two gradients, (1, 3, side, side) in [0, 1]: flat and smooth areas, and an edge."""
    ramp = torch.linspace(0, 1, side)
    down, across = ramp[:, None].expand(side, side), ramp[None].expand(side, side)
    disc = ((down - 0.4) ** 2 + (across - 0.6) ** 2 < 0.06).float()
    return torch.stack([disc, down, across * (1 - disc)])[None]


def chosen_calls(calls: list[Call]) -> list[Call]:
    """Four calls, from the first to the last, or all if there are fewer."""
    return [calls[index] for index in np.linspace(0, len(calls) - 1, min(4, len(calls))).round().astype(int)]


def row_of(feeds: Feeds, index: int) -> Feeds:
    """One row of a call."""
    return {name: tensor[index : index + 1] for name, tensor in feeds.items()}


def rows_of(feeds: Feeds) -> list[Feeds]:
    """A call, row by row."""
    return [row_of(feeds, index) for index in range(len(feeds["sample"]))]


def added_conditions(feeds: Feeds) -> Feeds | None:
    """The `added_cond_kwargs` of diffusers."""
    return {name: feeds[name] for name in ADDED} if "time_ids" in feeds else None
