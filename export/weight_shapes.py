"""Asking weights of unknown origin for their shapes."""

from __future__ import annotations

from pathlib import Path

from latentrt.runtime.errors import ArtifactError

from .weights import Weights


def shape_of(weights: Weights, name: str, rank: int, origin: Path) -> tuple[int, ...]:
    """The shape of a weight that has to be there, of a known number of axes.

    Args:
        origin: where the weights came from, for the message.

    Raises:
        ArtifactError: it is missing or has more or fewer axes.
    """
    shape = weights[name].shape if name in weights else None
    if shape is None or len(shape) != rank or not all(shape):
        found = "found none" if shape is None else f"got one of shape {shape}"
        raise ArtifactError(
            f"{origin}: expected a weight {name} of {rank} axes, {found}. The file is incomplete: copy it again."
        )
    return shape
