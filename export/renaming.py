"""Networks under names of another layout: all of their weights found, and nothing in the file left over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentrt.runtime.errors import ArtifactError

from .weights import Weight, Weights

_NAMED = 10


def unchanged(name: str, weight: Weight) -> Weight:
    """For layouts that differ in names alone."""
    return weight


@dataclass(frozen=True)
class Renaming:
    """Where a network's weights are in a file.

    Attributes:
        prefix: of all of its names in the file.
        names: the network's own name -> the one in the file, behind the prefix.
        adapt: makes the network's weight, given its own name, from the one in the file.
    """

    prefix: str
    names: Mapping[str, str]
    adapt: Callable[[str, Weight], Weight] = unchanged

    def apply(self, weights: Weights) -> dict[str, Weight]:
        """The network's weights by its own names, as far as the file has them."""
        return {
            own: self.adapt(own, weights[self.prefix + name])
            for own, name in self.names.items()
            if self.prefix + name in weights
        }


def below(weights: Weights, prefix: str) -> dict[str, Weight]:
    """The weights of which the names begin with a prefix, without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def check_names(
    weights: Weights,
    renamings: Sequence[Renaming],
    *,
    origin: Path,
    taken_for: str,
    ignored: Callable[[str], bool] = lambda name: False,
) -> None:
    """Hold a file to the names of the networks that it was taken for.

    Args:
        weights: of the file, by their names there.
        origin: the file, for the message.
        taken_for: what the networks are, for the message.
        ignored: whether a name may be left over.

    Raises:
        ArtifactError: weights are missing or left over; names the first ten of each.
    """
    expected = {renaming.prefix + name for renaming in renamings for name in renaming.names.values()}
    missing = sorted(expected - weights.keys())
    unexpected = sorted(name for name in weights.keys() - expected if not ignored(name))
    problems = [
        f"{len(names)} {kind}: {', '.join(map(repr, names[:_NAMED]))}{', …' if len(names) > _NAMED else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ArtifactError(
            f"{origin}: expected exactly the {len(expected)} weights of {taken_for}, which it was taken for, got "
            f"{'; '.join(problems)}. The file is incomplete, or holds something else: take another one."
        )
