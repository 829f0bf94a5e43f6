"""Calls of a U-Net as the sampler loop made them, and what guidance makes of their answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentrt.runtime.guidance import guide
from latentrt.runtime.specs import Array


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a network, with all its rows.

    Attributes:
        feeds: the inputs by the graph's names; every one has a row for every row of the call.
        prompt: index of the prompt that was drawn.
        timestep: that the rows were told; 0 for networks that are told none.
        negatives: rows that saw the negative prompt, which come first; 0 where guidance was off.
        guidance: scale at which the rows are combined.
    """

    feeds: Mapping[str, Array]
    prompt: int
    timestep: float
    negatives: int
    guidance: float

    @property
    def rows(self) -> int:
        """Of every input."""
        return len(next(iter(self.feeds.values())))


def guided(output: NDArray[np.float32], call: Call) -> NDArray[np.float32]:
    """What a sampler is sent: (n, …) of a call's output (rows, …)."""
    if not call.negatives:
        return output
    negative, positive = output[: call.negatives], output[call.negatives :]
    rows = np.arange(len(positive), dtype=np.intp)
    return guide(negative, positive, rows, np.ones(len(positive), np.float32), call.guidance)
