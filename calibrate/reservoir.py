"""A few rows of very many, from which sums over all of them are estimated without bias.

Priority sampling: a row of importance u gets the priority u / r with r uniform on (0, 1], and the k rows of the highest
priority are kept. With t the priority that came next, a kept row stands for max(1, t / u) rows. What matters most is
kept for sure, which an even sample of rare outliers would miss. N. Duffield, C. Lund, M. Thorup, Priority sampling for
estimation of arbitrary subset sums, J. ACM 54 (2007).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float16]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Reservoir:
    """The rows of highest priority, in falling order: up to `capacity`, and the next one for its priority.

    Attributes:
        capacity: rows in the sample.
        priorities: (n,), n at most capacity + 1.
        importance: (n,) of the rows.
        rows: (n, width) float16.
    """

    capacity: int
    priorities: Numbers
    importance: Numbers
    rows: Rows

    @property
    def floor(self) -> float:
        """The priority that a row has to exceed to be kept."""
        return float(self.priorities[-1]) if len(self.priorities) > self.capacity else 0.0

    def sample(self) -> tuple[Rows, Numbers]:
        """Rows (m, width), m at most `capacity`, and for how many rows each of them stands, (m,)."""
        if len(self.priorities) <= self.capacity:
            return self.rows, np.ones(len(self.rows))
        next_priority = self.priorities[self.capacity]
        return self.rows[: self.capacity], np.maximum(1.0, next_priority / self.importance[: self.capacity])


def reservoir_of(
    importance: Numbers,
    uniform: Numbers,
    read: Callable[[NDArray[np.int64]], Rows],
    *,
    capacity: int,
    floor: float = 0.0,
) -> Reservoir:
    """Sample rows.

    Args:
        importance: (n,) of the rows, at least 0; rows of importance 0 add nothing to any sum and are never kept.
        uniform: (n,) random numbers in (0, 1].
        read: reads rows (m, width) by their indices (m,).
        capacity: rows to keep.
        floor: priority that a row has to exceed, as `Reservoir.floor` of one that this is to be merged with; what
            would be dropped then is not read.
    """
    priorities = importance / uniform
    kept = _highest(priorities, capacity)
    kept = kept[priorities[kept] > floor]
    return Reservoir(capacity, priorities[kept], importance[kept], read(kept))


def merged(one: Reservoir, other: Reservoir) -> Reservoir:
    """The reservoir of the rows of both, which have the same capacity."""
    priorities = np.concatenate([one.priorities, other.priorities])
    kept = _highest(priorities, one.capacity)
    if np.array_equal(kept, np.arange(len(one.priorities))):
        return one
    importance = np.concatenate([one.importance, other.importance])[kept]
    return Reservoir(one.capacity, priorities[kept], importance, np.concatenate([one.rows, other.rows])[kept])


def _highest(priorities: Numbers, capacity: int) -> NDArray[np.int64]:
    """The indices of the capacity + 1 highest, in falling order."""
    return np.argsort(-priorities, kind="stable")[: capacity + 1]
