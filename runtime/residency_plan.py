"""What is in the device's memory at each stage of a run, for each residency policy.

Text to image runs its stages one after the other: text encoders, U-Net, VAE. Engines that are loaded share one
activation block, as large as the largest of them asks for. A policy says whose weights are there meanwhile:

    all     every network, always
    swap    the networks of the stage alone: each is loaded for its stage and dropped after it
    stream  as swap, and of the U-Net's weights only a budget: the others are copied to the device when their layer
            runs (TensorRT's weight streaming)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from .errors import UsageError

POLICIES = ("all", "swap", "stream")
_STREAMED = "unet"


@dataclass(frozen=True)
class ComponentMemory:
    """Device memory of one component, in bytes.

    Attributes:
        weights: once it is loaded.
        activation: what it works in while it runs.
        tensors: its inputs and outputs.
        least_weights: what weight streaming cannot do without.
    """

    name: str
    weights: int
    activation: int
    tensors: int
    least_weights: int = 0


@dataclass(frozen=True)
class Stage:
    """What is in memory while some components run, in bytes; `activation` is the shared block."""

    components: tuple[str, ...]
    context: int
    weights: int
    activation: int
    tensors: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.context + self.weights + self.activation + self.tensors


@dataclass(frozen=True)
class Residency:
    """A policy's stages in the order of a run.

    Attributes:
        budget: bytes of the U-Net's weights that stay on the device; None where all of them do.
    """

    policy: str
    stages: tuple[Stage, ...]
    budget: int | None = None

    @property
    def peak(self) -> Stage:
        """The first of the stages that take the most."""
        return max(self.stages, key=lambda stage: stage.total)


def residency(
    policy: str, components: Sequence[ComponentMemory], *, context: int, memory: int | None = None
) -> Residency:
    """What a policy takes.

    Args:
        policy: of POLICIES.
        components: in the order in which they run; neighbours of one kind, as two text encoders, share a stage.
        context: of CUDA itself, in bytes.
        memory: of the device. Weight streaming keeps as many weights as it leaves room for, and without it the fewest.

    Raises:
        UsageError: no such policy, or there is nothing to hold.
    """
    if policy not in POLICIES:
        raise UsageError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}.")
    if not components:
        raise UsageError("components: expected at least one to plan for, got none.")
    groups = [tuple(group) for _, group in groupby(components, key=lambda part: part.name.rstrip("_0123456789"))]
    if policy == "all":
        return Residency(policy, tuple(_stage(group, components, context) for group in groups))
    stages = tuple(_stage(group, group, context) for group in groups)
    streamed = next((part for part in components if part.name == _STREAMED), None)
    if policy == "swap" or streamed is None:
        return Residency(policy, stages)
    index = next(index for index, group in enumerate(groups) if streamed in group)
    fixed = stages[index].total - streamed.weights
    room = 0 if memory is None else memory - fixed
    budget = min(max(room, streamed.least_weights), streamed.weights)
    kept = ComponentMemory(streamed.name, budget, streamed.activation, streamed.tensors)
    group = tuple(kept if part is streamed else part for part in groups[index])
    return Residency(policy, (*stages[:index], _stage(group, group, context), *stages[index + 1 :]), budget)


def _stage(running: Sequence[ComponentMemory], loaded: Sequence[ComponentMemory], context: int) -> Stage:
    return Stage(
        tuple(part.name for part in running),
        context,
        weights=sum(part.weights for part in loaded),
        activation=max(part.activation for part in loaded),
        tensors=sum(part.tensors for part in loaded),
    )
