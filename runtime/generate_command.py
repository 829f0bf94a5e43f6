"""`latentrt generate`: prompts, and pictures to start from, to picture files."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UsageError

if TYPE_CHECKING:
    from .pipeline import Pipeline, Result
    from .vram import VramPeak

SIZE_HELP = "Pixels, a multiple of 8; default what the checkpoint was trained at, or the image's own."
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_IMAGE, _SAMPLING, _GUIDANCE, _SDXL = "Pictures to start from", "Sampling", "Guidance", "SDXL"


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
        UsageError: it is no picture's file name, or its folder does not exist.
    """
    if output.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{output}: expected a file name ending in {', '.join(SUFFIXES)}, got {output.suffix or 'no ending'!r}."
        )
    if not output.parent.is_dir():
        raise UsageError(f"{output}: expected an existing folder, found no {output.parent}. Make it first.")


def generate(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    prompt: Annotated[str | None, typer.Argument(help="What to draw; the web UIs' grammar is understood.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG, JPEG or WebP file; several get numbers.")] = Path(
        "out.png"
    ),
    negative: Annotated[str | None, typer.Option("--negative", help="What not to draw.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="File with one prompt a line.")] = None,
    sampler: Annotated[str | None, typer.Option(help="Sampler; default the checkpoint's own.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Noise levels: karras, exponential, beta, sgm_uniform, ays, leading, trailing…")
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance, 1 and below off; default 7.5, SDXL 5.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Image i of a batch uses seed + i.")] = 0,
    batch: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 1,
    width: Annotated[int | None, typer.Option(help=SIZE_HELP)] = None,
    height: Annotated[int | None, typer.Option(help=SIZE_HELP)] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16, mixed, int8, fp8, int8w; default the first of these held.")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, onnxruntime, cuda, tensorrt or tensorrt_rtx.")] = "auto",
    residency: Annotated[
        str, typer.Option(help="What stays in memory: all, swap (one network at a time), stream (TensorRT), auto.")
    ] = "all",
    warm_up: Annotated[
        bool, typer.Option("--warm-up", help="First draw a step of this size, so that no picture pays for start-up.")
    ] = False,
    clip_skip: Annotated[int, typer.Option(help="Layers of the text encoder left out at the end: 0 none.")] = 0,
    negative_clip_skip: Annotated[int, typer.Option(help="Likewise for the negative prompt.")] = 0,
    embedding: Annotated[
        list[Path] | None, typer.Option(help="Textual inversion, .safetensors; its name becomes a word.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="LoRA of the bundle: NAME or NAME:SCALE; see latentrt lora add.")
    ] = None,
    rng: Annotated[str, typer.Option(help="Whose random numbers: cpu or cuda (PyTorch's), numpy.")] = "cpu",
    gpu: Annotated[str | None, typer.Option(help="With --rng cuda: the GPU whose numbers they are.")] = None,
    variation_seed: Annotated[int | None, typer.Option(help="Turn the noise towards this seed's.")] = None,
    variation_strength: Annotated[float, typer.Option(help="How far, 0 to 1.")] = 0.0,
    resize_seed_from: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT whose composition to keep.")] = None,
    eta: Annotated[float | None, typer.Option(help="Stochasticity.", rich_help_panel=_SAMPLING)] = None,
    sampler_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, by diffusers' names.", rich_help_panel=_SAMPLING)
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="Timesteps to visit, divided by commas.", rich_help_panel=_SAMPLING)
    ] = None,
    sigmas: Annotated[
        str | None, typer.Option(help="Noise levels to visit, the last that of the result.", rich_help_panel=_SAMPLING)
    ] = None,
    guidance_rescale: Annotated[
        float, typer.Option(help="Against overexposure, 0 to 1.", rich_help_panel=_GUIDANCE)
    ] = 0.0,
    guidance_interval: Annotated[
        str | None, typer.Option(help="START-END, shares of the steps with guidance.", rich_help_panel=_GUIDANCE)
    ] = None,
    guidance_end: Annotated[
        float | None, typer.Option(help="Scale at the last step.", rich_help_panel=_GUIDANCE)
    ] = None,
    guidance_curve: Annotated[str, typer.Option(help="linear or cosine.", rich_help_panel=_GUIDANCE)] = "linear",
    image: Annotated[
        Path | None, typer.Option(help="Picture to start from, to paint in, or to edit.", rich_help_panel=_IMAGE)
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much is drawn anew, 0 to 1.", rich_help_panel=_IMAGE)
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="White where to paint.", rich_help_panel=_IMAGE)] = None,
    image_guidance: Annotated[
        float, typer.Option(help="How closely an editing model keeps to it.", rich_help_panel=_IMAGE)
    ] = 1.5,
    control: Annotated[
        list[str] | None, typer.Option(help="ControlNet: FILE@SCALE@START-END@MODEL.", rich_help_panel=_IMAGE)
    ] = None,
    hires: Annotated[float | None, typer.Option(help="Second pass at this scale.", rich_help_panel=_IMAGE)] = None,
    hires_strength: Annotated[float, typer.Option(help="Of the second pass.", rich_help_panel=_IMAGE)] = 0.7,
    hires_steps: Annotated[int | None, typer.Option(help="Of the second pass.", rich_help_panel=_IMAGE)] = None,
    hires_upscaler: Annotated[
        str, typer.Option(help="latent, latent-nearest or lanczos.", rich_help_panel=_IMAGE)
    ] = "latent",
    tile: Annotated[int | None, typer.Option(help="Side of the VAE's tiles; 0 for none.")] = None,
    prompt_2: Annotated[str | None, typer.Option(help="For the second text encoder.", rich_help_panel=_SDXL)] = None,
    original_size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT.", rich_help_panel=_SDXL)] = None,
    crop: Annotated[str | None, typer.Option(help="LEFTxTOP.", rich_help_panel=_SDXL)] = None,
    refiner: Annotated[
        Path | None, typer.Option(help="Bundle of the refiner, for the last noise levels.", rich_help_panel=_SDXL)
    ] = None,
    refiner_switch: Annotated[
        float, typer.Option(help="Share of the noise levels after which it takes over.", rich_help_panel=_SDXL)
    ] = 0.8,
    safety_checker: Annotated[
        bool | None,
        typer.Option(
            "--safety-checker/--no-safety-checker",
            help="Make pictures black that the safety checker flags; default if the bundle has one.",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE for any other attribute of `Request`.")
    ] = None,
    preview: Annotated[Path | None, typer.Option(help="File to keep writing a small preview to while drawing.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds after which to give up.")] = None,
    quality: Annotated[int, typer.Option(help="Of JPEG and WebP.")] = 95,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Draw pictures from prompts, without PyTorch.

    Example: latentrt generate shapes.bundle "a small red circle on a blue background" -o out.png
    --sampler "DPM++ 2M" --schedule karras --steps 20 --guidance 5 --seed 42
    """
    from .cuda_rng import DEFAULT_GPU
    from .generate_options import (
        read_control,
        read_hires,
        read_loras,
        read_numbers,
        read_pair,
        read_settings,
        read_size,
    )

    texts = read_prompts(prompt, prompts)
    check_output(output)
    settings: dict[str, Any] = {
        "negative_prompt": negative,
        "prompt_2": prompt_2,
        "sampler": sampler,
        "schedule": schedule,
        "steps": steps,
        "timesteps": read_numbers("timesteps", timesteps),
        "sigmas": read_numbers("sigmas", sigmas),
        "eta": eta,
        "sampler_options": read_settings(sampler_option or ()),
        "guidance": guidance,
        "guidance_rescale": guidance_rescale,
        "guidance_interval": read_pair("guidance-interval", guidance_interval, "-") or (0.0, 1.0),
        "guidance_end": guidance_end,
        "guidance_curve": guidance_curve,
        "image_guidance": image_guidance,
        "seed": seed,
        "batch": batch,
        "rng": rng,
        "gpu": gpu or DEFAULT_GPU,
        "variation_seed": variation_seed,
        "variation_strength": variation_strength,
        "resize_seed_from": read_size("resize-seed-from", resize_seed_from),
        "clip_skip": clip_skip,
        "negative_clip_skip": negative_clip_skip,
        "width": width,
        "height": height,
        "image": image,
        "strength": strength,
        "mask": mask,
        "controls": tuple(read_control(text) for text in control or ()),
        "hires": read_hires(hires, hires_strength, hires_steps, hires_upscaler),
        "tile": tile,
        "original_size": read_size("original-size", original_size),
        "crop": read_size("crop", crop) or (0, 0),
        "safety_checker": safety_checker,
        **read_settings(setting or ()),
    }
    drawing = _Drawing(texts, output, batch, preview, deadline, quality)
    loading = {
        "precision": precision,
        "backend": backend,
        "residency": residency,
        "textual_inversions": embedding or (),
        "loras": read_loras(lora or ()),
    }
    report = drawing.run(bundle, loading, settings, refiner, refiner_switch, warm_up=warm_up)
    if as_json:
        print(json.dumps(report))
    else:
        _tell(report)
    return 0


class _Drawing:
    """The run of the command: loads, draws prompt after prompt, saves each picture as soon as it is there."""

    def __init__(
        self,
        texts: Sequence[str],
        output: Path,
        batch: int,
        preview: Path | None,
        deadline: float | None,
        quality: int,
    ) -> None:
        self.texts, self.batch, self.preview = texts, batch, preview
        self.deadline, self.quality = deadline, quality
        self.paths = picture_paths(output, len(texts) * max(batch, 1))
        self.written: list[dict[str, Any]] = []

    def run(
        self,
        bundle: Path,
        loading: dict[str, Any],
        settings: dict[str, Any],
        refiner: Path | None,
        switch: float,
        *,
        warm_up: bool,
    ) -> dict[str, Any]:
        from rich.progress import Progress

        from .console import progress_console
        from .pipeline import Pipeline, base_and_refiner
        from .vram import VramMeter

        started = time.perf_counter()
        with Progress(console=progress_console(), transient=True) as bar, VramMeter() as vram:
            pipe = Pipeline.load(bundle, **loading)
            second = None if refiner is None else Pipeline.load(refiner, **{**loading, "loras": ()})
            loaded = time.perf_counter()
            task = bar.add_task("warming up" if warm_up else "sampling", total=None)
            if warm_up:
                size = {name: settings[name] for name in ("width", "height", "guidance")}
                for each in (pipe, second):
                    if each is not None:
                        each.warm_up(**size, batch=self.batch)
                bar.update(task, description="sampling")
            warm = time.perf_counter()

            def on_step(step: Any) -> None:
                bar.update(task, completed=step.index + 1, total=step.total)
                if self.preview is not None:
                    self._show(step)

            for index, text in enumerate(self.texts):
                if second is not None:
                    result = base_and_refiner(pipe, second, text, switch=switch, on_step=on_step, **settings)
                else:
                    result = pipe(text, on_step=on_step, deadline=self.deadline, **settings)
                self._save(result, text, index * self.batch)
            seconds = {"load": loaded - started, "warm_up": warm - loaded, "draw": time.perf_counter() - warm}
            return self._report(pipe, seconds, vram.peak)

    def _show(self, step: Any) -> None:
        from .image import save_picture

        assert self.preview is not None
        save_picture(self.preview, step.preview()[0])

    def _save(self, result: Result, text: str, first: int) -> None:
        from .image import save_picture

        for offset, picture in enumerate(result.images):
            path = self.paths[first + offset]
            save_picture(
                path,
                picture,
                parameters=result.parameters[offset],
                record=result.records[offset],
                quality=self.quality,
            )
            line = {"path": str(path), "prompt": text, "seed": result.seeds[offset]}
            if result.nsfw_content_detected is not None:
                line["nsfw_content_detected"] = result.nsfw_content_detected[offset]
            self.written.append(line)

    def _report(self, pipe: Pipeline, seconds: dict[str, float], vram: VramPeak) -> dict[str, Any]:
        return {
            "pictures": self.written,
            "precision": pipe.precision,
            "precisions": pipe.precisions,
            "backend": pipe.backend,
            "residency": pipe.residency,
            "notes": pipe.notes,
            "vram": {"peak_bytes": vram.nbytes, "of": vram.of, "reason": vram.reason},
            "load_seconds": round(seconds["load"], 3),
            "warm_up_seconds": round(seconds["warm_up"], 3),
            "seconds": round(seconds["draw"], 3),
        }


def _tell(report: dict[str, Any]) -> None:
    from .console import log, note

    paths = [picture["path"] for picture in report["pictures"]]
    names = paths[0] if len(paths) == 1 else f"{paths[0]} to {paths[-1]}"
    log(f"{names}: {len(paths)} picture(s) in {report['seconds']:.2f} s, loaded in {report['load_seconds']:.2f} s")
    others = [
        f"{name} {precision}" for name, precision in report["precisions"].items() if precision != report["precision"]
    ]
    log(f"{', '.join([report['precision'], *others])} on {report['backend']}")
    if (peak := report["vram"]["peak_bytes"]) is not None:
        whose = "" if report["vram"]["of"] == "process" else ", others' included"
        log(f"at most {peak / 2**30:.2f} GiB of the GPU's memory{whose}, residency {report['residency']}")
    for text in report["notes"]:
        note(text)
    if flagged := [picture["path"] for picture in report["pictures"] if picture.get("nsfw_content_detected")]:
        note(f"black, because the safety checker flagged them: {', '.join(flagged)}. --no-safety-checker shows them.")
