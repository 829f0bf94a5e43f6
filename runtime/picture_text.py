"""What a picture's file says of how it was made: the web UIs' text, and a record to make it again from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .bundle import Bundle
from .image import Pictures, picture_digest
from .infotext import Setting, format_infotext
from .lora_store import ActiveLora, held_loras, lora_path
from .lora_weights import lora_notes
from .manifest import key_of
from .opened_model import Model
from .request import Request, to_record
from .run_start import picture_seeds
from .sampling_plan import SamplingPlan
from .text_encoding import Embeddings


def bundle_digest(bundle: Bundle) -> str | None:
    """A hash of all the files a bundle's pictures can depend on, LoRAs apart; None for a folder without a manifest."""
    if bundle.manifest is None:
        return None
    loras = {lora_path(name) for name in held_loras(bundle.manifest)}
    files = bundle.manifest.files.items()
    return key_of({name: record.sha256 for name, record in sorted(files) if name not in loras})


def infotext(
    request: Request,
    plan: SamplingPlan,
    index: int,
    *,
    size: tuple[int, int],
    model: str,
    loras: Sequence[ActiveLora] = (),
) -> str:
    """The parameters text of picture `index`, as A1111 writes it."""
    which = index // request.batch
    prompt, negative = request.prompts()[which], request.negatives()[which]
    seeds, variations = picture_seeds(request)
    spaced = plan.schedule
    spacing = spaced.timestep_spacing if spaced.sigma_spacing == "timesteps" else spaced.sigma_spacing
    settings: dict[str, Setting] = {
        "Steps": request.steps,
        "Sampler": plan.sampler.label,
        "Schedule type": spacing.capitalize() if spacing else None,
        "CFG scale": request.guidance,
        "Seed": seeds[index],
        "Size": f"{size[1]}x{size[0]}",
        "Model": model,
    }
    if request.image is not None or request.latents is not None:
        settings["Denoising strength"] = request.strength
    if request.clip_skip:
        settings["Clip skip"] = request.clip_skip + 1  # the web UI counts the last layer as 1
    if request.variation_strength:
        settings |= {
            "Variation seed": variations[index],
            "Variation seed strength": request.variation_strength,
        }
    if request.resize_seed_from is not None:
        settings["Seed resize from"] = f"{request.resize_seed_from[1]}x{request.resize_seed_from[0]}"
    if request.rng != "cpu":
        settings["RNG"] = {"cuda": "GPU", "numpy": "NumPy"}[request.rng]
    if request.eta is not None:
        settings["Eta"] = request.eta
    if request.guidance_rescale:
        settings["CFG Rescale"] = request.guidance_rescale
    if loras:
        settings["Lora"] = ", ".join(f"{active.lora.name}:{active.scale:g}" for active in loras)
    if request.hires is not None:
        settings |= {
            "Hires upscale": request.hires.scale,
            "Hires steps": request.hires.steps,
            "Hires upscaler": request.hires.upscaler,
            "Denoising strength": request.hires.strength,
        }
    return format_infotext(
        "(embeddings)" if isinstance(prompt, Embeddings) else prompt,
        "(embeddings)" if isinstance(negative, Embeddings) else negative or "",
        {name: value for name, value in settings.items() if value is not None},
    )


def picture_records(model: Model, request: Request, pictures: Pictures, name: str) -> tuple[dict[str, Any], ...]:
    """What `latentrt replay` needs to make each picture again, and to tell whether it did.

    Args:
        pictures: (n, h, w, 3); none if they were not decoded.
        name: of the bundle.
    """
    from importlib.metadata import version  # 25 ms

    seeds, variations = picture_seeds(request)
    components = model.components
    common = {
        "latentrt": version("latentrt"),
        "bundle": {"name": name, "sha256": bundle_digest(components.bundle)},
        "textual_inversions": {item.names[0]: item.sha256 for item in model.inversions},
        "loras": lora_notes(components.loras),
        "precision": components.precision,
        "backend": components["unet"].backend,
    }

    def alone(index: int) -> Request:
        which = index // request.batch
        return request.replace(
            prompt=request.prompts()[which],
            negative_prompt=request.negatives()[which],
            batch=1,
            seed=[seeds[index]] if request.variation_strength else seeds[index],
            variation_seed=variations[index] if request.variation_strength else None,
        )

    digests: list[str | None] = [picture_digest(picture) for picture in pictures]
    return tuple(
        {**common, "request": to_record(alone(index)), "picture": digest}
        for index, digest in enumerate(digests or [None] * len(seeds))
    )


def recorded(record: Mapping[str, Any], *names: str) -> Any:
    """A value inside a record, None where it has none."""
    value: Any = record
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
