"""`latentrt calibrate`: int8 or fp8 within a quality budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentrt.runtime.console import check_writable, note, progress_console
from latentrt.runtime.errors import CalibrationError, UsageError
from latentrt.runtime.generate_options import read_loras, read_settings, read_size

if TYPE_CHECKING:
    from .layer_quant import Kind

_NUMBERS, _DRAWING, _SEARCH = "How numbers are chosen", "What is drawn", "How layers are chosen"
# By precision of a bundle: kind, and whether only weights are quantized.
_KINDS: Mapping[str, tuple[Kind, bool]] = {
    "int8": ("int8", False),
    "fp8": ("fp8", False),
    "int8w": ("int8", True),
}


def calibrate(
    bundle: Annotated[Path, typer.Argument(help="A bundle that latentrt export made in fp32 and fp16.")],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="What quantized pictures have to hold against fp32 ones, on prompts held out: psnr=30, ssim=0.95, "
            "flip=0.05, sqnr=35, lpips=0.1 (with --lpips), accuracy=0.01 (with --judge). May be repeated. Default: "
            "psnr=32."
        ),
    ] = None,
    prompts: Annotated[
        str, typer.Option(help="everyday or shapes, the project's own sets, or a file with a prompt a line.")
    ] = "everyday",
    precision: Annotated[
        str, typer.Option(help="int8, fp8, or int8w: weights alone, for what computes int8 no faster.")
    ] = "int8",
    component: Annotated[str, typer.Option(help="unet, or vae_decoder, which is measured by itself.")] = "unet",
    report: Annotated[Path | None, typer.Option(help="Write a page with pictures and plots.")] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Only measure the noise of every layer, and print it.")
    ] = False,
    apply: Annotated[
        Path | None, typer.Option("--apply", help="Apply a plan that was edited by hand, and verify it.")
    ] = None,
    adopt: Annotated[
        Path | None, typer.Option("--adopt", help="Put a Q/DQ graph that was made elsewhere into the bundle.")
    ] = None,
    device: Annotated[str, typer.Option(help="That PyTorch computes on: cpu, cuda, cuda:1…")] = "cpu",
    backend: Annotated[
        str, typer.Option(help="That draws: onnxruntime, or cuda for its CUDA provider.")
    ] = "onnxruntime",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    steps: Annotated[int, typer.Option(rich_help_panel=_DRAWING)] = 20,
    sampler: Annotated[str | None, typer.Option(help="As in generate.", rich_help_panel=_DRAWING)] = None,
    schedule: Annotated[str | None, typer.Option(help="As in generate.", rich_help_panel=_DRAWING)] = None,
    sampler_option: Annotated[
        list[str] | None, typer.Option(help="As in generate: eta=0.5.", rich_help_panel=_DRAWING)
    ] = None,
    guidance: Annotated[float | None, typer.Option(rich_help_panel=_DRAWING)] = None,
    negative_prompt: Annotated[str | None, typer.Option(rich_help_panel=_DRAWING)] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT.", rich_help_panel=_DRAWING)] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME:SCALE, of the bundle.", rich_help_panel=_DRAWING)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of prompts, pictures and probes.", rich_help_panel=_DRAWING)] = 0,
    counts: Annotated[
        str,
        typer.Option(help="Prompts to calibrate, to search and to verify with.", rich_help_panel=_DRAWING),
    ] = "64,8,32",
    timesteps: Annotated[
        int, typer.Option(help="Calls to keep of every prompt of the calibration.", rich_help_panel=_DRAWING)
    ] = 8,
    judge: Annotated[
        str | None,
        typer.Option(help="FILE.py:function that says whether a picture shows a prompt.", rich_help_panel=_DRAWING),
    ] = None,
    lpips: Annotated[Path | None, typer.Option(help="Weights of LPIPS.", rich_help_panel=_DRAWING)] = None,
    method: Annotated[
        str,
        typer.Option(help="minmax, percentile, entropy, mse or output-error.", rich_help_panel=_NUMBERS),
    ] = "output-error",
    percentile: Annotated[float, typer.Option(help="Of --method percentile.", rich_help_panel=_NUMBERS)] = 99.99,
    smooth: Annotated[
        bool, typer.Option("--smooth/--no-smooth", help="Divide outlier channels.", rich_help_panel=_NUMBERS)
    ] = True,
    correct: Annotated[
        bool, typer.Option("--correct/--no-correct", help="Take mean errors off biases.", rich_help_panel=_NUMBERS)
    ] = False,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Measure the noise of each layer by itself.", rich_help_panel=_NUMBERS),
    ] = False,
    all_layers: Annotated[
        bool,
        typer.Option("--all-layers", help="Quantize all that can be, whatever it costs.", rich_help_panel=_SEARCH),
    ] = False,
    times: Annotated[
        Path | None,
        typer.Option(
            help="JSON of layer times in seconds; without it layers cost MACs, or weights in int8w.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    solver: Annotated[str, typer.Option(help="milp or greedy.", rich_help_panel=_SEARCH)] = "milp",
    rounds: Annotated[int, typer.Option(help="Plans to measure.", rich_help_panel=_SEARCH)] = 4,
) -> int:
    """Quantize what the quality budget allows, and prove it on prompts that were held out.

    Ranges are taken along real sampling runs. What every layer adds to the noise is measured, and the cheapest mix of
    quantized and fp16 layers chosen that holds the budget. The bundle gets two graphs with the same integers, for
    TensorRT and for ONNX Runtime. Stages are kept in BUNDLE/calibration: an interrupted run goes on.

    Examples:
      latentrt calibrate sd15.bundle --budget psnr=30 --device cuda --backend cuda

      latentrt calibrate shapes.bundle --prompts shapes --report report.html

      latentrt calibrate sd15.bundle --sensitivity

      latentrt calibrate sd15.bundle --method minmax --no-smooth --all-layers    the naive way

      latentrt calibrate sd15.bundle --apply sd15.bundle/unet/int8.plan.json                  after editing it
    """
    from .adopt import adopt_graph
    from .budget import DEFAULT_BUDGET, parse_budgets
    from .calibrate_output import tell, tell_adopted, tell_sensitivities, write_page
    from .calibration import calibrate as search_and_verify
    from .calibration import quantize_all, verify_edited
    from .calibration_options import CalibrateOptions
    from .planning import PlanOptions
    from .preparing import prepare
    from .verification import what_limits

    modes = {"--sensitivity": sensitivity, "--all-layers": all_layers, "--apply": apply, "--adopt": adopt}
    _check_modes([name for name, given in modes.items() if given], report)
    kind, weight_only = _kind(precision)
    if adopt is not None:
        adopted = adopt_graph(bundle, component, adopt, precision)
        tell_adopted(bundle, adopted, as_json=as_json)
        return 0
    pixels = read_size("size", size)
    settings = {
        "steps": steps,
        "sampler": sampler,
        "schedule": schedule,
        "sampler_options": read_settings(sampler_option or []),
        "guidance": guidance,
        "negative_prompt": negative_prompt,
        **({} if pixels is None else {"height": pixels[0], "width": pixels[1]}),
    }
    options = CalibrateOptions(
        component=component,
        numbers=PlanOptions(
            kind=kind,
            weight_only=weight_only,
            method=method,  # type: ignore[arg-type]  # checked there
            percent=percentile,
            smooth=smooth,
            correct=correct,
            exact=exact,
            seed=seed,
        ),
        budgets=parse_budgets(budget or [DEFAULT_BUDGET]),
        prompts=prompts,
        counts=_counts(counts),
        timesteps=timesteps,
        settings={name: value for name, value in settings.items() if value not in (None, {})},
        seed=seed,
        loras=read_loras(lora or []),
        solver=solver,  # type: ignore[arg-type]  # as above
        rounds=rounds,
        times=times,
        judge=judge,
        lpips=lpips,
        device=device,
        backend=backend,
    )
    with _told(shown=not as_json) as (say, progress):
        if apply is not None:
            result = verify_edited(bundle, apply, options, say=say, on_progress=progress)
        else:
            prepared = prepare(bundle, options, say=say, on_progress=progress)
            if sensitivity:
                tell_sensitivities(prepared.plan, as_json=as_json)
                return 0
            run = quantize_all if all_layers else search_and_verify
            result = run(prepared, say=say, on_progress=progress)
        if report is not None:
            write_page(report, bundle, result)
    tell(bundle, result, report, as_json=as_json)
    if result.met or all_layers:
        return 0
    if as_json:
        return 1
    missed = [outcome for outcome in result.outcomes if not outcome.met]
    raise CalibrationError(
        f"budget: expected it to be held on the held-out prompts, got: {'; '.join(map(str, missed))}. "
        f"{what_limits(missed, result.plan)} The bundle has this plan all the same: ask for less, or calibrate with "
        "more prompts (--counts)."
    )


def _check_modes(given: Sequence[str], report: Path | None) -> None:
    """Refuse options that ask for different things, and a report that could not be written."""
    if len(given) > 1:
        raise UsageError(f"{given[0]}: expected it without {given[1]}, got both. Leave one out.")
    if report is None:
        return
    if given and given[0] in ("--sensitivity", "--adopt"):
        raise UsageError(f"--report: expected a calibration to report on, got {given[0]}. Leave one out.")
    check_writable("report", report)


def _kind(precision: str) -> tuple[Kind, bool]:
    """What layers are quantized to, and whether only their weights are."""
    if precision not in _KINDS:
        raise UsageError(f"precision: expected one of {', '.join(_KINDS)}, got {precision!r}.")
    return _KINDS[precision]


def _counts(text: str) -> tuple[int, int, int]:
    try:
        calibration, search, verification = (int(part) for part in text.split(","))
    except ValueError as err:
        raise UsageError(f"counts: expected three numbers such as 64,8,32, got {text!r}.") from err
    return calibration, search, verification


@contextmanager
def _told(*, shown: bool) -> Iterator[tuple[Callable[[str], None], Callable[[str, float], None]]]:
    """Where stages say what they do, and how far they are."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=progress_console(), transient=True, disable=not shown) as bars:
        task = bars.add_task("reading", total=1.0)
        yield (
            note if shown else lambda _text: None,
            lambda text, share: bars.update(task, description=text, completed=share),
        )
