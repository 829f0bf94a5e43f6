"""`latentrt optimize`: a bundle's graphs rewritten for one of ONNX Runtime's providers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from latentrt.runtime.console import log, print_table, progress_console

from .optimizer import Optimized, optimize_bundle


def optimize(
    bundle: Annotated[Path, typer.Argument(help="A bundle that latentrt export made.")],
    target: Annotated[str, typer.Option(help="ONNX Runtime's providers: cpu, cuda, or both.")] = "cpu",
    precision: Annotated[
        str | None,
        typer.Option(
            help="Of the graphs: fp32, int8, fp8 or int8w for cpu; fp16, mixed or fp32 for cuda. Default: the first "
            "that a network is held in."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Make again what is up to date.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Add graphs made of ONNX Runtime's own operators, each compared with the graph it was made from.

    For the CPU they open in a tenth of a second; of large ones the weights stay in the mapped file, which takes less
    memory. For CUDA convolutions and norms have channels last. Which graph runs is chosen by what runs it; latentrt
    doctor says.

    In int8 the graph of latentrt calibrate is laid out as the CPU's integer kernels want it: unsigned activations, and
    weights of convolutions as the floats that their integers stand for, which takes their memory. It gives the same
    bits, which is checked, and runs faster.

    Examples:
      latentrt optimize shapes.bundle --target cpu

      latentrt optimize shapes.bundle --target cpu --precision int8

      latentrt optimize sd15.bundle --target cpu,cuda --json
    """
    targets = [name.strip() for name in target.split(",") if name.strip()] or [target]
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=progress_console(), transient=True) as progress:
        task = progress.add_task("reading", total=None)
        lines = optimize_bundle(
            bundle,
            targets,
            precision=precision,
            force=force,
            report=lambda message: progress.update(task, description=message),
        )
    if as_json:
        print(json.dumps({"bundle": str(bundle), "artifacts": [optimized_as_json(line) for line in lines]}))
    else:
        _print(bundle, lines)


def optimized_as_json(line: Optimized) -> dict[str, Any]:
    """A graph as the commands' JSON has it."""
    artifact = line.artifact
    return {
        "component": artifact.component,
        "precision": artifact.precision,
        "target": artifact.target,
        "path": artifact.path,
        "status": line.status,
        "reason": line.reason,
        "own_size": line.own_size,
        "nodes": line.nodes,
        "source_nodes": line.source_nodes,
        "parity": dict(artifact.parity),
    }


def _print(bundle: Path, lines: Sequence[Optimized]) -> None:
    print_table(
        "graphs",
        ("component", "precision", "for", "nodes", "own MB", "relative L2", "status"),
        [
            (
                line.artifact.component,
                line.artifact.precision,
                line.artifact.target,
                f"{line.source_nodes} -> {line.nodes}",
                f"{line.own_size / 1e6:.1f}",
                f"{line.artifact.parity['worst_relative_l2']:.1e}",
                line.status,
            )
            for line in lines
        ],
    )
    for line in lines:
        if line.reason not in ("", "new", "forced"):
            log(f"{line.artifact.component} {line.artifact.precision} for {line.artifact.target}: {line.reason}")
    for line in lines:
        if cases := line.artifact.parity.get("identical_cases"):
            log(f"{line.artifact.path}: the bits of the graph that it was made from, in {cases} calls of its network")
    for note in sorted({line.artifact.parity["note"] for line in lines if "note" in line.artifact.parity}):
        log(f"cuda: {note}")
    log(f"bundle: {bundle}")
