"""Texts to the embeddings a U-Net is conditioned on: chunks, clip skip, emphasis, one or two text encoders."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .embedding_cache import EmbeddingCache
from .errors import BackendError, UsageError
from .layer_norm import LayerNorm
from .specs import Array, Session
from .text_chunks import TextChunk, Words, chunk_prompt
from .tokenizer import ClipTokenizer

Floats = NDArray[np.float32]
Emphasis = Literal["original", "no_norm", "ignore", "none"]
EMPHASES: tuple[Emphasis, ...] = ("original", "no_norm", "ignore", "none")

_SERIAL = itertools.count()


@dataclass(frozen=True, eq=False)
class Embeddings:
    """What a text became.

    Attributes:
        hidden: (77k, d) float32, k chunks of the text.
        pooled: (p,) float32 in models whose U-Net takes `text_embeds` (SDXL), otherwise None.

    Raises:
        UsageError: an array has another rank, is empty, or holds NaN or infinity.
    """

    hidden: Floats
    pooled: Floats | None = None

    def __post_init__(self) -> None:
        """Check ranks and values; other dtypes become float32."""
        for name, rank, meaning in (("hidden", 2, "(tokens, width)"), ("pooled", 1, "(width,)")):
            given = getattr(self, name)
            if given is None and name == "pooled":
                continue
            value = np.asarray(given)
            if value.ndim != rank or value.size == 0 or value.dtype.kind not in "fiu":
                raise UsageError(
                    f"embeddings.{name}: expected floats of shape {meaning}, got {value.dtype} {value.shape}. "
                    "Give one text's arrays, without a batch axis."
                )
            with np.errstate(over="ignore"):
                value = value.astype(np.float32, copy=False)
            if not np.isfinite(value).all():
                raise UsageError(f"embeddings.{name}: expected finite values, got NaN or infinity.")
            object.__setattr__(self, name, value)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.hidden.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


def zero_embeddings_like(embeddings: Embeddings) -> Embeddings:
    """All zeros: an SDXL negative prompt that was not given, where `force_zeros_for_empty_prompt` is set."""
    pooled = None if embeddings.pooled is None else np.zeros_like(embeddings.pooled)
    return _frozen(Embeddings(np.zeros_like(embeddings.hidden), pooled))


def _frozen(embeddings: Embeddings) -> Embeddings:
    """The same arrays, read-only: they are shared through the cache."""
    for value in (embeddings.hidden, embeddings.pooled):
        if value is not None:
            value.flags.writeable = False
    return embeddings


def apply_emphasis(hidden: Floats, weights: Floats, emphasis: Emphasis = "original") -> Floats:
    """Multiply each token's embedding (t, d) by its weight (t,).

    `original` then scales the whole chunk so that its mean is what it was, as AUTOMATIC1111's web UI does; `no_norm`
    does not; `ignore` and `none` leave it alone. Weights of 1 change no bit.
    """
    if emphasis in ("ignore", "none") or bool((weights == 1).all()):
        return hidden
    with np.errstate(all="ignore"):
        weighted = hidden * weights[:, None]
        if emphasis == "original" and (mean := weighted.mean(dtype=np.float64)) != 0:
            weighted *= np.float32(hidden.mean(dtype=np.float64) / mean)
    return weighted


@dataclass(frozen=True, eq=False, repr=False)
class TextEncoder:
    """One text encoder: its session, its tokenizer, and the textual inversions it knows.

    Attributes:
        layer_norm_eps: of the encoder's config.json; used for clip skip.
        words: textual inversions added at run time.
        eos_row: the id to feed in place of EOS, where adding vectors moved it; None where it did not.
    """

    session: Session
    tokenizer: ClipTokenizer
    layer_norm_eps: float = 1e-5
    words: Words = field(default_factory=dict)
    eos_row: int | None = None
    serial: int = field(default_factory=lambda: next(_SERIAL), init=False)

    @cached_property
    def layers(self) -> int:
        """Transformer layers whose hidden states the graph gives; 0 if it gives none."""
        names = {tensor.name for tensor in self.session.spec.outputs}
        return next((n for n in itertools.count() if f"hidden_states.{n + 1}" not in names), 0)

    @cached_property
    def projected(self) -> bool:
        """Whether it gives `text_embeds`: an SDXL encoder whose pooled output the U-Net takes."""
        return any(tensor.name == "text_embeds" for tensor in self.session.spec.outputs)

    @cached_property
    def final_norm(self) -> LayerNorm:
        """The encoder's last LayerNorm, recovered from one run on tokens from all over the vocabulary."""
        tokenizer = self.tokenizer
        ids = np.linspace(0, min(tokenizer.bos, tokenizer.eos) - 1, tokenizer.length).astype(np.int64)
        ids[[0, -1]] = tokenizer.bos, tokenizer.eos
        outputs = self.run(ids)
        return LayerNorm.fit(
            outputs[f"hidden_states.{self.layers}"], outputs["last_hidden_state"], epsilon=self.layer_norm_eps
        )

    def chunks(self, text: str, *, attention: bool = True) -> tuple[TextChunk, ...]:
        """The rows of a text."""
        return chunk_prompt(text, self.tokenizer, words=self.words, attention=attention)

    def run(self, input_ids: NDArray[np.int64]) -> dict[str, Floats]:
        """Outputs for one row of ids (77,), without the batch axis."""
        if self.eos_row is not None:
            input_ids = np.where(input_ids == self.tokenizer.eos, self.eos_row, input_ids)
        outputs: Mapping[str, Array] = self.session({"input_ids": input_ids[None]})
        return {name: value[0].astype(np.float32) for name, value in outputs.items()}

    def hidden(self, outputs: Mapping[str, Floats], clip_skip: int, *, penultimate: bool) -> Floats:
        """The hidden state (77, d) that conditions the U-Net, `clip_skip` layers before the usual one.

        Stable Diffusion 1 and 2 take the last layer's, and every layer's goes through the final LayerNorm. SDXL takes
        the one before it (`penultimate`), as it is.

        Raises:
            UsageError: there are not so many layers, or the graph does not give their outputs.
        """
        skipped = clip_skip + (1 if penultimate else 0)
        if skipped == 0:
            return outputs["last_hidden_state"]
        if not self.layers:
            raise UsageError(
                f"{self.session.spec.name}: expected hidden states for clip skip, the graph gives only "
                f"{[tensor.name for tensor in self.session.spec.outputs]}. Export the checkpoint again with latentrt."
            )
        if skipped > self.layers:
            most = self.layers - (1 if penultimate else 0)
            raise UsageError(f"clip_skip: expected 0 to {most} for this text encoder, got {clip_skip}.")
        state = outputs[f"hidden_states.{self.layers - skipped}"]
        return state if penultimate else self.final_norm(state)


class PromptEncoder:
    """Encode texts with a checkpoint's text encoders; what was encoded is kept in a cache.

    Args:
        encoders: one (Stable Diffusion 1, 2; SDXL's refiner has only its second) or two (SDXL).
        emphasis: what token weights do, see `apply_emphasis`; `none` takes brackets and BREAK as characters.
        cache: shared between encoders if wanted; default one of its own.

    Raises:
        UsageError: not one or two encoders, or an unknown emphasis.
    """

    def __init__(
        self,
        encoders: Sequence[TextEncoder],
        *,
        emphasis: Emphasis = "original",
        cache: EmbeddingCache[Embeddings] | None = None,
    ) -> None:
        if not 1 <= len(encoders) <= 2:
            raise UsageError(f"encoders: expected one or two text encoders, got {len(encoders)}.")
        if emphasis not in EMPHASES:
            raise UsageError(f"emphasis: expected one of {', '.join(EMPHASES)}, got {emphasis!r}.")
        self.encoders = tuple(encoders)
        self.emphasis = emphasis
        self.cache = EmbeddingCache[Embeddings]() if cache is None else cache

    def __call__(
        self, text: str, *, text_2: str | None = None, clip_skip: int | None = 0, chunks: int | None = None
    ) -> Embeddings:
        """Embeddings of one text; their arrays are read-only.

        Every chunk runs through the encoder alone, so that no picture depends on what else was encoded.

        Args:
            text: attention grammar and BREAK allowed; AND and schedules already resolved.
            text_2: for the second of two encoders; default the same text.
            clip_skip: layers left out at the end, as diffusers counts: 0 none, 1 the last. (The web UI counts from 1.)
            chunks: pad with empty prompts to so many, so that texts of different lengths fit one call.

        Raises:
            UsageError: a number is out of its range, or a token's weight is so large that its embedding overflows.
            BackendError: the text encoder gave NaN or infinity.
        """
        skip = 0 if clip_skip is None else clip_skip
        if isinstance(skip, bool) or not isinstance(skip, int | np.integer) or skip < 0:
            raise UsageError(f"clip_skip: expected a whole number of at least 0, got {clip_skip!r}.")
        count = self.chunk_count(text, text_2=text_2)
        wanted = count if chunks is None else chunks
        if not wanted >= count:
            raise UsageError(f"chunks: expected at least {count} for this prompt, got {chunks!r}.")
        texts = tuple(text if text_2 is None or index == 0 else text_2 for index in range(len(self.encoders)))
        if wanted == count:
            return self._cached(texts, int(skip), count)
        ours, empty = self._cached(texts, int(skip), count), self._cached(("",) * len(texts), int(skip), 1)
        return _frozen(Embeddings(np.concatenate([ours.hidden, *[empty.hidden] * (wanted - count)]), ours.pooled))

    def chunk_count(self, text: str, *, text_2: str | None = None) -> int:
        """How many chunks a text takes: the most of its encoders, whose tokenizers and texts may differ."""
        texts = (text, text if text_2 is None else text_2)
        return max(
            len(encoder.chunks(own, attention=self.emphasis != "none"))
            for encoder, own in zip(self.encoders, texts, strict=False)
        )

    def _cached(self, texts: tuple[str, ...], clip_skip: int, count: int) -> Embeddings:
        serials = tuple(encoder.serial for encoder in self.encoders)
        key = (serials, texts, clip_skip, self.emphasis)
        return self.cache.get(key, lambda: self._encode(texts, clip_skip, count))

    def _encode(self, texts: tuple[str, ...], clip_skip: int, count: int) -> Embeddings:
        penultimate = any(encoder.projected for encoder in self.encoders)
        parts, pooled = [], None
        for encoder, text in zip(self.encoders, texts, strict=True):
            chunks = encoder.chunks(text, attention=self.emphasis != "none")
            chunks += encoder.chunks("") * (count - len(chunks))
            rows = []
            for index, chunk in enumerate(chunks):
                outputs = encoder.run(chunk.input_ids)
                hidden = encoder.hidden(outputs, clip_skip, penultimate=penultimate)
                if not np.isfinite(hidden).all():
                    session = encoder.session
                    raise BackendError(
                        f"{session.spec.name}: expected finite embeddings, got NaN or infinity from {session.backend}. "
                        "Use another precision of the text encoder."
                    )
                rows.append(apply_emphasis(hidden, chunk.weights, self.emphasis))
                if encoder.projected and index == 0:
                    pooled = outputs["text_embeds"]
            parts.append(np.concatenate(rows))
        hidden = np.concatenate(parts, axis=-1)
        if not np.isfinite(hidden).all():
            raise UsageError("prompt: expected weights that keep embeddings finite, got NaN or infinity. Lower them.")
        return _frozen(Embeddings(hidden, pooled))
