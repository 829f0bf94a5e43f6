"""`latentrt plan`: memory, engine sizes and build time of a bundle, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from latentrt.runtime.console import log, print_table, progress_console

from .build_options import BuildOptions
from .build_rates import MEASURED_ON
from .engine_forecast import duration
from .plan_bundle import BundlePlan, plan_as_json, plan_bundle
from .plan_cards import parse_card
from .plan_components import ComponentPlan
from .plan_fit import SMALLEST_SIDE, Fit


def plan(
    bundle: Annotated[Path, typer.Argument(help="A bundle that latentrt export made.")],
    size: Annotated[
        str | None, typer.Option(help="Pixels: 512 or 512x768 (height x width). Default: the model's own.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Images per call; of several or a range the largest counts.")] = "1",
    text_chunks: Annotated[str, typer.Option(help="Prompt length in chunks of 77 tokens.")] = "1",
    guidance: Annotated[
        str, typer.Option(help="on or off if it is so in every step; both leaves rows open for either.")
    ] = "both",
    vram: Annotated[
        str | None, typer.Option(help="The card: 8GB, 8GiB, 'RTX 4060'. Default: this machine's GPU.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Precision of the graphs: fp16, fp32…")] = "fp16",
    components: Annotated[
        str | None, typer.Option(help="Such as unet,vae_decoder. Default: all that text-to-image uses.")
    ] = None,
    flavour: Annotated[str, typer.Option(help="auto, tensorrt or tensorrt_rtx.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what engines of a bundle will take: GPU memory under each policy, disk, build time and memory.

    Activation memory is estimated from the graphs; where an engine for just these shapes is in the bundle, the
    builder's own figure is used and it is said how far the estimate was off.

    Examples:
      latentrt plan sd15.bundle --size 512 --batch 4

      latentrt plan sdxl.bundle --size 1024 --batch 2 --vram 8GB

      latentrt plan sd15.bundle --size 768 --vram "RTX 4060" --json
    """
    options = BuildOptions(
        precision=precision,
        batch=batch,
        size=size,
        text_chunks=text_chunks,
        guidance=guidance,
        components=None if components is None else tuple(word.strip() for word in components.split(",")),
        flavour=flavour,
    )
    card = None if vram is None else parse_card(vram)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=progress_console(), transient=True) as progress:
        task = progress.add_task("reading", total=None)
        made = plan_bundle(
            bundle, options, card=card, report=lambda text: progress.update(task, description=f"planning {text}")
        )
    if as_json:
        print(json.dumps({"bundle": str(bundle), **plan_as_json(made)}))
    else:
        _print(made)


def _print(made: BundlePlan) -> None:
    shape = f"{made.width} x {made.height}, {made.images} {'image' if made.images == 1 else 'images'}"
    columns = ("component", "precision", "weights", "activation", "in and out", "engine", "build s", "build GB")
    print_table(f"{shape}: components, MB", columns, [_component_row(component) for component in made.components])
    where = "the smallest card for each" if made.card is None else made.card.name
    columns = ("policy", "peak at", "weights", "activation", "in and out", "CUDA", "peak", "fits")
    print_table(f"GPU memory, MB, {where}", columns, [_fit_row(fit, made) for fit in made.fits])
    if made.card is not None:
        _print_verdict(made)
    for component in made.components:
        if component.estimate_error is not None:
            log(f"{component.component}: the builder's figure; the estimate was off by {component.estimate_error:+.1%}")
    seconds = "a time that no build has told yet" if made.build_seconds is None else duration(made.build_seconds)
    memory = "" if made.build_peak_bytes is None else f", up to {made.build_peak_bytes / 1e9:.1f} GB of memory"
    log(
        f"building all: {seconds}{memory}, {made.disk_bytes / 1e9:.2f} GB of disk (rates of this machine's builds, or "
        f"of {MEASURED_ON})"
    )
    for note in made.notes:
        log(note)


def _print_verdict(made: BundlePlan) -> None:
    fitting = next((fit for fit in made.fits if fit.spare >= 0), None)
    if fitting is not None:
        log(f"fits: {fitting.residency.policy}, with {_mb(fitting.spare)} MB to spare")
        return
    best = max(made.fits, key=lambda fit: fit.spare)
    log(f"nothing fits: {best.residency.policy} is {_mb(-best.spare)} MB too large")
    for way in made.ways:
        log(f"  would fit: {way.what} ({way.fit.residency.policy}, {_mb(way.fit.spare)} MB to spare)")
    if not made.ways:
        log(f"  nor would fewer images, or sides down to {SMALLEST_SIDE}: take a card with more memory")


def _component_row(plan: ComponentPlan) -> tuple[str, ...]:
    return (
        plan.component,
        plan.precision,
        _mb(plan.memory.weights),
        _mb(plan.memory.activation) + (" estimated" if plan.stated is None else " built"),
        _mb(plan.memory.tensors),
        _mb(plan.engine_bytes),
        "not known" if plan.build_seconds is None else f"{plan.build_seconds:.0f}",
        "not known" if plan.build_peak_bytes is None else f"{plan.build_peak_bytes / 1e9:.1f}",
    )


def _fit_row(fit: Fit, made: BundlePlan) -> tuple[str, ...]:
    peak, streamed = fit.residency.peak, _streamed(fit, made)
    always = len({stage.total for stage in fit.residency.stages}) == 1
    if made.card is None:
        verdict = f"from {fit.card.name}" if fit.spare >= 0 else f"not on {fit.card.name}"
    else:
        verdict = f"{_mb(fit.spare)} to spare" if fit.spare >= 0 else f"{_mb(-fit.spare)} too large"
    return (
        fit.residency.policy + (f", {streamed:.0%} of the U-Net" if streamed else ""),
        "every stage" if always else " + ".join(peak.components),
        _mb(peak.weights),
        _mb(peak.activation),
        _mb(peak.tensors),
        _mb(peak.context),
        _mb(peak.total),
        verdict,
    )


def _streamed(fit: Fit, made: BundlePlan) -> float:
    """The part of the U-Net's weights that does not stay on the device."""
    weights = next((plan.memory.weights for plan in made.components if plan.component == "unet"), 0)
    return 0.0 if fit.residency.budget is None or not weights else 1 - fit.residency.budget / weights


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"
