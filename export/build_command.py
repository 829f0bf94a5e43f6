"""`latentrt build`: TensorRT engines from a bundle's graphs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from latentrt.runtime.console import log, note, print_table, progress_console

from .engine_builder import Abandoned
from .engine_jobs import AHEAD_OF_TIME, BuildOptions, EngineResult, build_engines
from .engine_memory import planned_vram


def build(
    bundle: Annotated[Path, typer.Argument(help="A bundle that latentrt export made.")],
    target: Annotated[
        str, typer.Option(help="GPUs: sm86,sm89 makes an engine each, sm86+sm89 one for both; current: this GPU.")
    ] = "current",
    precision: Annotated[str, typer.Option(help="Precision of the graphs to build: fp16, fp32…")] = "fp16",
    batch: Annotated[str, typer.Option(help="Images per call: 4, 1..8 or 1..4..8 (min..opt..max).")] = "1",
    size: Annotated[
        str | None,
        typer.Option(help="Pixels: 512, 64..256, 64..128..256 or 512x768 (height x width). Default: the model's own."),
    ] = None,
    text_chunks: Annotated[str, typer.Option(help="Prompt length in chunks of 77 tokens: 1 or 1..3.")] = "1",
    components: Annotated[
        str | None, typer.Option(help="Such as unet,vae_decoder. Default: all that text-to-image uses.")
    ] = None,
    flavour: Annotated[str, typer.Option(help="auto, tensorrt or tensorrt_rtx.")] = "auto",
    workspace: Annotated[int | None, typer.Option(help="Limit of the builder's scratch memory, in MiB.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Build even what is up to date.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Build TensorRT engines; with TensorRT-RTX ahead of time, without a GPU.

    Engines that are up to date are kept; for the others it is said what changed.

    Examples:
      latentrt build shapes.bundle --target sm86,sm89,sm120 --batch 1..8 --size 64..256

      latentrt build sd15.bundle --target sm86+sm89 --components unet --size 512..768

      latentrt build sd15.bundle --target current --flavour tensorrt --workspace 4096
    """
    options = BuildOptions(
        target=target,
        precision=precision,
        batch=batch,
        size=size,
        text_chunks=text_chunks,
        components=None if components is None else tuple(word.strip() for word in components.split(",")),
        flavour=flavour,
        workspace_mib=workspace,
        force=force,
    )
    try:
        with _progress(shown=not as_json) as progress:
            results = build_engines(bundle, options, progress=progress)
    except Abandoned:
        # The builder's thread cannot be stopped; it has written nothing and must not outlive the process's libraries.
        note("cancelled without waiting for the builder; nothing is left half written.")
        os._exit(130)
    if as_json:
        print(json.dumps(_report(bundle, results)))
    else:
        _print(bundle, results)


@contextmanager
def _progress(*, shown: bool) -> Iterator[Any]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[phase]}"), TimeElapsedColumn())
    with Progress(*columns, console=progress_console(), disable=not shown) as bars:

        def start(title: str) -> Any:
            task = bars.add_task(title, total=1.0, phase="")
            return lambda phase, part: bars.update(task, completed=part, phase=phase)

        yield start


def _engine_report(bundle: Path, result: EngineResult) -> dict[str, Any]:
    sidecar = result.sidecar
    return {
        "component": sidecar.component,
        "precision": sidecar.precision,
        "targets": list(sidecar.targets),
        "status": "built" if result.built else "up to date",
        "changed": list(result.changed),
        "dropped": list(result.dropped),
        "path": str(bundle / result.path),
        "flavour": sidecar.flavour,
        "flavour_version": sidecar.flavour_version,
        "engine_bytes": sidecar.engine_bytes,
        "weight_bytes": sidecar.weight_bytes,
        "activation_bytes": sidecar.activation_bytes,
        "tensor_bytes": sidecar.tensor_bytes,
        "build_seconds": sidecar.build_seconds,
        "weight_shares": {name: round(sidecar.precisions.share(name), 4) for name in sidecar.precisions.weights},
        "obtained": dict(sidecar.obtained),
        "note": note_of(result),
    }


def note_of(result: EngineResult) -> str:
    """What is known of an engine beyond having been built."""
    if result.sidecar.inspected_layers:
        return "loaded and inspected on a GPU; not yet compared with its graph"
    return AHEAD_OF_TIME


def _report(bundle: Path, results: Sequence[EngineResult]) -> dict[str, Any]:
    return {
        "bundle": str(bundle),
        "engines": [_engine_report(bundle, result) for result in results],
        "planned_vram_bytes": planned_vram(result.sidecar for result in results),
    }


def _megabytes(size: int | None) -> str:
    return "not stated" if size is None else f"{size / 1e6:.1f}"


def _print(bundle: Path, results: Sequence[EngineResult]) -> None:
    columns = ("component", "target", "precision", "engine MB", "weights MB", "activation MB", "build s", "status")
    print_table("engines", columns, [_row(result) for result in results])
    for result in results:
        log(f"{bundle / result.path}")
        if result.changed:
            log(f"  differs from the nearest engine before it in: {', '.join(result.changed)}")
        for path in result.dropped:
            log(f"  removed {path}, made from an older graph")
    for sm, size in planned_vram(result.sidecar for result in results).items():
        log(
            f"planned VRAM on {sm}, MB: {_megabytes(size)} (all weights, inputs and outputs, one shared activation "
            "block; without the CUDA context)"
        )
    for text in sorted({note_of(result) for result in results}):
        log(text)


def _row(result: EngineResult) -> tuple[str, ...]:
    sidecar = result.sidecar
    readout = sidecar.precisions
    shares = ", ".join(f"{name} {readout.share(name):.0%}" for name in sorted(readout.weights))
    return (
        sidecar.component,
        "+".join(sidecar.targets),
        f"{sidecar.precision} ({shares})",
        _megabytes(sidecar.engine_bytes),
        _megabytes(sidecar.weight_bytes),
        _megabytes(sidecar.activation_bytes),
        f"{sidecar.build_seconds:.1f}",
        "built" if result.built else "up to date",
    )
