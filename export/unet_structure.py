"""The blocks of a U-Net or ControlNet, read from the names and shapes of its weights.

A single file holds no config, and pruned and distilled models have fewer blocks than the published ones: so levels,
residual blocks and transformer blocks are counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentrt.runtime.errors import ArtifactError

from .weight_shapes import shape_of
from .weights import Weights


@dataclass(frozen=True)
class UnetStructure:
    """Blocks of a U-Net, or of the half of one that a ControlNet is.

    Attributes:
        channels: of each level.
        down: transformer blocks behind each residual block on the way down, by level; 0 without attention.
        mid: transformer blocks in the middle; 0 for a single residual block, None for no middle.
        up: as `down`, on the way up from the lowest level; empty in a ControlNet.
        added: whether it embeds sizes and pooled text beside the timestep, as SDXL's do.
    """

    channels: tuple[int, ...]
    down: tuple[tuple[int, ...], ...]
    mid: int | None
    up: tuple[tuple[int, ...], ...]
    added: bool

    @property
    def layers(self) -> int:
        """Residual blocks of a level on the way down."""
        return max(map(len, self.down))


def ldm_structure(weights: Weights, origin: Path, *, goes_up: bool) -> UnetStructure:
    """The structure of a network with the names of the original implementation.

    Args:
        weights: by names such as `input_blocks.0.0.weight`.
        origin: where they came from, for messages.
        goes_up: whether it is a whole U-Net.

    Raises:
        ArtifactError: weights that show the structure are missing.
    """
    depths = _depths(weights)
    halvings = {int(match[1]) for match in _matches(r"input_blocks\.(\d{1,2})\.0\.op\.", weights)}
    blocks = _count(r"input_blocks\.(\d{1,2})\.", weights)
    levels: list[list[int]] = [[]]
    for block in range(1, blocks):
        if block in halvings:
            levels.append([])
        else:
            levels[-1].append(block)
    if not all(levels):
        raise ArtifactError(
            f"{origin}: expected residual blocks in each level of the U-Net, got {levels} of {blocks} input_blocks. "
            "The file is incomplete: copy it again."
        )
    layers = max(map(len, levels))
    steps = layers + 1
    ups = [depths.get(f"output_blocks.{block}.1", 0) for block in range(steps * len(levels) if goes_up else 0)]
    return UnetStructure(
        channels=tuple(
            shape_of(weights, f"input_blocks.{level[0]}.0.out_layers.3.bias", 1, origin)[0] for level in levels
        ),
        down=tuple(tuple(depths.get(f"input_blocks.{block}.1", 0) for block in level) for level in levels),
        mid=depths.get("middle_block.1", 0) if _count(r"middle_block\.(\d{1,2})\.", weights) else None,
        up=tuple(tuple(ups[first : first + steps]) for first in range(0, len(ups), steps)),
        added=any(name.startswith("label_emb.") for name in weights),
    )


def diffusers_structure(weights: Weights, origin: Path) -> UnetStructure:
    """The structure of a U-Net or ControlNet with diffusers' names.

    Args:
        weights: by names such as `down_blocks.0.resnets.0.conv1.weight`.
        origin: where they came from, for messages.

    Raises:
        ArtifactError: weights that show the structure are missing.
    """
    depths = _depths(weights)
    levels = range(max(_count(r"down_blocks\.(\d{1,2})\.", weights), 1))
    return UnetStructure(
        channels=tuple(
            shape_of(weights, f"down_blocks.{level}.resnets.0.conv2.bias", 1, origin)[0] for level in levels
        ),
        down=_levels("down_blocks", len(levels), weights, depths),
        mid=depths.get("mid_block.attentions.0", 0) if _count(r"mid_block\.resnets\.(\d{1,2})\.", weights) else None,
        up=_levels("up_blocks", _count(r"up_blocks\.(\d{1,2})\.", weights), weights, depths),
        added=any(name.startswith("add_embedding.") for name in weights),
    )


def _levels(side: str, levels: int, weights: Weights, depths: dict[str, int]) -> tuple[tuple[int, ...], ...]:
    """Transformer blocks behind each residual block of one way, by level."""
    return tuple(
        tuple(
            depths.get(f"{side}.{level}.attentions.{layer}", 0)
            for layer in range(_count(rf"{side}\.{level}\.resnets\.(\d{{1,2}})\.", weights))
        )
        for level in range(levels)
    )


def _matches(pattern: str, weights: Weights) -> Iterator[re.Match[str]]:
    return (match for match in map(re.compile(pattern).match, weights) if match)


def _count(pattern: str, weights: Weights) -> int:
    """One more than the largest number that the pattern finds at the start of a name."""
    return max((int(match[1]) + 1 for match in _matches(pattern, weights)), default=0)


def _depths(weights: Weights) -> dict[str, int]:
    """Transformer blocks by the attention layer that holds them."""
    depths: dict[str, int] = {}
    for match in _matches(r"(.+?)\.transformer_blocks\.(\d{1,2})\.", weights):
        depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    return depths
