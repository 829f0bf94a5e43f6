"""`latentrt bench`: latency, memory and quality of a bundle, beside what people would use instead."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from latentrt.runtime.console import check_writable, log, note, print_table, progress_console, typed_command
from latentrt.runtime.generate_options import read_loras

_DRAWING, _PEERS, _RUNS, _QUALITY = "What is drawn", "What to compare with", "How long", "What it costs"
_RUN = "run"


class _BundleFirst(TyperGroup):
    """`latentrt bench BUNDLE` measures; only what is named otherwise is a subcommand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the measuring subcommand before what is no subcommand."""
        named = bool(args) and args[0] in self.list_commands(ctx)
        return super().parse_args(ctx, args if named else [_RUN, *(args or ["--help"])])


app = typer.Typer(
    cls=_BundleFirst,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Measure latency, memory and quality of a bundle; compare two measurements.",
)


@app.command(_RUN)
def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    size: Annotated[
        str | None,
        typer.Option(
            help="WIDTHxHEIGHT or one side, several by commas; default the model's.", rich_help_panel=_DRAWING
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Pictures side by side, such as 1,4.", rich_help_panel=_DRAWING)] = "1",
    steps: Annotated[str, typer.Option(help="Such as 20, or 10,20.", rich_help_panel=_DRAWING)] = "20",
    sampler: Annotated[
        str | None,
        typer.Option(help='Such as "DPM++ 2M,Euler a"; default the checkpoint\'s own.', rich_help_panel=_DRAWING),
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="As in generate.", rich_help_panel=_DRAWING)] = None,
    guidance: Annotated[
        str | None,
        typer.Option(help="SCALE, or SCALE:START-END for shares of the steps: 5,5:0.2-0.8.", rich_help_panel=_DRAWING),
    ] = None,
    prompts: Annotated[
        str, typer.Option(help="everyday, shapes, or a file with a prompt a line.", rich_help_panel=_DRAWING)
    ] = "everyday",
    seed: Annotated[int, typer.Option(help="Of the first picture.", rich_help_panel=_DRAWING)] = 0,
    lora: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME:SCALE, of the bundle.", rich_help_panel=_DRAWING)
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Such as fp32,fp16,int8; default all that it holds.")] = None,
    backend: Annotated[
        str, typer.Option(help="Of auto, onnxruntime, cuda, tensorrt, tensorrt_rtx, several by commas.")
    ] = "auto",
    residency: Annotated[str, typer.Option(help="all, swap, stream or auto, as in generate.")] = "all",
    against: Annotated[
        str | None, typer.Option(help="diffusers, torch-compile, optimum, by commas.", rich_help_panel=_PEERS)
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="For diffusers; default the one that was exported.", rich_help_panel=_PEERS),
    ] = None,
    optimum_python: Annotated[
        Path | None,
        typer.Option(help="Interpreter of an environment with optimum-onnx.", rich_help_panel=_PEERS),
    ] = None,
    optimum_model: Annotated[
        Path | None,
        typer.Option(help="Folder that optimum-cli wrote; default the bundle.", rich_help_panel=_PEERS),
    ] = None,
    warm_up: Annotated[int, typer.Option(help="Runs before those that count.", rich_help_panel=_RUNS)] = 2,
    min_runs: Annotated[int, typer.Option(help="Of each row.", rich_help_panel=_RUNS)] = 7,
    max_runs: Annotated[int, typer.Option(help="Of each row.", rich_help_panel=_RUNS)] = 40,
    confidence: Annotated[
        float,
        typer.Option(help="A row is settled when its median is known to this share, at 95 %.", rich_help_panel=_RUNS),
    ] = 0.02,
    seconds: Annotated[float, typer.Option(help="For the runs of a row.", rich_help_panel=_RUNS)] = 60.0,
    cold: Annotated[int, typer.Option(help="Fresh processes of each system; 0 for none.", rich_help_panel=_RUNS)] = 3,
    threads: Annotated[int, typer.Option(help="Of the processor; 0 for all.", rich_help_panel=_RUNS)] = 0,
    isolate: Annotated[
        bool | None,
        typer.Option(
            "--isolate/--together",
            help="Load one system at a time; default where memory is short.",
            rich_help_panel=_RUNS,
        ),
    ] = None,
    quality: Annotated[
        int, typer.Option(help="Prompts to draw for the price of speed; 0 for none.", rich_help_panel=_QUALITY)
    ] = 8,
    judge: Annotated[
        str | None,
        typer.Option(help="FILE.py:function that says whether a picture shows a prompt.", rich_help_panel=_QUALITY),
    ] = None,
    lpips: Annotated[Path | None, typer.Option(help="Weights of LPIPS.", rich_help_panel=_QUALITY)] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Results file; default bench-BUNDLE-TIME.json in this folder."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots and pictures.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables in Markdown.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")] = False,
) -> int:
    """Measure a bundle: every combination of the options is a row.

    Systems are measured in processes of their own and take turns run by run, until medians are known to the confidence
    asked for. Every sample is kept in the results file.

    Examples:
      latentrt bench sd15.bundle --size 512 --batch 1,4 --precision fp16,int8 --against diffusers --checkpoint sd15

      latentrt bench sd15.bundle --sampler "DPM++ 2M,UniPC" --steps 10,20 --guidance 7.5,7.5:0.0-0.6 --html bench.html

      latentrt bench compare before.json after.json --threshold 0.05           exits 1 past the threshold
    """
    from .bench_options import BenchOptions, read_guidance, read_integers, read_names, read_sizes
    from .bench_run import run_bench
    from .html_report import write_html
    from .markdown import write_markdown
    from .results_file import to_json
    from .terminal import print_results

    file = output or Path(
        f"bench-{bundle.resolve().name.removesuffix('.bundle')}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    )
    for name, path in (("output", file), ("html", html), ("markdown", markdown)):
        if path is not None:
            check_writable(name, path)
    options = BenchOptions(
        bundle=bundle,
        sizes=() if size is None else read_sizes(size),
        batches=read_integers("batch", batch),
        steps=read_integers("steps", steps),
        samplers=read_names(sampler),
        schedule=schedule,
        guidance=() if guidance is None else read_guidance(guidance),
        precisions=read_names(precision),
        backends=read_names(backend),
        against=read_names(against),
        checkpoint=checkpoint,
        optimum_python=optimum_python,
        optimum_model=optimum_model,
        prompts=prompts,
        seed=seed,
        warm_up=warm_up,
        min_runs=min_runs,
        max_runs=max_runs,
        confidence=confidence,
        seconds=seconds,
        cold=cold,
        quality=quality,
        judge=judge,
        lpips=lpips,
        threads=threads,
        isolate=isolate,
        loras=read_loras(lora or []),
        residency=residency,
    )
    with _progress(shown=not as_json) as progress:
        results = run_bench(options, file, command=typed_command(), on_progress=progress)
    if html is not None:
        write_html(html, results, file.parent)
    if markdown is not None:
        write_markdown(markdown, results)
    if as_json:
        print(json.dumps(to_json(results)))
    else:
        print_results(results)
        log(f"{file}: all samples" + "".join(f"; {path}" for path in (html, markdown) if path is not None))
    if all(row.skipped for row in results.rows):
        note("nothing was measured: every row says why.")
        return 1
    return 0


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="Results file.")],
    after: Annotated[Path, typer.Argument(help="Results file of the same command.")],
    threshold: Annotated[float, typer.Option(help="Change that counts, as a share: 0.05 is 5 %.")] = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Say what changed between two measurements; exit 1 if something became worse by more than the threshold.

    Example: latentrt bench compare main.json branch.json --threshold 0.03
    """
    from .compare import compare as hold_against
    from .compare_words import HEAD, comparison_rows, comparison_sentences
    from .report_cells import ran_where
    from .results_file import load_results

    one, other = load_results(before), load_results(after)
    comparison = hold_against(one, other, threshold=threshold)
    if as_json:
        print(json.dumps({**asdict(comparison), "regressed": comparison.regressed}))
    else:
        rows = comparison_rows(comparison)
        if rows:
            print_table(f"before: {before}. {ran_where(one)} After: {after}. {ran_where(other)}", HEAD, rows, texts=2)
        for sentence in comparison_sentences(comparison):
            log(sentence)
    return int(comparison.regressed)


@contextmanager
def _progress(*, shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Where the parts of a benchmark say how far they are."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=progress_console(), transient=True, disable=not shown) as bars:
        task = bars.add_task("opening", total=None)
        yield lambda what, done, total: bars.update(task, description=what, completed=done, total=total)
