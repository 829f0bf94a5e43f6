"""A U-Net in two graphs: the keys and values of its prompts, computed once, and all that is left for every step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from .backends import choose_graph, provider_of
from .bundle import Bundle
from .embedding_cache import EmbeddingCache
from .input_checks import checked_feeds
from .specs import Array, ModelSpec, Session

PROMPT, CACHED = "unet_prompt", "unet_cached"
_TEXT = "encoder_hidden_states"


@dataclass(frozen=True, eq=False)
class _Keys:
    """Keys and values by the names of their inputs."""

    feeds: Mapping[str, Array]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.feeds.values())


class SplitUnet:
    """The graphs `unet_prompt` and `unet_cached` as one session, with the inputs and outputs of the whole U-Net.

    The text of every call is looked up by its content. Of the last few texts, as of prompts that change while a
    picture is drawn, with and without guidance, keys and values are kept, also for the next request. They take 8 MB
    for each row of SD 1.5 and 51 MB for SDXL, in fp32; calls of more than `nbytes` compute theirs every step.

    Args:
        prompt: encoder_hidden_states to keys and values.
        cached: the rest, which takes them.
        nbytes: how much is kept at most.
    """

    def __init__(self, prompt: Session, cached: Session, *, nbytes: int = 512 << 20) -> None:
        self._prompt, self._cached = prompt, cached
        self._kept = EmbeddingCache[_Keys](entries=8, nbytes=nbytes)
        keys = {tensor.name for tensor in prompt.spec.outputs}
        sample, timestep, *others = (tensor for tensor in cached.spec.inputs if tensor.name not in keys)
        self._spec = ModelSpec("unet", (sample, timestep, *prompt.spec.inputs, *others), cached.spec.outputs)

    @property
    def spec(self) -> ModelSpec:
        """Inputs and outputs of the whole U-Net."""
        return self._spec

    @property
    def backend(self) -> str:
        """What runs the steps."""
        return self._cached.backend

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Raises:
            UsageError: inputs do not fit the graphs.
            BackendError: the backend failed.
        """
        rest = checked_feeds(self._spec, feeds)
        text = rest.pop(_TEXT)
        key = (text.shape, hashlib.sha256(text.data).digest())
        keys = self._kept.get(key, lambda: _Keys(self._prompt({_TEXT: text})))
        return self._cached({**rest, **keys.feeds})

    def close(self) -> None:
        """Close both."""
        self._prompt.close()
        self._cached.close()


def runs_split(bundle: Bundle, precision: str, *, backend: str) -> bool:
    """Whether the two graphs run in the U-Net's place.

    They do where the bundle holds both in that precision, made for the same target as the U-Net, and in the host's
    memory: another device would be sent keys and values anew every step, which costs more than they save.
    """
    if backend not in ("auto", "onnxruntime") or provider_of(backend) != "cpu":
        return False
    if not all(precision in bundle.held(component) for component in (PROMPT, CACHED)):
        return False
    targets = {choose_graph(bundle, name, precision, backend=backend).target for name in ("unet", CACHED)}
    return len(targets) == 1
