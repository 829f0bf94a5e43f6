"""Pictures of a benchmark for its report: which prompts are shown, and the files beside the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

from latentrt.calibrate.pictures import picture_path
from latentrt.runtime.errors import LatentrtError
from latentrt.runtime.image import save_png
from latentrt.runtime.precisions import rank

from .cases import OURS, Case
from .drawings import Kept
from .results_file import Row

_REFERENCE = ".reference.png"


def shown_prompts(rows: Sequence[Row], count: int) -> tuple[int, ...]:
    """Prompts to show, from 0 in rising order: of three the worst, the middle and the best of the roughest row.

    That is the row of latentrt that is furthest from fp32 by the name of its precision, and of several the one with the
    least mean PSNR; prompts are taken at even distances in the order of its PSNR. Without such a row the first ones.
    """
    compared = [(row, row.quality) for row in rows if row.quality is not None and row.quality.psnr]
    own = [pair for pair in compared if pair[0].case.subject.system == OURS] or compared
    if not own:
        drawn = [row.quality.prompts for row in rows if row.quality is not None]
        return tuple(range(min(count, max(drawn, default=0))))
    _, quality = max(own, key=lambda pair: (rank(pair[0].case.subject.precision), -float(np.mean(pair[1].psnr))))
    order = np.argsort(quality.psnr, kind="stable")
    places = np.rint(np.linspace(0, len(order) - 1, min(count, len(order)))).astype(int)
    return tuple(sorted(order[places].tolist()))


def reference_name(picture: str) -> str:
    """The name of the reference's picture beside a row's one of `Row.pictures`."""
    path = PurePosixPath(picture)
    return str(path.with_name(f"{path.stem}{_REFERENCE}"))


def save_shown(
    rows: Sequence[Row],
    drawn: Mapping[Case, Kept | LatentrtError],
    references: Mapping[Case, Case],
    folder: Path,
    count: int,
) -> list[Row]:
    """Write the pictures to show as PNG, and name them in their rows, relative to the folder's parent.

    A file is named by its prompt's position; the reference's picture, where there is one, lies beside it.

    Args:
        rows: measured, with their quality.
        drawn: pictures by case.
        references: the reference of each row's case.
        count: of the prompts to show.

    Raises:
        ArtifactError: a file of pictures is missing or damaged.
        OSError: the disk is full or the folder not writable.
    """
    chosen = shown_prompts(rows, count)
    found = []
    for index, row in enumerate(rows):
        subject = row.case.subject
        own = folder / f"{index:03}-{subject.system}-{subject.precision}"
        names = [picture_path(own, prompt).relative_to(folder.parent).as_posix() for prompt in chosen]
        kept = drawn[row.case]
        if row.quality is None or isinstance(kept, LatentrtError):
            found.append(row)
            continue
        own.mkdir(parents=True, exist_ok=True)
        _save(folder.parent, names, kept, chosen)
        reference = drawn[references[row.case]]
        if isinstance(reference, Kept):
            _save(folder.parent, [reference_name(name) for name in names], reference, chosen)
        found.append(replace(row, pictures=tuple(names)))
    return found


def _save(folder: Path, names: Sequence[str], kept: Kept, prompts: Sequence[int]) -> None:
    pictures = kept.pictures()
    for name, prompt in zip(names, prompts, strict=True):
        save_png(folder / name, pictures[prompt])
