"""Checkpoints of published size with random weights, here with few channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import full_size
import pytest

from latentrt.benchmarks.machine_facts import RANDOM_WEIGHTS
from latentrt.export.published_configs import published_configs

FEW: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 32, "layers_per_block": 1},
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def narrow(family: str) -> dict[str, Any]:
    configs = dict(published_configs(family))
    return configs | {part: {**configs[part], **changed} for part, changed in FEW.items()}


def test_diffusers_opens_what_is_marked_as_random(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(full_size, "published_configs", narrow)
    folder = full_size.write_checkpoint("sd1", tmp_path / "sd1")
    assert json.loads((folder / "model_index.json").read_text())[RANDOM_WEIGHTS] is True
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    weight = pipe.unet.mid_block.resnets[0].conv1.weight
    # Drawn for activations of unit size: variance 1 / fan-in.
    assert float(weight.detach().std()) == pytest.approx((64 * 9) ** -0.5, rel=0.05)
