"""The elements of a report's page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

NOTHING = "&ndash;"


def document(title: str, body: str, *, style: str = "") -> str:
    """A page that needs nothing but itself.

    Args:
        title: text.
        body: HTML.
        style: CSS after that of all reports.
    """
    shared = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>\n{shared}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def tiles(figures: Mapping[str, str]) -> str:
    """Figures in large type, by their names."""
    boxes = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures.items())
    return f'<dl class="tiles">{boxes}</dl>'


def facts(values: Mapping[str, str]) -> str:
    """What is known, by its names."""
    entries = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in values.items())
    return f'<dl class="facts">{entries}</dl>'


def plain(value: Any) -> str:
    """A value of JSON as a line of text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(each)}" for name, each in value.items()) or "none"
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return ", ".join(plain(each) for each in value) or "none"
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def plot(svg: str, words: str) -> str:
    """A plot with what it says, for those who see it and those who do not."""
    image = svg.replace("<svg", f'<svg role="img" aria-label="{escape(words)}"', 1)
    return f"<figure>{image}<figcaption>{escape(words)}</figcaption></figure>"


def listed(items: Iterable[str]) -> str:
    """A list of items that are HTML already."""
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int]) -> str:
    """A table of cells that are HTML already; `numbers` are the columns that are set to the right."""
    right = set(numbers)

    def cells(tag: str, texts: Sequence[str]) -> str:
        marks = [' class="number"' if column in right else "" for column in range(len(texts))]
        return "".join(f"<{tag}{mark}>{text}</{tag.split()[0]}>" for mark, text in zip(marks, texts, strict=True))

    top = cells('th scope="col"', [escape(name) for name in head])
    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>\n<thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
