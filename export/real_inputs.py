"""Inputs that the components see in a real sampling run, and what PyTorch answers.

Noise alone says little: a U-Net's activations at the last step, on a nearly clean latent, are not those at the
first. So the pipeline itself draws a few pictures and its own calls are recorded, answers included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from latentrt.runtime.specs import Array

from .parity import Case

PROMPTS = (
    "a small red circle at the top left of a blue background",
    "a photograph of a lighthouse on a cliff at sunset, highly detailed",
)
STEPS = 6
GUIDANCE = 5.0
# Latents are at most this large on a side: beyond, a run on a CPU takes minutes a step and shows nothing new.
LARGEST_LATENT = 64


def capture_cases(pipeline: Any, *, seed: int = 0) -> dict[str, list[Case]]:
    """Sample with a `StableDiffusionPipeline` and return parity cases by component.

    The U-Net's cases hold rows without and with the prompt, at four steps from the first to the last, and besides
    a single row, another size, a text of 154 embeddings, and rows at different timesteps in one call.

    Args:
        pipeline: float32, on the CPU; its scheduler is the checkpoint's own.
        seed: of the initial noise.
    """
    calls: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []

    def record(_module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        sample, timestep = args[0], args[1]
        feeds = {
            "sample": sample.clone(),
            "timestep": timestep.to(torch.float32).expand(len(sample)).clone(),
            "encoder_hidden_states": kwargs["encoder_hidden_states"].clone(),
        }
        calls.append((feeds, output[0].clone()))

    side = min(int(pipeline.unet.config.sample_size or LARGEST_LATENT), LARGEST_LATENT) * pipeline.vae_scale_factor
    hook = pipeline.unet.register_forward_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            latents = pipeline(
                list(PROMPTS),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                height=side,
                width=side,
                generator=[torch.Generator().manual_seed(seed + i) for i in range(len(PROMPTS))],
                output_type="latent",
            ).images
    finally:
        hook.remove()
    chosen = [calls[index] for index in np.linspace(0, len(calls) - 1, 4).round().astype(int)]
    with torch.no_grad():
        return {
            "text_encoder": _text_cases(pipeline),
            "unet": _unet_cases(pipeline.unet, chosen),
            **_vae_cases(pipeline.vae, latents),
        }


def _numpy(tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    return {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}


def _text_cases(pipeline: Any) -> list[Case]:
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    length = encoder.config.max_position_embeddings
    ids = tokenizer(
        ["", *PROMPTS, " ".join(PROMPTS * 9)],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    ).input_ids

    def case(name: str, rows: torch.Tensor) -> Case:
        out = encoder(rows, output_hidden_states=True)
        states = {f"hidden_states.{index}": state for index, state in enumerate(out.hidden_states)}
        expected = {"last_hidden_state": out.last_hidden_state, "pooler_output": out.pooler_output, **states}
        return Case(name, _numpy({"input_ids": rows}), _numpy(expected))

    return [case("empty, short and cut prompts", ids), case("one prompt", ids[1:2])]


def _unet_cases(unet: Any, calls: list[tuple[dict[str, torch.Tensor], torch.Tensor]]) -> list[Case]:
    cases = [
        Case(f"timestep {feeds['timestep'][0]:g}", _numpy(feeds), _numpy({"out_sample": output}))
        for feeds, output in calls
    ]

    def case(name: str, feeds: dict[str, torch.Tensor]) -> Case:
        # Row by row, as diffusers would with each row's own scalar timestep.
        rows = [
            unet(sample[None], timestep, text[None], return_dict=False)[0]
            for sample, timestep, text in zip(*feeds.values(), strict=True)
        ]
        return Case(name, _numpy(feeds), _numpy({"out_sample": torch.cat(rows)}))

    first, middle = calls[0][0], calls[len(calls) // 2][0]
    mixed = {name: torch.stack([feeds[name][-1] for feeds, _ in calls]) for name in first}
    text = middle["encoder_hidden_states"]
    height, width = middle["sample"].shape[2:]
    cut = middle["sample"][:, :, : max(height * 3 // 4, 1), : max(width - 1, 1)]
    return [
        *cases,
        case("one row", {name: tensor[-1:] for name, tensor in first.items()}),
        case("154 embeddings", {**middle, "encoder_hidden_states": torch.cat([text, text.flip(0)], dim=1)}),
        case("another size", {**middle, "sample": cut}),
        case("mixed timesteps", mixed),
    ]


def _vae_cases(vae: Any, latents: torch.Tensor) -> dict[str, list[Case]]:
    # As the pipeline does: some VAEs also have a shift, but not those of Stable Diffusion 1 and 2.
    latents = latents / vae.config.scaling_factor
    pictures = vae.decode(latents, return_dict=False)[0]
    seen = pictures.clamp(-1, 1)
    factor = pictures.shape[-1] // latents.shape[-1]
    height, width = latents.shape[2:]
    rows, columns = max(height // 2, 1), max(width - 1, 1)

    def decoded(name: str, sample: torch.Tensor) -> Case:
        expected = {"sample": vae.decode(sample, return_dict=False)[0]}
        return Case(name, _numpy({"latent_sample": sample}), _numpy(expected))

    def encoded(name: str, sample: torch.Tensor) -> Case:
        expected = {"latent_parameters": vae.encode(sample).latent_dist.parameters}
        return Case(name, _numpy({"sample": sample}), _numpy(expected))

    return {
        "vae_decoder": [
            Case("final latents", _numpy({"latent_sample": latents}), _numpy({"sample": pictures})),
            decoded("another size", latents[:1, :, :rows, :columns]),
        ],
        "vae_encoder": [
            encoded("decoded pictures", seen),
            encoded("another size", seen[:1, :, : rows * factor, : columns * factor]),
        ],
    }
