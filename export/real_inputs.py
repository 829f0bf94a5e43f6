"""Inputs that the components see in a real sampling run, and what PyTorch answers.

Noise alone says little: a U-Net's activations at the last step, on a nearly clean latent, are not those at the
first. So the pipeline itself draws a few pictures and its own calls are recorded, answers included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.nn.functional import interpolate

from latentrt.runtime.image import to_uint8
from latentrt.runtime.specs import Array

from .controlnet import DOWN_SAMPLE, MID_SAMPLE
from .parity import Case
from .reference_run import (
    PROMPTS,
    THOROUGH,
    Call,
    Effort,
    Feeds,
    added_conditions,
    chosen_calls,
    row_of,
    rows_of,
    sample_and_record,
)
from .safety_checker import SafetyChecker
from .unet import DOWN_RESIDUAL, MID_RESIDUAL


def capture_cases(
    pipeline: Any, extras: Mapping[str, Any] = MappingProxyType({}), *, seed: int = 0, effort: Effort = THOROUGH
) -> dict[str, list[Case]]:
    """Sample with a pipeline and return parity cases by component.

    The U-Net's cases hold rows without and with the prompt, at four steps from the first to the last, and besides
    a single row, another size, a text of 154 embeddings, and rows at different timesteps in one call. ControlNets
    see the same, with the pictures of the run as hints.

    Args:
        pipeline: float32, on the CPU; its scheduler is the checkpoint's own.
        extras: ControlNets, TAESD and safety checker by part, and the checker's preprocessing as `preprocess`.
        seed: of the initial noise.
        effort: how much to draw and to ask for.
    """
    calls, latents = sample_and_record(pipeline, seed=seed, effort=effort)
    chosen = chosen_calls(calls)
    with torch.no_grad():
        cases = {"unet": _unet_cases(pipeline.unet, chosen, effort), **_vae_cases(pipeline.vae, latents, effort)}
        for name in ("text_encoder", "text_encoder_2"):
            if (encoder := getattr(pipeline, name, None)) is not None:
                tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
                cases[name] = _text_cases(tokenizer, encoder)
        controlnets = {name: model for name, model in extras.items() if name.startswith("controlnet")}
        if controlnets:
            pictures = torch.from_numpy(cases["vae_decoder"][0].expected["sample"]).add(1).div(2).clamp(0, 1)
            cases |= _control_cases(pipeline.unet, controlnets, chosen, pictures, effort)
        if "taesd" in extras:
            cases["taesd_decoder"] = _taesd_cases(extras["taesd"], latents)
        if "safety_checker" in extras:
            shown = to_uint8(cases["vae_decoder"][0].expected["sample"])
            cases["safety_checker"] = _checker_cases(extras["safety_checker"], extras["preprocess"](shown))
    return cases


def _numpy(tensors: Mapping[str, torch.Tensor]) -> dict[str, Array]:
    return {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}


def _text_cases(tokenizer: Any, encoder: Any) -> list[Case]:
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
        heads = ("text_embeds", "last_hidden_state", "pooler_output")
        expected = {head: value for head in heads if (value := getattr(out, head, None)) is not None}
        states = {f"hidden_states.{index}": state for index, state in enumerate(out.hidden_states)}
        return Case(name, _numpy({"input_ids": rows}), _numpy({**expected, **states}))

    return [case("empty, short and cut prompts", ids), case("one prompt", ids[1:2])]


def _variations(calls: list[Call]) -> dict[str, Feeds]:
    """What the chosen calls do not hold: one row, a longer text, another size, rows at different timesteps."""
    first, middle = calls[0].feeds, calls[len(calls) // 2].feeds
    text = middle["encoder_hidden_states"]
    height, width = middle["sample"].shape[2:]
    cut = middle["sample"][:, :, : max(height * 3 // 4, 1), : max(width - 1, 1)]
    return {
        "one row": row_of(first, len(first["sample"]) - 1),
        "154 embeddings": {**middle, "encoder_hidden_states": torch.cat([text, text.flip(0)], dim=1)},
        "another size": {**middle, "sample": cut},
        "mixed timesteps": {name: torch.stack([call.feeds[name][-1] for call in calls]) for name in first},
    }


def _row_by_row(model: Callable[[Feeds], Feeds], feeds: Feeds) -> Feeds:
    """Ask for each row alone, as diffusers would with the row's own scalar timestep."""
    rows = [model(row) for row in rows_of(feeds)]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _unet_cases(unet: Any, calls: list[Call], effort: Effort) -> list[Case]:
    def predict(row: Feeds) -> Feeds:
        return {"out_sample": _prediction(unet, row)}

    varied = _variations(calls) if effort.variations else {}
    return [
        *(
            Case(f"timestep {call.feeds['timestep'][0]:g}", _numpy(call.feeds), _numpy({"out_sample": call.output}))
            for call in calls
        ),
        *(Case(name, _numpy(feeds), _numpy(_row_by_row(predict, feeds))) for name, feeds in varied.items()),
    ]


def _prediction(unet: Any, row: Feeds) -> torch.Tensor:
    down = tuple(tensor for name, tensor in row.items() if name.startswith(DOWN_RESIDUAL))
    out: torch.Tensor = unet(
        row["sample"],
        row["timestep"][0],
        row["encoder_hidden_states"],
        timestep_cond=row.get("timestep_cond"),
        added_cond_kwargs=added_conditions(row),
        down_block_additional_residuals=down or None,
        mid_block_additional_residual=row.get(MID_RESIDUAL),
        return_dict=False,
    )[0]
    return out


def _control_cases(
    unet: Any, controlnets: Mapping[str, Any], calls: list[Call], pictures: torch.Tensor, effort: Effort
) -> dict[str, list[Case]]:
    """Cases of every ControlNet, and of the U-Net with the sum of what they give."""
    found: dict[str, list[Case]] = {name: [] for name in (*controlnets, "unet_control")}
    latent = next(iter(controlnets.values())).config.in_channels
    factor = pictures.shape[-1] // calls[0].feeds["sample"].shape[-1]
    timesteps = {f"timestep {call.feeds['timestep'][0]:g}": call.feeds for call in calls[:: max(len(calls) - 1, 1)]}
    for case, feeds in {**timesteps, **(_variations(calls) if effort.variations else {})}.items():
        rows, size = len(feeds["sample"]), [factor * side for side in feeds["sample"].shape[2:]]
        hint = interpolate(pictures[torch.arange(rows) % len(pictures)], size=size, mode="area")
        given = {name: tensor for name, tensor in feeds.items() if name != "timestep_cond"}
        given |= {
            "sample": feeds["sample"][:, :latent],
            "controlnet_cond": hint,
            "conditioning_scale": torch.linspace(0.4, 1.0, rows),
        }
        total: Feeds = {}
        for name, model in controlnets.items():
            residuals = _row_by_row(lambda row, model=model: _residuals(model, row), given)  # type: ignore[misc]
            found[name].append(Case(case, _numpy(given), _numpy(residuals)))
            total = {key: total[key] + value if total else value for key, value in residuals.items()}
        steered = {
            **feeds,
            **{
                key.replace(DOWN_SAMPLE, DOWN_RESIDUAL).replace(MID_SAMPLE, MID_RESIDUAL): v for key, v in total.items()
            },
        }
        answer = _row_by_row(lambda row: {"out_sample": _prediction(unet, row)}, steered)
        found["unet_control"].append(Case(case, _numpy(steered), _numpy(answer)))
    return found


def _residuals(controlnet: Any, row: Feeds) -> Feeds:
    down, mid = controlnet(
        row["sample"],
        row["timestep"][0],
        row["encoder_hidden_states"],
        controlnet_cond=row["controlnet_cond"],
        conditioning_scale=float(row["conditioning_scale"]),
        added_cond_kwargs=added_conditions(row),
        return_dict=False,
    )
    return {**{f"{DOWN_SAMPLE}{index}": residual for index, residual in enumerate(down)}, MID_SAMPLE: mid}


def _vae_cases(vae: Any, latents: torch.Tensor, effort: Effort) -> dict[str, list[Case]]:
    # As the pipeline does: some VAEs also have a shift, but not those of Stable Diffusion 1, 2 and XL.
    latents = latents / vae.config.scaling_factor
    pictures = vae.decode(latents, return_dict=False)[0]
    seen = pictures.clamp(-1, 1)
    factor = pictures.shape[-1] // latents.shape[-1]
    cut = _cut(latents)
    rows, columns = cut.shape[2:]

    def decoded(name: str, sample: torch.Tensor) -> Case:
        expected = {"sample": vae.decode(sample, return_dict=False)[0]}
        return Case(name, _numpy({"latent_sample": sample}), _numpy(expected))

    def encoded(name: str, sample: torch.Tensor) -> Case:
        expected = {"latent_parameters": vae.encode(sample).latent_dist.parameters}
        return Case(name, _numpy({"sample": sample}), _numpy(expected))

    cases = {
        "vae_decoder": [Case("final latents", _numpy({"latent_sample": latents}), _numpy({"sample": pictures}))],
        "vae_encoder": [encoded("decoded pictures", seen)],
    }
    if effort.variations:
        cases["vae_decoder"].append(decoded("another size", cut))
        cases["vae_encoder"].append(encoded("another size", seen[:1, :, : rows * factor, : columns * factor]))
    return cases


def _cut(latents: torch.Tensor) -> torch.Tensor:
    """One row of another size."""
    height, width = latents.shape[2:]
    return latents[:1, :, : max(height // 2, 1), : max(width - 1, 1)]


def _taesd_cases(taesd: Any, latents: torch.Tensor) -> list[Case]:
    return [
        Case(name, _numpy({"latent_sample": sample}), _numpy({"sample": taesd.decode(sample, return_dict=False)[0]}))
        for name, sample in (("final latents", latents), ("another size", _cut(latents)))
    ]


def _checker_cases(checker: Any, pictures: Array) -> list[Case]:
    """Of preprocessed pictures, together and the first one alone."""
    scores = SafetyChecker(checker)

    def case(name: str, rows: torch.Tensor) -> Case:
        special, concepts = scores(rows)
        return Case(name, _numpy({"clip_input": rows}), _numpy({"special_scores": special, "concept_scores": concepts}))

    seen = torch.from_numpy(pictures)
    return [case("decoded pictures", seen), case("one picture", seen[:1])]
