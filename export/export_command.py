"""`latentrt export`: a checkpoint to a bundle of verified ONNX graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from latentrt.runtime.console import log, note, print_table, progress_console
from latentrt.runtime.errors import UsageError
from latentrt.runtime.manifest import Artifact

from .checkpoint import open_checkpoint
from .exporter import Exported, export_checkpoint
from .finished import unfinished_folders
from .opset import DEFAULT_OPSET, OPSETS
from .optimize_command import optimized_as_json
from .optimizer import Optimized, check_targets, optimize_bundle

_COLUMNS = ("component", "precision", "size", "nodes", "relative L2", "largest value", "status")


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A diffusers folder, a .safetensors file in the original layout, or owner/name[@revision] on the hub."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to make or to add to.")],
    precision: Annotated[
        str, typer.Option(help="Which graphs: fp32, fp16, mixed, bf16, or several. fp16 is mixed where it overflows.")
    ] = "fp32,fp16",
    opset: Annotated[
        int | None, typer.Option(help=f"ONNX opset, {OPSETS[0]} to {OPSETS[-1]}; the default is {DEFAULT_OPSET}.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="The folder or file of a VAE to take instead.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="A LoRA to fuse, FILE or FILE=SCALE; may be given again.")
    ] = None,
    embedding: Annotated[
        list[str] | None, typer.Option(help="A textual inversion to fold in, FILE or FILE=WORD; may be given again.")
    ] = None,
    controlnet: Annotated[
        list[Path] | None, typer.Option(help="The folder or file of a ControlNet to add; may be given again.")
    ] = None,
    taesd: Annotated[Path | None, typer.Option(help="The folder of a TAESD (AutoencoderTiny) for previews.")] = None,
    prediction_type: Annotated[
        str | None, typer.Option(help="epsilon or v_prediction, for a single file that does not tell.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A diffusers folder whose configs a single file is read with.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="Also make graphs of ONNX Runtime's own operators: cpu, cuda, or both.")
    ] = "",
    uint8_vae: Annotated[
        bool, typer.Option("--uint8-vae", help="Also make a VAE decoder that gives uint8 pictures.")
    ] = False,
    prompt_keys: Annotated[
        bool, typer.Option("--prompt-keys", help="Also make a U-Net that projects the prompt once per request.")
    ] = False,
    check: Annotated[
        str, typer.Option(help="How thoroughly graphs are compared: full, quick, auto (quick for known ones) or none.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Export again what is up to date.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Export a Stable Diffusion checkpoint to ONNX graphs that are compared with PyTorch.

    Examples:
        latentrt export examples/shapes -o shapes.bundle

        latentrt export dreamshaper.safetensors -o dreamshaper.bundle --precision fp16

        latentrt export sd15 -o sd15.bundle --lora style.safetensors=0.8 --controlnet canny --taesd taesd
    """
    targets = _words(target)
    check_targets(targets)
    source = open_checkpoint(
        checkpoint,
        controlnets=controlnet or (),
        taesd=taesd,
        vae=vae,
        loras=[_scaled(text) for text in lora or ()],
        embeddings=[_named(text) for text in embedding or ()],
        prediction_type=prediction_type,
        config=config,
    )
    for line in source.notes:
        note(f"{source.name}: {line}")
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    optimized: list[Optimized] = []
    try:
        with Progress(*columns, console=progress_console(), transient=True) as progress:
            task = progress.add_task("starting", total=1.0)
            exported = export_checkpoint(
                source,
                output,
                precisions=_words(precision),
                opset=opset,
                uint8_vae=uint8_vae,
                prompt_keys=prompt_keys,
                check=check,
                force=force,
                report=lambda message, share: progress.update(task, description=message, completed=share),
            )
            if targets:
                optimized = optimize_bundle(
                    output, targets, report=lambda message: progress.update(task, description=message)
                )
    except BaseException:
        for folder in unfinished_folders(output):
            note(f"finished graphs are kept in {folder}: the same command goes on from there")
        raise
    if as_json:
        content = {
            "bundle": str(output),
            "artifacts": [_as_json(line) for line in exported],
            "optimized": [optimized_as_json(line) for line in optimized],
            "left_out": source.left_out,
            "notes": source.notes,
        }
        print(json.dumps(content))
    else:
        _print(exported, optimized)
        if source.left_out:
            log(f"left out: {', '.join(source.left_out)}")
        log(f"bundle: {output}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _scaled(text: str) -> tuple[Path, float]:
    """FILE or FILE=SCALE."""
    file, separator, scale = text.rpartition("=")
    if not separator or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(file), float(scale)
    except ValueError as err:
        raise UsageError(f"--lora: expected FILE or FILE=SCALE, got {text!r}.") from err


def _named(text: str) -> tuple[Path, str | None]:
    """FILE or FILE=WORD."""
    file, separator, word = text.rpartition("=")
    return (Path(file), word) if separator and not Path(text).exists() else (Path(text), None)


def _as_json(line: Exported) -> dict[str, Any]:
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


def _error_of(artifact: Artifact) -> str:
    worst = artifact.parity.get("worst_relative_l2")
    return "not compared" if worst is None else f"{worst:.2e}"


def _print(exported: list[Exported], optimized: list[Optimized]) -> None:
    rows = []
    for line in exported:
        artifact = line.artifact
        nearest = artifact.parity.get("nearest_overflow") or []
        rows.append(
            (
                artifact.component,
                artifact.precision,
                f"{line.size / 1e6:.1f} MB",
                line.nodes,
                _error_of(artifact),
                f"{nearest[0]['max_abs']:.4g}" if nearest else "",
                line.status,
            )
        )
    rows += [
        (
            line.artifact.component,
            f"{line.artifact.precision} for {line.artifact.target}",
            f"{line.own_size / 1e6:.1f} MB",
            line.nodes,
            _error_of(line.artifact),
            "",
            line.status,
        )
        for line in optimized
    ]
    print_table("graphs", _COLUMNS, rows)
    for line in exported:
        name, asked = f"{line.artifact.component} {line.artifact.precision}", line.artifact.inputs["precision"]
        if line.status == "exported" and line.reason not in ("new", "forced"):
            log(f"{name}: {line.reason}")
        if line.artifact.precision != asked:
            kept = len(line.artifact.parity.get("kept", ()))
            log(f"{name}: {asked} would overflow, so {kept} tensors stay in float32")
        if line.artifact.parity.get("check") == "none":
            log(f"{name}: not compared; the same graph passed with other weights before")
        if not line.artifact.parity.get("ran", True):
            why = "its CPU has no kernels for it" if line.artifact.precision == "bf16" else "quick check"
            log(f"{name}: compared by rounding after every operator, not as ONNX Runtime runs it ({why})")
