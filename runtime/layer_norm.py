"""A layer normalisation, recovered from what went in and what came out: an exported graph does not name its weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def _normalized(hidden: Floats, epsilon: float) -> NDArray[np.float64]:
    centred = hidden - hidden.mean(-1, keepdims=True, dtype=np.float64)
    return np.asarray(centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + epsilon), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """A layer normalisation's gain and bias, each (d,) float64, and its epsilon."""

    gain: NDArray[np.float64]
    bias: NDArray[np.float64]
    epsilon: float

    @classmethod
    def fit(cls, before: Floats, after: Floats, *, epsilon: float) -> LayerNorm:
        """Recover it from rows (n, d) before and after: per channel, a line through n points by least squares."""
        x, y = _normalized(before, epsilon), after.astype(np.float64)
        dx, dy = x - x.mean(0), y - y.mean(0)
        spread = np.square(dx).sum(0)
        gain = (dx * dy).sum(0) / np.where(spread > 0, spread, 1.0)
        return cls(gain=gain, bias=y.mean(0) - gain * x.mean(0), epsilon=epsilon)

    def __call__(self, hidden: Floats) -> Floats:
        """Normalise rows (n, d)."""
        return (_normalized(hidden, self.epsilon) * self.gain + self.bias).astype(np.float32)
