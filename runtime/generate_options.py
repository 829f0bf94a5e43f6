"""The options of `latentrt generate`, read from text: ControlNets, sampler options, pairs of numbers."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UsageError
from .request import Control, Hires


def read_control(text: str) -> Control:
    """`FILE[@SCALE[@START-END[@MODEL]]]`, for instance `edges.png@0.8@0-0.6`.

    Raises:
        UsageError: a part is no number, or there are too many.
    """
    path, *rest = text.split("@")
    try:
        if len(rest) > 3:
            raise ValueError("too many parts")
        scale = float(rest[0]) if rest else 1.0
        start, end = (float(part) for part in rest[1].split("-")) if len(rest) > 1 else (0.0, 1.0)
        model = int(rest[2]) if len(rest) > 2 else 0
    except ValueError as err:
        raise UsageError(f"control: expected FILE@SCALE@START-END@MODEL, got {text!r} ({err}).") from err
    return Control(image=Path(path), scale=scale, start=start, end=end, model=model)


def read_loras(texts: Sequence[str]) -> dict[str, float | None]:
    """`NAME` or `NAME:SCALE` each, in their order; None for the scale that a LoRA was added with.

    Raises:
        UsageError: a scale is no number, or a name stands twice.
    """
    loras: dict[str, float | None] = {}
    for text in texts:
        name, sign, scale = text.partition(":")
        try:
            value = float(scale) if sign else None
        except ValueError as err:
            raise UsageError(f"lora: expected NAME or NAME:SCALE, such as style:0.8, got {text!r}.") from err
        if name in loras:
            raise UsageError(f"lora: expected each name once, got {name!r} twice. Add up the scales.")
        loras[name] = value
    return loras


def read_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` pairs, the values as Python literals where they are (`true` and `false` too), else as text.

    Raises:
        UsageError: a pair has no `=`.
    """
    settings = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.strip():
            raise UsageError(f"sampler-option: expected NAME=VALUE, got {pair!r}.")
        settings[name.strip()] = _literal(value.strip())
    return settings


def _literal(text: str) -> Any:
    if text.casefold() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.casefold()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def read_numbers(name: str, text: str | None) -> list[float] | None:
    """Numbers divided by commas; None for None.

    Raises:
        UsageError: one of them is no number.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as err:
        raise UsageError(f"{name}: expected numbers divided by commas, got {text!r}.") from err


def read_pair(name: str, text: str | None, sign: str = "x") -> tuple[float, float] | None:
    """Two numbers such as 1024x768; None for None.

    Raises:
        UsageError: they are not two numbers.
    """
    if text is None:
        return None
    try:
        first, second = (float(part) for part in text.split(sign))
    except ValueError as err:
        raise UsageError(f"{name}: expected two numbers divided by {sign!r}, got {text!r}.") from err
    return first, second


def read_size(name: str, text: str | None) -> tuple[int, int] | None:
    """`WIDTHxHEIGHT` as (height, width); None for None."""
    pair = read_pair(name, text)
    return None if pair is None else (int(pair[1]), int(pair[0]))


def read_hires(scale: float | None, strength: float, steps: int | None, upscaler: str) -> Hires | None:
    """The second pass; None without a scale."""
    return None if scale is None else Hires(scale=scale, strength=strength, steps=steps, upscaler=upscaler)
