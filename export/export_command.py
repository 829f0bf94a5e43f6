"""`latentrt export`: a diffusers checkpoint to a bundle of verified ONNX graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from .checkpoint import open_checkpoint
from .exporter import Exported, export_checkpoint
from .opset import DEFAULT_OPSET, OPSETS


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A diffusers folder, with model_index.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to make or to add to.")],
    precision: Annotated[str, typer.Option(help="Which graphs: fp32, fp16, or both.")] = "fp32,fp16",
    opset: Annotated[
        int | None, typer.Option(help=f"ONNX opset, {OPSETS[0]} to {OPSETS[-1]}; the default is {DEFAULT_OPSET}.")
    ] = None,
    controlnet: Annotated[
        list[Path] | None, typer.Option(help="The folder of a ControlNet to add; may be given again for another.")
    ] = None,
    taesd: Annotated[Path | None, typer.Option(help="The folder of a TAESD (AutoencoderTiny) for previews.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Export again what is up to date.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Export a Stable Diffusion checkpoint to ONNX graphs that are compared with PyTorch.

    Examples:
        latentrt export examples/shapes -o shapes.bundle

        latentrt export examples/shapes -o shapes.bundle --precision fp16 --force

        latentrt export sd15 -o sd15.bundle --controlnet canny --controlnet depth --taesd taesd
    """
    precisions = [name.strip() for name in precision.split(",") if name.strip()]
    console = Console(stderr=True, highlight=False, quiet=as_json)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=None)
        exported = export_checkpoint(
            checkpoint,
            output,
            precisions=precisions,
            opset=opset,
            force=force,
            controlnets=controlnet or (),
            taesd=taesd,
            report=lambda message: progress.update(task, description=message),
        )
    left_out = open_checkpoint(checkpoint).left_out
    if as_json:
        artifacts = [_as_json(line) for line in exported]
        print(json.dumps({"bundle": str(output), "artifacts": artifacts, "left_out": left_out}))
        return
    Console(highlight=False).print(_table(exported))
    for line in exported:
        if line.status == "exported" and line.reason not in ("new", "forced"):
            print(f"{line.artifact.component} {line.artifact.precision}: {line.reason}")
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    print(f"bundle: {output}")


def _as_json(line: Exported) -> dict[str, object]:
    artifact = line.artifact
    return {
        "component": artifact.component,
        "precision": artifact.precision,
        "path": artifact.path,
        "status": line.status,
        "reason": line.reason,
        "size": line.size,
        "nodes": line.nodes,
        "parameters": artifact.parameters,
        "seconds": round(line.seconds, 2),
        "parity": dict(artifact.parity),
    }


def _table(exported: list[Exported]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("component", "precision"):
        table.add_column(name)
    for name in ("size", "nodes", "relative L2", "largest value"):
        table.add_column(name, justify="right")
    table.add_column("status")
    for line in exported:
        artifact = line.artifact
        nearest = artifact.parity.get("nearest_overflow") or []
        table.add_row(
            artifact.component,
            artifact.precision,
            f"{line.size / 1e6:.1f} MB",
            str(line.nodes),
            f"{artifact.parity['worst_relative_l2']:.2e}",
            f"{nearest[0]['max_abs']:.4g}" if nearest else "",
            line.status,
        )
    return table
