"""diffusers' StableDiffusionSafetyChecker: how near a picture is to concepts that it looks for.

The graph gives the scores; what follows from them, and the preprocessing, are `latentrt.runtime.safety_checker`'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from latentrt.runtime.specs import ModelSpec, TensorSpec

from .component import Component
from .unet import ramp

NAME = "safety_checker"


class SafetyChecker(nn.Module):
    """The checker as a function of its tensors, up to where diffusers goes on in Python."""

    def __init__(self, checker: Any) -> None:
        super().__init__()
        self.checker = checker

    def forward(self, clip_input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Preprocessed pictures (b, 3, 224, 224) to scores (b, 3) and (b, 17), above 0 where a threshold is passed."""
        checker = self.checker
        pooled = checker.vision_model(clip_input).pooler_output
        embeds = normalize(checker.visual_projection(pooled))

        def scores(concepts: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
            return embeds @ normalize(concepts).T - thresholds

        return (
            scores(checker.special_care_embeds, checker.special_care_embeds_weights),
            scores(checker.concept_embeds, checker.concept_embeds_weights),
        )


def safety_checker_component(checker: Any) -> Component:
    """Wrap a `StableDiffusionSafetyChecker` (float32, eval)."""
    vision = checker.config.vision_config
    shape = (int(vision.num_channels), int(vision.image_size), int(vision.image_size))
    outputs = {"special_scores": checker.special_care_embeds, "concept_scores": checker.concept_embeds}
    return Component(
        module=SafetyChecker(checker).eval(),
        example_inputs={"clip_input": ramp(2, *shape, low=-2, high=2)},
        spec=ModelSpec(
            name=NAME,
            inputs=(TensorSpec("clip_input", "float32", ("batch", *shape)),),
            outputs=tuple(TensorSpec(name, "float32", ("batch", len(concepts))) for name, concepts in outputs.items()),
        ),
    )
