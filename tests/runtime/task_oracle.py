"""What the tests of tasks share: runs of diffusers and of ours with the latents of every step, and their comparison."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.runtime import Pipeline
from latentrt.runtime.specs import Array, ModelSpec, Session

Floats = NDArray[np.float32]
Pictures = NDArray[np.uint8]

# float32 on both sides, the graph's kernels against PyTorch's, over all steps.
BOUND = 1e-4


@dataclass(frozen=True)
class Recorded:
    """A run: the latents (n, c, h/8, w/8) after every step and the pictures (n, h, w, 3)."""

    latents: list[Floats]
    pictures: Pictures


def diffusers_pipeline(checkpoint: Path, name: str = "StableDiffusionPipeline", **components: Any) -> Any:
    """A diffusers pipeline in float32 without safety checker and progress bar."""
    import diffusers
    import torch

    if name.startswith("StableDiffusion") and "XL" not in name:
        components.setdefault("safety_checker", None)
    pipe = getattr(diffusers, name).from_pretrained(checkpoint, dtype=torch.float32, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sibling_pipeline(pipe: Any, name: str) -> Any:
    """Another pipeline on the components of one: image to image or inpainting on those of text to image."""
    import diffusers

    other = getattr(diffusers, name)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def generators(seeds: int | Sequence[int]) -> Any:
    """PyTorch's CPU generator of one image, or one for each image of a batch."""
    import torch

    if isinstance(seeds, int):
        return torch.Generator("cpu").manual_seed(seeds)
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def record_diffusers(
    pipe: Any,
    scheduler: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    seed: int | Sequence[int] = 0,
    **arguments: Any,
) -> Recorded:
    """Run a diffusers pipeline with one of its scheduler classes, made from the checkpoint's config.

    A callback sees every call of the U-Net. Of a scheduler with two calls a step the second one's latents are kept, and
    of its last step, which has one, that one's.
    """
    import diffusers

    calls: list[Floats] = []

    def keep(_pipe: Any, _index: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        calls.append(values["latents"].numpy().copy())
        return values

    original = pipe.scheduler
    try:
        if scheduler is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pipe.scheduler = getattr(diffusers, scheduler).from_config(original.config, **dict(options or {}))
        order = int(getattr(pipe.scheduler, "order", 1))
        with warnings.catch_warnings():
            # diffusers' own: deprecated options and deprecated NumPy calls.
            warnings.simplefilter("ignore")
            images = pipe(callback_on_step_end=keep, output_type="np", generator=generators(seed), **arguments).images
    finally:
        pipe.scheduler = original
    latents = calls if order == 1 else [*calls[1::2], calls[-1]]
    return Recorded(latents, (images * 255).round().astype(np.uint8))


def record_ours(pipe: Pipeline, prompt: Any, **settings: Any) -> Recorded:
    """Run ours."""
    latents: list[Floats] = []
    result = pipe(prompt, on_step=lambda step: latents.append(step.latents.astype(np.float32)), **settings)
    np.testing.assert_array_equal(latents[-1], result.latents)
    return Recorded(latents, result.images)


def relative_l2(found: Array, wanted: Array) -> float:
    """||found - wanted|| / ||wanted||, in float64."""
    difference = found.astype(np.float64) - wanted.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted.astype(np.float64)))


def compare(found: Recorded, wanted: Recorded, *, bound: float = BOUND, levels: int = 1) -> float:
    """Hold every step's latents, each image by itself, and the pictures to those of a reference.

    Returns:
        The worst relative L2.
    """
    assert len(found.latents) == len(wanted.latents), (len(found.latents), len(wanted.latents))
    errors = []
    for ours, theirs in zip(found.latents, wanted.latents, strict=True):
        assert ours.shape == theirs.shape
        errors.append(max(relative_l2(a, b) for a, b in zip(ours, theirs, strict=True)))
    assert max(errors) <= bound, errors
    check_pictures_near(found.pictures, wanted.pictures, levels=levels)
    return max(errors)


def check_pictures_near(found: Pictures, wanted: Pictures, *, levels: int = 1) -> None:
    """No value of a picture differs by more than so many of 255 levels."""
    assert found.shape == wanted.shape
    difference = np.abs(found.astype(int) - wanted.astype(int))
    assert difference.max(initial=0) <= levels, int(difference.max())


class Watched:
    """A session that remembers what it was fed and what it answered, and can change the answer."""

    def __init__(
        self, session: Session, change: Callable[[int, dict[str, Array]], dict[str, Array]] | None = None
    ) -> None:
        """Pass everything on to `session`; `change` gets the number of the call and its outputs."""
        self._session, self._change = session, change
        self.feeds: list[dict[str, Array]] = []

    @property
    def spec(self) -> ModelSpec:
        """Of the session."""
        return self._session.spec

    @property
    def backend(self) -> str:
        """Of the session."""
        return self._session.backend

    @property
    def rows(self) -> list[int]:
        """Rows of each call."""
        return [len(next(iter(feeds.values()))) for feeds in self.feeds]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once."""
        self.feeds.append({name: np.array(value) for name, value in feeds.items()})
        outputs = self._session(feeds)
        return outputs if self._change is None else self._change(len(self.feeds) - 1, outputs)

    def close(self) -> None:
        """Close the session."""
        self._session.close()


@contextmanager
def watched(
    pipe: Pipeline, component: str, change: Callable[[int, dict[str, Array]], dict[str, Array]] | None = None
) -> Iterator[Watched]:
    """The session of a component, wrapped while the block runs."""
    sessions = pipe.model.components._open
    original = pipe.model.components[component]
    sessions[component] = wrapper = Watched(original, change)
    try:
        yield wrapper
    finally:
        sessions[component] = original
