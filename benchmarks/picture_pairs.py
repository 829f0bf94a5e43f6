"""Pictures of a benchmark side by side: the reference, a row's own, and how far that has moved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path, PurePosixPath

import numpy as np

from latentrt.calibrate.report_pictures import amplification, data_uri, difference
from latentrt.runtime.image import Pictures
from latentrt.runtime.pixels import load_image

from .quality_pictures import reference_name
from .report_cells import distinct_rows, ran_where, row_labels
from .results_file import Results, Row

# Rows whose pictures a page holds: more would make it too heavy to send.
_MOST_ROWS = 12


def pictures_section(results: Results, folder: Path) -> str:
    """The section of the page with the pictures that were kept, as HTML; empty if none were.

    Args:
        folder: where the names of pictures start from.

    Raises:
        ArtifactError: a picture is missing or damaged.
    """
    rows = [row for row in distinct_rows(results) if row.pictures]
    if not rows:
        return ""
    shown, left = rows[:_MOST_ROWS], len(rows) - _MOST_ROWS
    note = (
        f"{ran_where(results)} Of rows that differ in size or batch alone, the first. Differences from the reference "
        "are absolute, by channel, and multiplied as each says; black is equal."
    )
    if left > 0:
        note += f" {left} more rows are left out to keep the page light; their pictures lie beside the results."
    groups: dict[object, list[Row]] = {}
    for row in shown:
        subject = row.case.subject
        groups.setdefault((subject.width, subject.height, row.case.settings), []).append(row)
    blocks = [block for group in groups.values() for block in _prompts(results, group, folder)]
    return f"<h2>Pictures</h2>\n<p>{escape(note)}</p>\n" + "\n".join(blocks)


def _prompts(results: Results, rows: Sequence[Row], folder: Path) -> Iterator[str]:
    """A block for each prompt that rows of the same settings have pictures of."""
    named: dict[int, list[tuple[Row, str]]] = {}
    for row in rows:
        for name in row.pictures:
            named.setdefault(int(PurePosixPath(name).stem), []).append((row, name))
    for index, found in sorted(named.items(), key=lambda item: item[0]):
        prompt = results.prompts[index] if index < len(results.prompts) else f"prompt {index + 1}"
        said = f"{', '.join(rows[0].case.settings.parts)}; seed {results.seed + index}"
        yield (
            f'<section class="prompt">\n<h3>{escape(prompt)}</h3>\n<p class="soft">{escape(said)}</p>\n'
            f'<div class="pairs">{_grid(results, found, index, folder)}</div>\n</section>'
        )


def _grid(results: Results, found: Sequence[tuple[Row, str]], index: int, folder: Path) -> str:
    """A prompt's reference, and beside it every row's picture and its difference."""
    labels, _ = row_labels(results)
    pictures = [load_image(folder / name, multiple=1) for _, name in found]
    beside = next((path for _, name in found if (path := folder / reference_name(name)).exists()), None)
    reference = None if beside is None else load_image(beside, multiple=1)
    moved = [] if reference is None else [np.abs(difference(reference, picture)) for picture in pictures]
    # All alike, by what suits the picture that is furthest away.
    factor = min(map(amplification, moved), default=1)
    figures = [] if reference is None else [_figure("reference", reference, "reference")]
    for place, (row, _) in enumerate(found):
        label = labels[row.case]
        psnr = () if row.quality is None else row.quality.psnr
        words = f"{label}, {psnr[index]:.1f} dB" if index < len(psnr) else label
        figures.append(_figure("drawn", pictures[place], words))
        if moved:
            shown = np.minimum(moved[place] * factor, 255).astype(np.uint8)
            figures.append(_figure("moved", shown, f"{label}, difference {factor} times"))
    return "".join(figures)


def _figure(kind: str, picture: Pictures, words: str) -> str:
    text = escape(words)
    image = f'<img src="{data_uri(picture)}" alt="{text}">'
    return f'<figure class="{kind}">{image}<figcaption>{text}</figcaption></figure>'
