"""The figures of a row's pictures against those of references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from latentrt.calibrate.judge import Judge, verdicts
from latentrt.calibrate.picture_metrics import Doubles, PictureMetric, psnr
from latentrt.runtime.errors import LatentrtError, UsageError
from latentrt.runtime.image import Pictures

from .drawings import Floats, Kept
from .quality_plan import QualityPlan
from .results_file import Quality, Row


def with_figures(
    row: Row,
    plan: QualityPlan,
    own: Kept | LatentrtError,
    reference: Kept | LatentrtError,
    finest: Kept | LatentrtError | None,
) -> Row:
    """The row with its quality, and a note for what of it could not be had.

    Args:
        own: pictures of the row, or why there are none; so are the others.
        reference: of the same prompts, seeds and settings.
        finest: what the settings are held against; None for nothing.
    """
    try:
        pictures = _kept(own).pictures()
    except LatentrtError as err:
        return replace(row, notes=(*row.notes, f"quality: no pictures: {_first_line(err)}"))
    measures: dict[str, Callable[[], Doubles]] = {
        name: partial(_distances, metric, reference, pictures) for name, metric in plan.metrics.items()
    }
    measures["latent_l2"] = lambda: latent_distances(_kept(reference).trajectory(), _kept(own).trajectory())
    if finest is not None:
        measures["finest_psnr"] = partial(_distances, psnr, finest, pictures)
    if plan.judge is not None:
        measures["accuracy"] = partial(_shares, plan.judge, plan.prompts.texts, pictures)
    found = {name: _values_or_reason(measure) for name, measure in measures.items()}
    values = {name: each for name, each in found.items() if not isinstance(each, str)}
    failed: dict[str, list[str]] = {}
    for name, each in found.items():
        if isinstance(each, str):
            failed.setdefault(each, []).append(name)
    shown = values.pop("accuracy", ())
    quality = Quality(prompts=len(pictures), accuracy=float(np.mean(shown)) if shown else None, **values)
    notes = (f"quality: no {', '.join(names)}: {why}" for why, names in failed.items())
    return replace(row, quality=quality, notes=(*row.notes, *notes))


def latent_distances(reference: Floats, trajectory: Floats) -> Doubles:
    """Relative L2 distance of the latents after each step, |x - r| / |r|, mean over the pictures: (steps,).

    Args:
        reference: (steps, n, c, h, w).
        trajectory: of the same shape.

    Raises:
        UsageError: the shapes differ.
    """
    if reference.shape != trajectory.shape:
        raise UsageError(
            f"trajectory: expected (steps, n, c, h, w) = {reference.shape} as the reference, got {trajectory.shape}."
        )
    moved = _lengths(trajectory - reference) / _lengths(reference)
    means: Doubles = moved.mean(1)
    return means


def _lengths(latents: Floats) -> Doubles:
    """Of each step's latents of each picture, (steps, n)."""
    steps, pictures = latents.shape[:2]
    lengths: Doubles = np.linalg.norm(latents.reshape(steps, pictures, -1).astype(np.float64), axis=2)
    return lengths


def _values_or_reason(measure: Callable[[], Doubles]) -> tuple[float, ...] | str:
    try:
        return tuple(measure().tolist())
    except LatentrtError as err:
        return _first_line(err)


def _distances(metric: PictureMetric, reference: Kept | LatentrtError, pictures: Pictures) -> Doubles:
    return metric(_kept(reference).pictures(), pictures)


def _shares(judge: Judge, prompts: Sequence[str], pictures: Pictures) -> Doubles:
    return np.array(verdicts(judge, prompts, pictures), np.float64)


def _kept(found: Kept | LatentrtError) -> Kept:
    if isinstance(found, LatentrtError):
        raise found
    return found


def _first_line(err: LatentrtError) -> str:
    """Without what a process wrote to stderr at its end, which follows on lines of its own."""
    return str(err).partition("\n")[0]
