"""The generation parameters of a picture as text, in the form that AUTOMATIC1111's web UI writes and reads.

    a castle on a hill
    Negative prompt: fog
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x512, Model: "v1, pruned"

The prompt may have several lines; the last line holds the settings where it has at least three of them. The form is
not exact for every prompt: blanks around lines are lost, and a line of the prompt that begins with `Negative prompt:`
is read as the negative prompt, by the web UI too. Who needs the request itself reads the JSON record that
`picture_metadata` keeps beside this text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from .errors import UsageError

Setting = str | int | float | None

NEGATIVE = "Negative prompt:"
_FIRST = [
    "Steps",
    "Sampler",
    "Schedule type",
    "CFG scale",
    "Image CFG scale",
    "Seed",
    "Face restoration",
    "Size",
    "Model hash",
    "Model",
    "FP8 weight",
    "Cache FP16 weight for LoRA",
    "VAE hash",
    "VAE",
    "Variation seed",
    "Variation seed strength",
    "Seed resize from",
    "Denoising strength",
    "Conditional mask weight",
    "Clip skip",
    "ENSD",
    "Token merging ratio",
    "Token merging ratio hr",
    "Init image hash",
    "RNG",
    "Tiling",
]
_LAST = ["Version", "User"]
_KEY = re.compile(r"\w[\w \-/]+")
# A key begins at the first word character of its run. That a match may begin only where a run begins changes nothing
# of what is found, and keeps the time linear on a long line without colons.
_SETTING = re.compile(r'(?<![\w \-/])[ \-/]*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_FEWEST = 3


class Infotext(NamedTuple):
    """What a `parameters` text says; the settings are text, in the order of the line."""

    prompt: str
    negative: str
    settings: dict[str, str]


def format_infotext(prompt: str, negative: str, settings: Mapping[str, Setting]) -> str:
    """The `parameters` text of a picture.

    Args:
        prompt: of one or several lines.
        negative: left out where it is empty.
        settings: by the web UI's names. They are written in its order, names it does not know before its version;
            None is left out; what would read differently otherwise is quoted as JSON.

    Raises:
        UsageError: a setting's name is not two or more letters, digits, spaces, `-` or `/`.
    """
    given = {key: _text(value) for key, value in settings.items() if value is not None}
    if wrong := [key for key in given if not _KEY.fullmatch(key)]:
        raise UsageError(f"setting: expected a name of letters, digits, spaces, - and /, got {wrong[0]!r}.")
    middle = [key for key in given if key not in _FIRST and key not in _LAST]
    line = ", ".join(f"{key}: {_quoted(given[key])}" for key in [*_FIRST, *middle, *_LAST] if key in given)
    note = f"\n{NEGATIVE} {negative}" if negative else ""
    return f"{prompt}{note}\n{line}".strip()


def parse_infotext(text: str) -> Infotext:
    """Prompt, negative prompt and settings of a `parameters` text, by the web UI's rules.

    It never raises: text that does not have this form is a prompt. `parse_infotext(format_infotext(…))` gives back
    what went in where there are three settings or more, no line of a prompt begins with `Negative prompt:`, and lines
    have no blanks around them.
    """
    *lines, last = text.strip().split("\n")
    found = _SETTING.findall(last)
    if len(found) < _FEWEST:
        lines.append(last)
        found = []
    parts: tuple[list[str], list[str]] = ([], [])
    negative = False
    for raw in lines:
        line = raw.strip()
        if line.startswith(NEGATIVE):
            negative = True
            line = line.removeprefix(NEGATIVE).strip()
        # Empty lines in front are no part of a prompt; those within it are.
        if line or parts[negative]:
            parts[negative].append(line)
    settings = {key: _unquoted(value) for key, value in found if value}
    return Infotext("\n".join(parts[0]), "\n".join(parts[1]), settings)


def _text(value: str | int | float) -> str:
    """A number as people write it: 7 for 7.0."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _quoted(value: str) -> str:
    plain = value and not re.search(r"[,:\n]", value) and value == value.strip() and not value.startswith('"')
    return value if plain else json.dumps(value, ensure_ascii=False)


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        content = json.loads(value)
    except ValueError:
        return value
    return content if isinstance(content, str) else value
