"""`latentrt samplers`: the samplers by their names, with the options and spacings of each."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from .sampler_names import SAMPLERS, resolve_sampler
from .sampler_options import Option
from .sampler_spec import SamplerSpec


def samplers(
    name: Annotated[str | None, typer.Argument(help="One sampler, with its options; default a list of all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """List the samplers, or one of them with its options, their defaults and the spacings it can have.

    Example: latentrt samplers "DPM++ 2M SDE"
    """
    from .console import log

    chosen = SAMPLERS if name is None else (resolve_sampler(name),)
    if as_json:
        print(json.dumps({"samplers": [describe(spec) for spec in chosen]}))
        return 0
    if name is None:
        width = max(len(spec.label) for spec in chosen)
        for spec in chosen:
            log(f"{spec.label:<{width}}  {spec.name:<28}  {spec.scheduler or 'not in diffusers'}")
        return 0
    log(f"{chosen[0].label}: {chosen[0].name}, diffusers' {chosen[0].scheduler or 'none'}")
    log(f"spacings: {', '.join(chosen[0].spacings)}")
    for option, described in describe(chosen[0])["options"].items():
        log(f"  {option} = {described['default']}" + (f"  ({described['values']})" if described["values"] else ""))
    return 0


def describe(spec: SamplerSpec) -> dict[str, Any]:
    """A sampler as JSON."""
    return {
        "name": spec.name,
        "label": spec.label,
        "scheduler": spec.scheduler,
        "aliases": list(spec.aliases),
        "spacings": list(spec.spacings),
        "options": {
            name: {"default": _plain(spec.preset.get(name, option.default)), "values": _values(option)}
            for name, option in spec.options.items()
        },
    }


def _values(option: Option) -> str | None:
    if option.choices:
        return " or ".join(str(choice) for choice in option.choices)
    if option.kind == "bool":
        return "true or false"
    low, high = option.bounds
    return f"{low:g} to {high:g}" if (low, high) != (float("-inf"), float("inf")) else None


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | str) else str(value)
