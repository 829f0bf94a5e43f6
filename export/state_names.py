"""The names of a network's weights: other releases of the libraries have others; none may be missing or left over.

What the libraries rename when they load (and what only one of two releases knows) is renamed here, for whichever of
the names the network made from the config has:

    text_model.encoder.…                 <->  encoder.…               CLIPTextModel of transformers 4 and 5
    vision_model.vision_model.encoder.…  <->  vision_model.encoder.…  safety checkers of transformers 4 and 5
    ….query, .key, .value, .proj_attn     ->  ….to_q, .to_k, .to_v, .to_out.0   VAEs of Stable Diffusion 1
    ….embeddings.position_ids             ->  dropped: a constant that old releases of transformers saved
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from latentrt.runtime.errors import ArtifactError

from .weights import Weight, Weights, changed

_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION = re.compile(rf"\.({'|'.join(_ATTENTION)})\.(weight|bias)$")
# Modules that transformers 4 wraps in another of the same weights; a name may have the prefix or lack it.
_WRAPPERS = ("text_model.", "vision_model.")
_CONSTANT = "position_ids"
_NAMED = 10


def fitted(
    weights: Weights, expected: Mapping[str, tuple[int, ...]], *, origin: Path, model_class: str
) -> dict[str, Weight]:
    """The weights of a network by its own names, in its own order; nothing is read.

    Args:
        weights: by the names in the file.
        expected: name -> shape of all that the network holds.
        origin: where they came from, for the message.
        model_class: the network's class, for the message.

    Raises:
        ArtifactError: weights are missing, left over, or of another shape; names the first ten of each.
    """
    found: dict[str, Weight] = {}
    unexpected: dict[str, Weight] = {}
    # A weight under the network's own name goes before one that has to be renamed.
    for name in sorted(weights, key=lambda name: name not in expected):
        own = next((alias for alias in _aliases(name) if alias in expected and alias not in found), None)
        if own is not None:
            found[own] = _as_linear(weights[name], expected[own])
        elif name.rpartition(".")[2] != _CONSTANT:
            unexpected[name] = weights[name]
    problems = {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in found],
        "unexpected": [f"{name} {weight.shape}" for name, weight in unexpected.items()],
        "of another shape": [
            f"{name} {found[name].shape} instead of {shape}"
            for name, shape in expected.items()
            if name in found and found[name].shape != tuple(shape)
        ],
    }
    if any(problems.values()):
        raise ArtifactError(
            f"{origin}: expected exactly the {len(expected)} weights of {model_class} that its config describes, got "
            f"{'; '.join(_listed(kind, names) for kind, names in problems.items() if names)}. "
            "The config and the weights belong to different models, or a file is incomplete: get both from one place."
        )
    return {name: found[name] for name in expected}


def _aliases(name: str) -> Iterator[str]:
    """The names that a weight may have in the network, its own first."""
    name = _OLD_ATTENTION.sub(lambda match: f".{_ATTENTION[match[1]]}.{match[2]}", name)
    yield name
    for wrapper in _WRAPPERS:
        if name.startswith(wrapper):
            yield name.removeprefix(wrapper)
        yield wrapper + name


def _as_linear(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """The weight of a 1 x 1 convolution as that of the linear layer which the network has in its place."""
    if weight.shape == (*shape, 1, 1):
        return changed(weight, lambda values: values.reshape(shape), tuple(shape))
    return weight


def _listed(kind: str, names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} {kind}: {', '.join(names[:_NAMED])}{rest}"
