"""Checkpoints of published size with random weights, written without holding a network in memory.

Good for time, memory and numbers of every kind except pictures: weights are drawn so that activations keep about unit
size, which is what trained ones do.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import init_empty_weights

from latentrt.benchmarks.machine_facts import RANDOM_WEIGHTS
from latentrt.export.clip_tokenizer import tokenizer_files
from latentrt.export.networks import libraries_quiet
from latentrt.export.published_configs import published_configs

FAMILIES = ("sd1", "sd2", "sdxl", "refiner")
CLASSES = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}


def write_checkpoint(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a diffusers folder in float16.

    Args:
        family: of FAMILIES.
        folder: to make.
        seed: of the weights.
    """
    configs = published_configs(family)
    # diffusers leaves keys alone that begin with an underscore.
    _write_json(folder / "model_index.json", {**configs["model_index"], RANDOM_WEIGHTS: True})
    _write_json(folder / "scheduler" / "scheduler_config.json", configs["scheduler"])
    for part, model_class in CLASSES.items():
        if part in configs:
            _write_json(folder / part / "config.json", configs[part])
            stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
            shapes = _shapes(model_class, configs[part])
            _write_weights(folder / part / f"{stem}.safetensors", shapes, np.random.default_rng([seed, len(part)]))
    for part in ("tokenizer", "tokenizer_2"):
        if part.replace("tokenizer", "text_encoder") in configs:
            for name, content in tokenizer_files("!" if part == "tokenizer_2" else "<|endoftext|>").items():
                (folder / part).mkdir(exist_ok=True)
                (folder / part / name).write_bytes(content)
    return folder


def held_families(results: Path) -> dict[str, Any]:
    """The families of a results file, which a run for one of them leaves as they are."""
    families: dict[str, Any] = json.loads(results.read_text())["families"] if results.exists() else {}
    return families


def _write_json(path: Path, config: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2))


def _shapes(model_class: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with libraries_quiet(), init_empty_weights(include_buffers=False):
        import diffusers
        import transformers

        if model_class.startswith("CLIP"):
            model = getattr(transformers, model_class)(transformers.CLIPTextConfig.from_dict(dict(config)))
        else:
            model = getattr(diffusers, model_class).from_config(dict(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _write_weights(path: Path, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            stream.write(_values(name, shape, rng).tobytes())


def _values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    if len(shape) == 1:
        # Norms near one, biases near zero.
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return (centre + 0.05 * rng.standard_normal(shape, np.float32)).astype(np.float16)
    values = rng.standard_normal(shape, np.float32)
    values *= 0.02 if "embedding.weight" in name else 1 / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float16)
