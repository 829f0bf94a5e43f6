"""What the rows of a U-Net call are told at each step: prompts, their schedules, SDXL's micro-conditioning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .bound_inputs import freeze
from .embedding_cache import EmbeddingCache
from .errors import UsageError
from .model_facts import ModelFacts
from .prompt_schedule import PromptPart, resolve_prompt, resolve_schedule, text_at
from .request import Request, Text
from .text_encoding import Embeddings, PromptEncoder, zero_embeddings_like

Floats = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Rows:
    """One call of the U-Net: first the negative prompts of its images, if it is guided, then the parts of the prompts.

    Attributes:
        images: which images of the batch the call is for.
        owner: of each part, the position of its image in `images`.
        weights: of each part.
        negatives: how many rows are negative prompts: none, or one or two for each image.
        hidden: (rows, 77k, d).
        text_embeds: (rows, p), SDXL.
        time_ids: (rows, 6 or 5), SDXL.
    """

    images: NDArray[np.intp]
    owner: NDArray[np.intp]
    weights: Floats
    negatives: int
    hidden: Floats
    text_embeds: Floats | None
    time_ids: Floats | None

    @property
    def sources(self) -> NDArray[np.intp]:
        """The image of each row."""
        repeats = self.negatives // max(len(self.images), 1)
        return np.concatenate([*[self.images] * repeats, self.images[self.owner]])


class Conditioning:
    """The rows of every step of a run.

    Images whose prompts take the same number of chunks share a call. Those of other lengths get their own, so that an
    image's prompt is never padded because of its neighbours, and stays the same in whatever batch it is drawn.

    Args:
        encoder: of the bundle.
        request: its prompts are repeated `batch` times each, in order.
        facts: of the model.
        steps: of the run: schedules in prompts count these.
        size: (height, width) of the picture in pixels.
        guided: whether negative prompts will be asked for.
        first_pass_steps: of the first pass, in the second one of a hi-res fix.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        request: Request,
        facts: ModelFacts,
        *,
        steps: int,
        size: tuple[int, int],
        guided: bool,
        first_pass_steps: int | None = None,
    ) -> None:
        self._encoder, self._request, self._facts = encoder, request, facts
        self._positive = [
            text if isinstance(text, Embeddings) else resolve_prompt(text, steps, first_pass_steps=first_pass_steps)
            for text in repeated(request.prompts(), request.batch)
        ]
        self._negative = [
            text
            if isinstance(text, Embeddings) or text is None
            else resolve_schedule(text, steps, first_pass_steps=first_pass_steps)
            for text in repeated(request.negatives(), request.batch)
        ]
        self._times = self._micro_conditioning(size)
        self._cache = EmbeddingCache[_Held](entries=64)
        self._check_widths(guided)

    @property
    def images(self) -> int:
        """Pictures in the batch."""
        return len(self._positive)

    def at(self, position: int, *, guided: bool) -> tuple[Rows, ...]:
        """The calls of a step, counted from 0 in this run."""
        parts = [self._parts(index, position) for index in range(self.images)]
        negatives = [self._negative_text(index, position) for index in range(self.images)] if guided else []
        key = (tuple(tuple(p) for p in parts), tuple(negatives), guided)
        return self._cache.get(key, lambda: _Held(tuple(self._calls(parts, negatives)))).rows

    def _parts(self, index: int, position: int) -> list[tuple[Text, float]]:
        prompt = self._positive[index]
        if isinstance(prompt, Embeddings):
            return [(prompt, 1.0)]
        return [(text_at(part, position), part.weight) for part in prompt.parts]

    def _negative_text(self, index: int, position: int) -> Text | None:
        negative = self._negative[index]
        if negative is None or isinstance(negative, Embeddings):
            return negative
        return text_at(PromptPart(1.0, negative), position)

    def _calls(self, parts: Sequence[list[tuple[Text, float]]], negatives: Sequence[Text | None]) -> Iterable[Rows]:
        lengths: dict[int, list[int]] = {}
        for index, own in enumerate(parts):
            counts = [self._chunks(text, self._request.prompt_2) for text, _ in own]
            if negatives:
                counts.append(self._chunks(negatives[index], self._request.negative_prompt_2))
            lengths.setdefault(max(counts), []).append(index)
        for chunks, images in lengths.items():
            rows = [self._encode(part, chunks, 0) for index in images for part, _ in parts[index]]
            owner = [position for position, index in enumerate(images) for _ in parts[index]]
            weights = [weight for index in images for _, weight in parts[index]]
            before = []
            if negatives:
                firsts = [rows[owner.index(position)] for position in range(len(images))]
                before = [
                    self._encode_negative(negatives[index], chunks, like)
                    for index, like in zip(images, firsts, strict=True)
                ]
            yield self._stack(images, owner, weights, [*before, *rows], len(before))

    def _stack(
        self, images: list[int], owner: list[int], weights: list[float], texts: list[Embeddings], negatives: int
    ) -> Rows:
        pooled = [text.pooled for text in texts if text.pooled is not None] if self._facts.is_sdxl else []
        times = None
        if self._facts.is_sdxl:
            positive, negative = self._times
            times = freeze(np.stack([negative] * negatives + [positive] * len(owner)))
        return Rows(
            images=np.asarray(images, np.intp),
            owner=np.asarray(owner, np.intp),
            weights=np.asarray(weights, np.float32),
            negatives=negatives,
            # Sessions leave on their device what they know not to change.
            hidden=freeze(np.stack([text.hidden for text in texts])),
            text_embeds=freeze(np.stack(pooled)) if pooled else None,
            time_ids=times,
        )

    def _chunks(self, text: Text | None, second: str | None) -> int:
        if text is None:
            return 1
        if isinstance(text, Embeddings):
            return len(text.hidden) // self._tokens
        return self._encoder.chunk_count(text, text_2=second)

    @property
    def _tokens(self) -> int:
        return self._encoder.encoders[0].tokenizer.length

    def _encode(self, text: Text, chunks: int, which: int) -> Embeddings:
        second = self._request.negative_prompt_2 if which else self._request.prompt_2
        if not isinstance(text, Embeddings):
            skip = self._request.negative_clip_skip if which else self._request.clip_skip
            return self._encoder(text, text_2=second, clip_skip=skip, chunks=chunks)
        missing = chunks - len(text.hidden) // self._tokens
        if missing <= 0:
            return text
        empty = self._encoder("", clip_skip=self._request.clip_skip).hidden
        return Embeddings(np.concatenate([text.hidden, *[empty] * missing]), text.pooled)

    def _encode_negative(self, text: Text | None, chunks: int, like: Embeddings) -> Embeddings:
        if text is None and self._facts.zero_negative and self._request.negative_prompt_2 is None:
            return zero_embeddings_like(like)
        return self._encode("" if text is None else text, chunks, 1)

    def _check_widths(self, guided: bool) -> None:
        given = [
            text for text in (*self._positive, *(self._negative if guided else ())) if isinstance(text, Embeddings)
        ]
        if not given:
            return
        usual = self._encoder("", clip_skip=self._request.clip_skip)
        pooled = None if usual.pooled is None else usual.pooled.shape
        for text in given:
            if len(text.hidden) % self._tokens:
                raise UsageError(
                    f"embeddings.hidden: expected a multiple of {self._tokens} tokens, got {len(text.hidden)}. "
                    "Give every chunk of the text whole."
                )
            if text.hidden.shape[1] != usual.hidden.shape[1]:
                raise UsageError(
                    f"embeddings.hidden: expected width {usual.hidden.shape[1]}, got {text.hidden.shape[1]}. "
                    "They were made for another model."
                )
            if self._facts.is_sdxl and (text.pooled is None or text.pooled.shape != pooled):
                raise UsageError(
                    f"embeddings.pooled: expected shape {pooled} for this U-Net, got "
                    f"{None if text.pooled is None else text.pooled.shape}. Give the pooled embedding too."
                )

    def _micro_conditioning(self, size: tuple[int, int]) -> tuple[Floats, Floats]:
        """SDXL's time_ids of a row with the prompt and of one with the negative prompt."""
        request = self._request
        original, target = request.original_size or size, request.target_size or size
        crop = request.crop
        away = (*(request.negative_original_size or original), *self._negative_crop())
        positive: tuple[float, ...]
        negative: tuple[float, ...]
        if self._facts.time_ids == 5:
            positive = (*original, *crop, request.aesthetic_score)
            negative = (*away, request.negative_aesthetic_score)
        else:
            positive = (*original, *crop, *target)
            negative = (*away, *(request.negative_target_size or target))
        return np.asarray(positive, np.float32), np.asarray(negative, np.float32)

    def _negative_crop(self) -> tuple[int, int]:
        """As asked for, else what diffusers' pipelines take: none for the refiner and beside both negative sizes."""
        request = self._request
        if request.negative_crop is not None:
            return request.negative_crop
        sizes = request.negative_original_size is not None and request.negative_target_size is not None
        none = self._facts.time_ids == 5 or (sizes and request.image is None)
        return (0, 0) if none else request.crop


@dataclass(frozen=True, eq=False)
class _Held:
    """The calls of a step, with their size for the cache."""

    rows: tuple[Rows, ...]

    @property
    def nbytes(self) -> int:
        return sum(row.hidden.nbytes for row in self.rows)


def repeated(values: Sequence[T], times: int) -> list[T]:
    """Each value so many times, in order."""
    return [value for value in values for _ in range(times)]
