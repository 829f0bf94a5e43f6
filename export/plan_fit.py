"""Which residency policy fits which card, and what would fit where none does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from latentrt.runtime.residency_plan import POLICIES, ComponentMemory, Residency, residency
from latentrt.runtime.vae_tiling import TILE

from .build_options import BuildOptions
from .plan_cards import Card

TILES = f"VAE tiles (latentrt generate --tile {TILE}, the decoder built with --size {TILE})"
SMALLEST_SIDE = 256
_SIDE_STEP = 64


@dataclass(frozen=True)
class Fit:
    """A policy on a card: `spare` is the memory that is left at the peak, in bytes, and below zero what is missing."""

    card: Card
    residency: Residency

    @property
    def spare(self) -> int:
        """Memory of the card less the peak."""
        return self.card.memory - self.residency.peak.total


@dataclass(frozen=True)
class Way:
    """Something that would fit: what to do, and the policy, peak and memory left with it."""

    what: str
    fit: Fit


def fits_on(card: Card, components: Sequence[ComponentMemory]) -> tuple[Fit, ...]:
    """Every policy on a card, from the one that takes the most."""
    return tuple(
        Fit(card, residency(policy, components, context=card.context_bytes, memory=card.memory)) for policy in POLICIES
    )


@dataclass(frozen=True)
class _Change:
    """Other options, and whether the VAE works in tiles."""

    what: str
    options: BuildOptions
    tiled: bool = False


Replan = Callable[[BuildOptions], Sequence[ComponentMemory]]


def ways_to_fit(card: Card, options: BuildOptions, largest: tuple[int, int, int], replan: Replan) -> list[Way]:
    """What would fit where nothing does: the least change of each kind alone; if none does, together with tiles.

    Args:
        options: what does not fit.
        largest: images, height and width of it.
        replan: the components' memory with other options.
    """
    tiled = [_Change(TILES, options, tiled=True)] if max(largest[1:]) > TILE else []
    kinds = [tiled, _fewer(options, largest), _smaller(options, largest)]
    found = [way for kind in kinds if (way := _least(card, kind, replan)) is not None]
    if found or not tiled:
        return found
    together = (
        [dataclasses.replace(change, what=f"{change.what} and {TILES}", tiled=True) for change in kind]
        for kind in kinds[1:]
    )
    return [way for kind in together if (way := _least(card, kind, replan)) is not None]


def _least(card: Card, changes: Sequence[_Change], replan: Replan) -> Way | None:
    """The first of the changes with which a policy fits."""
    for change in changes:
        fit = next((fit for fit in fits_on(card, _components(change, replan)) if fit.spare >= 0), None)
        if fit is not None:
            return Way(change.what, fit)
    return None


def _components(change: _Change, replan: Replan) -> Sequence[ComponentMemory]:
    parts = replan(change.options)
    vae = tuple(part.name for part in parts if part.name.startswith("vae_"))
    if not change.tiled or not vae:
        return parts
    tiles = replan(dataclasses.replace(change.options, size=str(TILE), components=vae))
    return [next((tile for tile in tiles if tile.name == part.name), part) for part in parts]


def _fewer(options: BuildOptions, largest: tuple[int, int, int]) -> list[_Change]:
    """Down to one image, in steps of an eighth."""
    batches = [*range(largest[0] - 1, 1, -max(1, largest[0] // 8)), 1] if largest[0] > 1 else []
    return [_Change(f"--batch {batch}", dataclasses.replace(options, batch=str(batch))) for batch in batches]


def _smaller(options: BuildOptions, largest: tuple[int, int, int]) -> list[_Change]:
    """Sizes of the same shape in steps of an eighth, rounded down."""
    sizes = []
    for eighths in range(7, 1, -1):
        height, width = (side * eighths // 8 // _SIDE_STEP * _SIDE_STEP for side in largest[1:])
        if min(height, width) >= SMALLEST_SIDE:
            sizes.append(str(height) if height == width else f"{height}x{width}")
    return [_Change(f"--size {size}", dataclasses.replace(options, size=size)) for size in dict.fromkeys(sizes)]
