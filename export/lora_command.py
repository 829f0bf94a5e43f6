"""`latentrt lora`: LoRAs of a bundle, swapped at run time without a new export or build."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from latentrt.runtime.console import log, print_table

from .lora_bundle import HeldLora, add_lora, list_loras, remove_lora

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="LoRAs of a bundle, swapped at run time without a new export or build.",
)

_BUNDLE = typer.Argument(help="Bundle folder.")
_JSON = typer.Option("--json", help="One JSON object on stdout.")


@app.command()
def add(
    bundle: Annotated[Path, _BUNDLE],
    file: Annotated[Path, typer.Argument(help="LoRA, LoCon, LoHa, LoKr or DoRA of any trainer, .safetensors.")],
    name: Annotated[str | None, typer.Option(help="To draw with; default the file's.")] = None,
    scale: Annotated[float, typer.Option(help="To draw with by default; 1 is as it was trained.")] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Take the place of a LoRA of that name.")] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Put a LoRA into a bundle. No graph or engine is changed.

    Example: latentrt lora add sd15.bundle pastel.safetensors --name pastel --scale 0.8

    Draw with it: latentrt generate sd15.bundle "a castle" --lora pastel --lora other:0.5
    """
    lora = add_lora(bundle, file, name=name, scale=scale, force=force)
    if as_json:
        print(json.dumps({"bundle": str(bundle), "lora": dataclasses.asdict(lora)}))
        return
    log(f"{bundle}: {lora.name} ({', '.join(lora.methods)}) changes {_changes(lora)}")
    log(f"draw with it: latentrt generate {bundle} PROMPT --lora {lora.name}")


@app.command("list")
def list_(bundle: Annotated[Path, _BUNDLE], as_json: Annotated[bool, _JSON] = False) -> None:
    """Show the LoRAs of a bundle.

    Example: latentrt lora list sd15.bundle
    """
    loras = list_loras(bundle)
    if as_json:
        print(json.dumps({"bundle": str(bundle), "loras": [dataclasses.asdict(lora) for lora in loras]}))
    elif loras:
        _print(loras)
    else:
        log(f"{bundle}: no LoRA. Add one: latentrt lora add {bundle} FILE.safetensors")


@app.command()
def remove(
    bundle: Annotated[Path, _BUNDLE],
    name: Annotated[str, typer.Argument(help="Of the LoRA, as `latentrt lora list` has it.")],
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Take a LoRA out of a bundle.

    Example: latentrt lora remove sd15.bundle pastel
    """
    remove_lora(bundle, name)
    if as_json:
        print(json.dumps({"bundle": str(bundle), "removed": name}))
    else:
        log(f"{bundle}: {name} removed")


def _print(loras: Sequence[HeldLora]) -> None:
    print_table(
        "LoRAs",
        ("name", "scale", "method", "weights", "MB", "file"),
        [
            (
                lora.name,
                f"{lora.scale:g}",
                ", ".join(lora.methods),
                _changes(lora),
                f"{lora.size / 1e6:.1f}",
                lora.source["file"],
            )
            for lora in loras
        ],
    )


def _changes(lora: HeldLora) -> str:
    return ", ".join(f"{count} weights of {network}" for network, count in lora.changes.items())
