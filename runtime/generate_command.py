"""`latentrt generate`: prompts to PNG files."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UsageError

SIZE_HELP = "Pixels, a multiple of 8; default what the checkpoint was trained at."


def picture_paths(output: Path, count: int) -> list[Path]:
    """The file itself for one picture; `name-00.png`, `name-01.png`… for more."""
    if count == 1:
        return [output]
    digits = max(2, len(str(count - 1)))
    return [output.with_name(f"{output.stem}-{index:0{digits}}{output.suffix}") for index in range(count)]


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """The prompt, or the lines of a file that are not empty.

    Raises:
        UsageError: neither or both are given, or the file is missing or holds none.
    """
    if (prompt is None) == (file is None):
        raise UsageError("prompt: expected a prompt or --prompts FILE, got both or neither. Give one of them.")
    if file is None:
        return [prompt or ""]
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as err:
        raise UsageError(f"{file}: expected a text file with one prompt a line, got {err}.") from err
    if not lines:
        raise UsageError(f"{file}: expected one prompt a line, found none.")
    return lines


def check_output(output: Path) -> None:
    """Refuse an output that could not be written, before minutes are spent on it.

    Raises:
        UsageError: it is no .png file name, or its folder does not exist.
    """
    if output.suffix.lower() != ".png":
        raise UsageError(f"{output}: expected a file name ending in .png, got {output.suffix or 'no ending'!r}.")
    if not output.parent.is_dir():
        raise UsageError(f"{output}: expected an existing folder, found no {output.parent}. Make it first.")


def generate(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file; several get numbers.")] = Path("out.png"),
    negative: Annotated[str, typer.Option("--negative", help="What not to draw.")] = "",
    prompts: Annotated[Path | None, typer.Option("--prompts", help="File with one prompt a line.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Sampler; default the checkpoint's own.")] = None,
    schedule: Annotated[str | None, typer.Option(help="Noise levels: karras, leading, linspace, trailing…")] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 and below switch it off.")] = 7.5,
    seed: Annotated[int, typer.Option(help="Image i of a batch uses seed + i.")] = 0,
    batch: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 1,
    width: Annotated[int | None, typer.Option(help=SIZE_HELP)] = None,
    height: Annotated[int | None, typer.Option(help=SIZE_HELP)] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16…; default the first the bundle holds.")] = None,
    backend: Annotated[str, typer.Option(help="auto, onnxruntime, cuda, tensorrt or tensorrt_rtx.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Draw pictures from prompts, without PyTorch.

    Example: latentrt generate shapes.bundle "a small red circle on a blue background" -o out.png
    --sampler "DPM++ 2M" --schedule karras --steps 20 --guidance 5 --seed 42
    """
    from rich.progress import Progress

    from .console import log, note, progress_console
    from .image import save_png
    from .pipeline import Pipeline

    texts = read_prompts(prompt, prompts)
    check_output(output)
    started = time.perf_counter()
    paths = picture_paths(output, len(texts) * batch)
    written: list[dict[str, Any]] = []
    with warnings.catch_warnings(record=True) as caught, Progress(console=progress_console(), transient=True) as bar:
        warnings.simplefilter("always", UserWarning)
        pipe = Pipeline.load(bundle, precision=precision, backend=backend)
        loaded = time.perf_counter()
        task = bar.add_task("sampling", total=steps * len(texts))
        for index, text in enumerate(texts):
            result = pipe(
                text,
                negative_prompt=negative,
                sampler=sampler,
                schedule=schedule,
                steps=steps,
                guidance=guidance,
                seed=seed,
                batch=batch,
                width=width,
                height=height,
                on_step=lambda _step: bar.advance(task),
            )
            for offset, picture in enumerate(result.images):
                path = paths[index * batch + offset]
                save_png(path, picture, parameters=result.parameters[offset])
                written.append({"path": str(path), "prompt": text, "seed": result.seeds[offset]})
    messages = sorted({str(warning.message) for warning in caught})
    seconds = time.perf_counter() - loaded
    if as_json:
        report = {
            "pictures": written,
            "precision": pipe.precision,
            "backend": pipe.backend,
            "load_seconds": round(loaded - started, 3),
            "seconds": round(seconds, 3),
            "warnings": messages,
        }
        print(json.dumps(report))
        return 0
    for message in messages:
        note(f"warning: {message}")
    names = f"{paths[0]}" if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"
    log(f"{names}: {len(paths)} picture(s) in {seconds:.2f} s, loaded in {loaded - started:.2f} s")
    log(f"{pipe.precision} on {pipe.backend}")
    return 0
