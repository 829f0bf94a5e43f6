"""How one layer computes with a quantized input and quantized weights: the numbers that every part agrees on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["int8", "fp8"]


def precision_of(kind: Kind, *, weight_only: bool) -> str:
    """What a bundle calls networks with layers of a kind: int8, fp8, or int8w where weights alone are rounded."""
    return f"{kind}w" if weight_only else kind


@dataclass(frozen=True, eq=False)
class LayerQuant:
    """A layer y = W x + b as it is computed: W' Q(x / v) + b + c, with W' the quantized W v.

    Dividing the input's channels by v and multiplying the weight's with it changes nothing but what rounding loses:
    SmoothQuant, Xiao et al. 2022 (arXiv 2211.10438).

    Attributes:
        scale: step of the divided input, a number that float16 holds; None where only weights are quantized.
        vector: v, (inputs,), the same for all layers that read a tensor; None for ones.
        correction: c, (outputs,), what the error is on average; None for zeros.
        kind: what both are rounded to.
    """

    scale: float | None
    vector: NDArray[np.float32] | None = None
    correction: NDArray[np.float32] | None = None
    kind: Kind = "int8"
