"""`latentrt build`: TensorRT engines from a bundle's graphs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from latentrt.runtime.console import log, note, print_table, progress_console
from latentrt.runtime.engine_sidecar import describe_profiles

from .build_options import BuildOptions
from .engine_cancel import Abandoned
from .engine_jobs import AHEAD_OF_TIME, build_engines
from .engine_making import EngineResult
from .engine_memory import planned_vram

_TUNING, _WEIGHTS = "Speed and memory", "Weights and portability"


def build(
    bundle: Annotated[Path, typer.Argument(help="A bundle that latentrt export made.")],
    target: Annotated[
        str, typer.Option(help="GPUs: sm86,sm89 makes an engine each, sm86+sm89 one for both; current: this GPU.")
    ] = "current",
    precision: Annotated[str, typer.Option(help="Precision of the graphs to build: fp16, fp32…")] = "fp16",
    size: Annotated[
        str | None,
        typer.Option(
            help="Pixels: 512,768x512 (height x width) are buckets, each as fast as can be; 512..768 serves all sizes "
            "between. Default: the model's own."
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Images per call, in the same way: 1,2,4 or 1..8 or 1..4..8.")] = "1",
    guidance: Annotated[
        str, typer.Option(help="on or off if it is so in every step, which is faster; both serves either.")
    ] = "both",
    text_chunks: Annotated[str, typer.Option(help="Prompt length in chunks of 77 tokens: 1 or 1..3.")] = "1",
    components: Annotated[
        str | None, typer.Option(help="Such as unet,vae_decoder. Default: all that text-to-image uses.")
    ] = None,
    flavour: Annotated[str, typer.Option(help="auto, tensorrt or tensorrt_rtx.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Build even what is up to date.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    cache: Annotated[
        str, typer.Option(help="Where engines are kept for other bundles and runs: auto, off or a folder.")
    ] = "auto",
    level: Annotated[
        int | None,
        typer.Option(
            help="How long to look for fast kernels: 0 (quick build) to 5 (quick engine).", rich_help_panel=_TUNING
        ),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(help="Limit of the kernels' scratch memory, in MiB.", rich_help_panel=_TUNING)
    ] = None,
    tiling: Annotated[
        str,
        typer.Option(help="Search for kernels that stay in the L2 cache: none to full.", rich_help_panel=_TUNING),
    ] = "none",
    narrow: Annotated[
        bool,
        typer.Option("--narrow", help="Give up sizes if the memory does not suffice.", rich_help_panel=_TUNING),
    ] = False,
    weight_streaming: Annotated[
        bool,
        typer.Option(
            "--weight-streaming", help="Let weights stay in the host's memory at run time.", rich_help_panel=_TUNING
        ),
    ] = False,
    timing_cache: Annotated[
        str,
        typer.Option(help="Kernel timings that full TensorRT keeps: auto, off or a file.", rich_help_panel=_TUNING),
    ] = "auto",
    refit: Annotated[
        str,
        typer.Option(
            help="Weights that may be replaced later: none, lora (of LoRA files) or all.", rich_help_panel=_WEIGHTS
        ),
    ] = "none",
    strip: Annotated[
        bool,
        typer.Option("--strip", help="Leave out the weights that the bundle holds anyway.", rich_help_panel=_WEIGHTS),
    ] = False,
    version_compatible: Annotated[
        bool,
        typer.Option("--version-compatible", help="Later TensorRT versions can load it.", rich_help_panel=_WEIGHTS),
    ] = False,
    hardware_compatibility: Annotated[
        str,
        typer.Option(help="Full TensorRT: none, ampere_plus or same_compute_capability.", rich_help_panel=_WEIGHTS),
    ] = "none",
) -> None:
    """Build TensorRT engines; with TensorRT-RTX ahead of time, without a GPU.

    Engines that are up to date are kept; for the others it is said what changed. Sizes and batches are those of
    pictures: guidance, which runs each picture twice, is seen to.

    Examples:
      latentrt build sd15.bundle                                   for this GPU, one picture of the model's own size

      latentrt build sd15.bundle --target sm89 --size 512,768x512 --batch 1,2,4

      latentrt build shapes.bundle --target sm86+sm89+sm120 --size 64..256 --batch 1..8

      latentrt build sd15.bundle --target sm120 --strip            engines of a megabyte, to be shipped with the bundle

      latentrt build sd15.bundle --components unet --refit lora --workspace 4096
    """
    options = BuildOptions(
        target=target,
        precision=precision,
        batch=batch,
        size=size,
        text_chunks=text_chunks,
        guidance=guidance,
        components=None if components is None else tuple(word.strip() for word in components.split(",")),
        flavour=flavour,
        workspace_mib=workspace,
        optimization_level=level,
        refit=refit,
        strip=strip,
        version_compatible=version_compatible,
        hardware_compatibility=hardware_compatibility,
        tiling=tiling,
        weight_streaming=weight_streaming,
        narrow=narrow,
        timing_cache=timing_cache,
        cache=cache,
        force=force,
    )
    try:
        with _progress(shown=not as_json) as progress:
            announce = (lambda _text: None) if as_json else note
            results = build_engines(bundle, options, progress=progress, announce=announce)
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
        "status": result.status,
        "changed": list(result.changed),
        "nearest": result.nearest,
        "dropped": list(result.dropped),
        "notes": list(result.notes),
        "path": str(bundle / result.path),
        "flavour": sidecar.flavour,
        "flavour_version": sidecar.flavour_version,
        "sizes": describe_profiles(sidecar),
        "profiles": len(sidecar.profiles),
        "engine_bytes": sidecar.engine_bytes,
        "weight_bytes": sidecar.weight_bytes,
        "activation_bytes": sidecar.activation_bytes,
        "tensor_bytes": sidecar.tensor_bytes,
        "build_seconds": sidecar.build_seconds,
        "weight_shares": {name: round(sidecar.precisions.share(name), 4) for name in sidecar.precisions.weights},
        "flops_shares": {name: round(share, 4) for name, share in sidecar.flops.items()},
        "refit": sidecar.refit,
        "stripped": sidecar.stripped,
        "thin": sidecar.thin,
        "attempts": [dataclasses.asdict(attempt) for attempt in sidecar.attempts],
        "layer_report": sidecar.layer_report,
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
    columns = (
        *("component", "target", "precision", "weights", "FLOPs"),
        *("engine MB", "weights MB", "activation MB", "build s", "status"),
    )
    print_table("engines", columns, [_row(result) for result in results])
    for result in results:
        _print_details(bundle, result)
    for sm, size in planned_vram(result.sidecar for result in results).items():
        log(
            f"planned VRAM on {sm}, MB: {_megabytes(size)} (all weights, inputs and outputs, one shared activation "
            "block; without the CUDA context)"
        )
    for text in sorted({note_of(result) for result in results}):
        log(text)


def _print_details(bundle: Path, result: EngineResult) -> None:
    sidecar = result.sidecar
    log(f"{bundle / result.path}")
    log(f"  sizes: {describe_profiles(sidecar)}")
    if sidecar.thin or sidecar.stripped:
        log("  without its weights: those of the bundle's graph are put in when it is loaded")
    if result.reason is not None:
        log(f"  {result.reason}")
    for path in result.dropped:
        log(f"  removed {path}, made from an older graph")
    for attempt in sidecar.attempts:
        settings = ", ".join(f"{name} {value}" for name, value in attempt.settings.items() if value is not None)
        log(f"  a build with {settings} failed after {attempt.seconds:.1f} s: {attempt.problem}")
    for text in result.notes:
        log(f"  {text}")


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {shares[name]:.0%}" for name in sorted(shares)) or "none"


def _row(result: EngineResult) -> tuple[str, ...]:
    sidecar = result.sidecar
    return (
        sidecar.component,
        "+".join(sidecar.targets),
        sidecar.precision,
        _shares({name: sidecar.precisions.share(name) for name in sidecar.precisions.weights}),
        _shares(sidecar.flops),
        _megabytes(sidecar.engine_bytes),
        _megabytes(sidecar.weight_bytes),
        _megabytes(sidecar.activation_bytes),
        f"{sidecar.build_seconds:.1f}",
        result.status,
    )
