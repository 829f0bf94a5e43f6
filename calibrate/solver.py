"""Which layers to quantize: as much gain as a limit of noise allows, a knapsack problem.

Noise adds: rounding errors of different layers are not correlated. So a plan's noise is the sum over its layers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from latentrt.runtime.errors import CalibrationError, UsageError

from .budget import decibels
from .layers import Layer, groups
from .search import Choice

Solver = Literal["greedy", "milp"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
# Tens of times what the 800 layers of SDXL take.
TIME_LIMIT_S = 20.0
# Shares of the limit: HiGHS takes sums that exceed it by less as within it.
_FEASIBILITY = 1e-5
_GAP = 1e-6


@dataclass(frozen=True)
class Item:
    """Layers that are quantized together or not at all.

    Attributes:
        layers: by name.
        noise: that they add, as a share of the guided prediction's power; not negative.
        gain: what quantizing them saves, as a share of the cost of all layers; negative where it costs.
    """

    layers: tuple[str, ...]
    noise: float
    gain: float


def items_of(
    layers: Sequence[Layer], noises: Mapping[str, float], gains: Mapping[str, float], *, together: bool = True
) -> tuple[Item, ...]:
    """What there is to decide, in the graph's order.

    Args:
        layers: of the graph.
        noises: by layer; those that have none are not up for decision.
        gains: by layer, for all that have a noise.
        together: decide for layers that read one tensor as one. Then it is quantized for all of them or stays as it is.

    Raises:
        CalibrationError: a noise or gain is not finite, or a noise is negative.
    """
    candidates = [layer for layer in layers if layer.name in noises]
    members = groups(candidates).values() if together else [(layer,) for layer in candidates]
    items = tuple(
        Item(
            layers=tuple(layer.name for layer in own),
            noise=math.fsum(noises[layer.name] for layer in own),
            gain=math.fsum(gains[layer.name] for layer in own),
        )
        for own in members
    )
    _check(items)
    return items


def solve(items: Sequence[Item], limit: float, *, solver: Solver = "milp", time_limit: float = TIME_LIMIT_S) -> Choice:
    """The items of the most gain whose noise sums to no more than a limit.

    `greedy` takes items by noise for the gain, as long as they fit; it misses less gain than the largest item has, and
    the same answer comes in microseconds. `milp` is exact (HiGHS, Huangfu and Hall 2018) but for a millionth of the
    gain, and for items that come within a hundred-thousandth of the limit. If it is no better in the time it has, it
    is greedy's answer that counts.

    Args:
        limit: of the noise, as a share of the guided prediction's power; infinity for whatever is worth it.
        time_limit: for milp, in seconds.

    Raises:
        UsageError: no such solver; the limit is negative or NaN.
        CalibrationError: a noise or gain is not finite, or a noise is negative.
    """
    check_solver(solver)
    if not limit >= 0:
        raise UsageError(f"limit: expected a noise of at least 0, got {limit:g}.")
    _check(items)
    worthwhile = _ordered(items)
    picked = _greedy(worthwhile, limit)
    if solver == "milp" and len(picked) < len(worthwhile):
        exact = _milp(worthwhile, limit, time_limit)
        if _gain(exact) > _gain(picked):
            picked = exact
    return _choice(picked)


def check_solver(solver: str) -> None:
    """Refuse a name of no solver.

    Raises:
        UsageError: names those that there are.
    """
    if solver not in SOLVERS:
        raise UsageError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver}.")


def frontier(items: Sequence[Item]) -> tuple[Choice, ...]:
    """Plans from what is free of noise to all that is worth it, each with what has the least noise for its gain more.

    Every one of them has the most gain that is possible with its noise.

    Raises:
        CalibrationError: a noise or gain is not finite, or a noise is negative.
    """
    _check(items)
    ordered = _ordered(items)
    choices = [_choice(ordered[:count]) for count in range(len(ordered) + 1)]
    # Of plans with the same noise the last has the most gain.
    return tuple({choice.noise: choice for choice in choices}.values())


def predicted_sqnr(noises: Iterable[float]) -> float:
    """Signal over noise in dB of layers together, each of whose noise is a share of the signal's power."""
    return decibels(1.0, math.fsum(noises))


def _check(items: Sequence[Item]) -> None:
    for item in items:
        if not (0 <= item.noise < math.inf and math.isfinite(item.gain)):
            raise CalibrationError(
                f"{item.layers[0]}: expected a finite noise of at least 0 and a finite gain, got {item.noise:g} and "
                f"{item.gain:g}. Measure the sensitivities again."
            )


def _ordered(items: Sequence[Item]) -> list[Item]:
    """What is worth it, by noise for the gain; ties in the order given."""
    return sorted((item for item in items if item.gain > 0), key=lambda item: item.noise / item.gain)


def _greedy(ordered: Sequence[Item], limit: float) -> list[Item]:
    picked: list[Item] = []
    for item in ordered:
        if _noise([*picked, item]) <= limit:
            picked.append(item)
    return picked


def _milp(ordered: Sequence[Item], limit: float, time_limit: float) -> list[Item]:
    """What HiGHS finds; nothing if it finds nothing within the limit."""
    fitting = [item for item in ordered if item.noise <= limit]
    if not fitting or limit == 0:
        return []
    # Numbers around one, which the solver's tolerances are made for.
    noises = np.array([item.noise for item in fitting]) / limit
    gains = np.array([item.gain for item in fitting]) / max(item.gain for item in fitting)
    for bound in (1.0, 1 - _FEASIBILITY):
        found = _solved(noises, gains, bound, time_limit)
        picked = [item for item, taken in zip(fitting, found, strict=True) if taken]
        if _noise(picked) <= limit:
            return picked
    return []


def _solved(
    noises: np.ndarray[tuple[int], np.dtype[np.float64]],
    gains: np.ndarray[tuple[int], np.dtype[np.float64]],
    bound: float,
    time_limit: float,
) -> list[bool]:
    from scipy.optimize import Bounds, LinearConstraint, milp

    with _quiet():
        result = milp(
            -gains,
            integrality=np.ones(len(gains)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(noises[None], ub=bound),
            options={"time_limit": time_limit, "mip_rel_gap": _GAP},
        )
    return [False] * len(gains) if result.x is None else [bool(x > 0.5) for x in result.x]


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS prints debugging of its own to stdout, which machines may read, and no option turns it off."""
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def _noise(items: Iterable[Item]) -> float:
    return math.fsum(item.noise for item in items)


def _gain(items: Iterable[Item]) -> float:
    return math.fsum(item.gain for item in items)


def _choice(items: Sequence[Item]) -> Choice:
    return Choice(frozenset(name for item in items for name in item.layers), _noise(items), _gain(items))
