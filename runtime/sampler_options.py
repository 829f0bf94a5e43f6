"""A sampler's options: diffusers' names and defaults, read from a scheduler's config or given for one run."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ConfigError, UsageError

_MISSING = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option.

    Attributes:
        default: the value where neither the config nor the caller gives one.
        choices: the values supported, where they are few. One choice alone means that any other is refused.
        bounds: the least and the greatest value of a number.
        kind: a bool, a whole number, a number, or any value that the solver itself checks.
        to: who takes it: the `solver`, the `steps` function, `correct`, the change of denoised latents, `model`, how
            the output is read, or `noise`, whoever makes the source of noise.
        in_config: whether diffusers' config holds it; the others are arguments of a call, such as eta.
        class_default: diffusers' default where it is not `default`: used if a config of the sampler's own class does
            not hold the option, which means that its pipeline runs with this value.
        aliases: values that mean another, as diffusers reads them.
    """

    default: Any
    choices: tuple[Any, ...] = ()
    bounds: tuple[float, float] = (-math.inf, math.inf)
    kind: Literal["bool", "int", "float", "any"] = "any"
    to: Literal["solver", "steps", "correct", "model", "noise"] = "solver"
    in_config: bool = True
    class_default: Any = _MISSING
    aliases: Mapping[Any, Any] | None = None


def flag(default: bool, **fields: Any) -> Option:
    """An option that is true or false."""
    return Option(default=default, kind="bool", **fields)


def number(default: float | None, low: float = -math.inf, high: float = math.inf, **fields: Any) -> Option:
    """An option that is a finite number; None only where that is the default."""
    return Option(default=default, kind="float", bounds=(low, high), **fields)


def whole(default: int | None, low: int, high: float = math.inf, **fields: Any) -> Option:
    """An option that is a whole number; None only where that is the default."""
    return Option(default=default, kind="int", bounds=(low, high), **fields)


def only(value: Any, **fields: Any) -> Option:
    """An option that is supported in one value only: any other is refused by name rather than ignored."""
    return Option(default=value, choices=(value,), **fields)


def one_of(default: Any, *others: Any, **fields: Any) -> Option:
    """An option that is one of a few values."""
    return Option(default=default, choices=(default, *others), **fields)


def read_options(
    options: Mapping[str, Option],
    config: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    own_class: bool,
    sampler: str,
) -> dict[str, Any]:
    """The value of every option: as given, else as in the config, else its default.

    Args:
        options: of the sampler.
        config: a scheduler's config; what other classes read of it is left alone, as diffusers does.
        given: for this run.
        own_class: whether the config is of the sampler's own class.
        sampler: its name, for the message.

    Raises:
        UsageError: an option given is unknown to this sampler or out of range.
        ConfigError: a value of the config is not supported by it.
    """
    for name in given:
        if name not in options:
            near = difflib.get_close_matches(name, options, n=3, cutoff=0.4) or sorted(options)
            raise UsageError(
                f"{name}: expected an option of {sampler}, such as {', '.join(near) or 'none: it has none'}, got "
                f"{given[name]!r}. Leave it out, or choose another sampler."
            )
    values = {}
    for name, option in options.items():
        if name in given:
            values[name] = _checked(name, option, given[name], UsageError, f"Change it, or leave it to {sampler}.")
        elif option.in_config and config.get(name) is not None:
            values[name] = _checked(
                name, option, config[name], ConfigError, "This value is not supported; change scheduler_config.json."
            )
        elif own_class and option.class_default is not _MISSING and name not in config:
            values[name] = option.class_default
        else:
            values[name] = option.default
    return values


def _checked(name: str, option: Option, value: Any, error: type[UsageError] | type[ConfigError], remedy: str) -> Any:
    if value is None and option.default is None:
        return None
    value = (option.aliases or {}).get(value, value) if isinstance(value, str) else value
    low, high = option.bounds
    if option.choices:
        if any(value is choice or (type(value) is type(choice) and value == choice) for choice in option.choices):
            return value
        expected = " or ".join(repr(choice) for choice in option.choices)
    elif option.kind == "bool":
        if isinstance(value, bool):
            return value
        expected = "true or false"
    elif option.kind in ("int", "float"):
        types = (int,) if option.kind == "int" else (int, float)
        if isinstance(value, types) and not isinstance(value, bool) and low <= value <= high:
            return value
        expected = "a whole number" if option.kind == "int" else "a number"
        if (low, high) != (-math.inf, math.inf):
            expected += f" from {low:g} to {high:g}" if high < math.inf else f" of at least {low:g}"
    else:
        return value
    raise error(f"{name}: expected {expected}, got {value!r}. {remedy}")
