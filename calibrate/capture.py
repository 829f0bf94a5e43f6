"""What a network is given while pictures are drawn: its inputs, kept at some of the calls of every prompt.

The runtime's own loop draws, so samplers that evaluate several times a step, guidance and LoRAs are as they will be.
Which calls are kept is chosen anew for every prompt, evenly over all that the sampler made (Q-Diffusion, Li et al.
2023, arXiv 2302.04304): the first and the last always, because nothing else is like them.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from latentrt.export.recording import watched_pipeline
from latentrt.runtime.bundle import Bundle, pipeline_files
from latentrt.runtime.errors import ArtifactError, CalibrationError, UsageError
from latentrt.runtime.manifest import changed_inputs
from latentrt.runtime.model_facts import ModelFacts
from latentrt.runtime.pipeline import Pipeline
from latentrt.runtime.request import Request
from latentrt.runtime.specs import Array

from .calls import Call
from .capture_file import CAPTURE, VERSION, Capture, load_capture, save_capture
from .captured_prompt import CapturedPrompt, check_prompt, write_prompt
from .prompts import checked_prompt
from .source import PRECISION, TEXT_LENGTH, Source

DEFAULT_TIMESTEPS = 8
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_FLOAT = 4
# Headers and what is small beside latents and text.
_SLACK = 1.1


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """How the pictures are drawn; names and defaults are those of `Request`.

    Attributes:
        prompts: one picture each, with the seeds `seed`, `seed` + 1…
        timesteps: calls to keep of every prompt, two or more.
    """

    prompts: tuple[str, ...]
    timesteps: int = DEFAULT_TIMESTEPS
    negative_prompt: str | None = None
    steps: int = 20
    sampler: str | None = None
    schedule: str | None = None
    eta: float | None = None
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    clip_skip: int = 0
    width: int | None = None
    height: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what no request checks.

        Raises:
            UsageError: there is no prompt, one of them cannot be used, or fewer than two timesteps.
        """
        if not self.prompts:
            raise UsageError("prompts: expected at least one, got none.")
        for number, prompt in enumerate(self.prompts, 1):
            checked_prompt(prompt, f"prompt {number}")
        if not self.timesteps >= 2:
            raise UsageError(f"timesteps: expected 2 or more, the first and the last, got {self.timesteps}.")

    def request(self, index: int) -> Request:
        """What is drawn for a prompt.

        Raises:
            UsageError: a setting is out of its range.
        """
        settings = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        own = ("prompts", "timesteps", "seed")
        return Request(
            prompt=self.prompts[index],
            seed=self.seed + index,
            safety_checker=False,
            **{name: value for name, value in settings.items() if name not in own},
        )


def capture_inputs(source: Source, options: CaptureOptions, *, backend: str = "onnxruntime") -> dict[str, Any]:
    """What a capture depends on, for its key: the graphs and configs that draw, LoRAs and options."""
    bundle = _drawing(source)
    assert bundle.manifest is not None
    files = pipeline_files(bundle, PRECISION, bundle.components())
    return {
        "version": VERSION,
        "source": source.key(),
        "files": {name: bundle.manifest.files[name].sha256 for name in files},
        "options": {**dataclasses.asdict(options), "prompts": list(options.prompts)},
        "backend": backend,
    }


def capture(
    source: Source,
    options: CaptureOptions,
    folder: Path,
    *,
    backend: str = "onnxruntime",
    on_progress: Callable[[str, float], None] = lambda message, share: None,
) -> Capture:
    """Draw with a bundle's fp32 graphs and keep what the network is given.

    A capture that was interrupted goes on with the prompts that it lacks, and gives the same files; so does one with
    damaged files. One that was made from something else is replaced. Of several processes that capture into one
    folder, one draws and the others wait for it.

    Args:
        source: the network; its LoRAs are at work in all networks that they change.
        options: how to draw.
        folder: for the files, made if it is not there.
        backend: that draws, as in `Pipeline.load`.
        on_progress: called with a line after every prompt, and the share that is done.

    Raises:
        CalibrationError: a network's input or output is NaN or infinite (names tensor, timestep and prompt), or the
            U-Net does not draw from text alone.
        UsageError: a setting does not fit the bundle, it lacks a graph in fp32, or the disk is too small.
        ArtifactError: a file of the bundle is damaged, or the folder's list.
        BackendError: the backend failed.
        OSError: a file cannot be written.
    """
    inputs = capture_inputs(source, options, backend=backend)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        held = _held(folder, inputs)
        missing = [index for index in range(len(options.prompts)) if index not in held]
        if missing:
            watch = _Watch(source.component)
            loras = {active.lora.name: active.scale for active in source.loras}
            with watched_pipeline(_drawing(source), PRECISION, watch, backend=backend, loras=loras) as pipeline:
                _check_family(pipeline.model.facts)
                _check_disk(pipeline, options, missing, folder)
                for index in missing:
                    held[index] = write_prompt(folder, index, _drawn(pipeline, watch, source, options, index))
                    save_capture(_capture(folder, inputs, held))
                    on_progress(
                        f"captured prompt {index + 1} of {len(options.prompts)}", len(held) / len(options.prompts)
                    )
        return _capture(folder, inputs, held)


def stratified(count: int, wanted: int, generator: np.random.Generator) -> list[int]:
    """Positions out of 0 … count - 1, rising: the first, the last, and one at random of each of wanted - 2 equal parts.

    All of them where there are no more than are wanted.
    """
    if count <= wanted:
        return list(range(count))
    borders = np.linspace(1, count - 1, wanted - 1).astype(int)
    return [0, *(int(generator.integers(low, high)) for low, high in pairwise(borders)), count - 1]


class _Watch:
    """The inputs of one network's calls for one prompt, all of them finite."""

    def __init__(self, component: str) -> None:
        self._component = component
        self._prompt = ""
        self.feeds: list[Mapping[str, Array]] = []

    def start(self, prompt: str) -> None:
        """Forget the calls of the prompt before."""
        self._prompt, self.feeds = prompt, []

    def __call__(self, component: str, feeds: Mapping[str, Array], answer: Mapping[str, Array]) -> None:
        if component != self._component:
            return
        for name, values in (*feeds.items(), *answer.items()):
            if not np.isfinite(values).all():
                raise CalibrationError(
                    f"{component}: expected finite numbers, got NaN or infinity in {name} at timestep "
                    f"{_timestep(feeds):g} of {self._prompt}. Draw this prompt with latentrt generate in "
                    "fp32: the checkpoint or a LoRA is damaged, or its scale too large."
                )
        self.feeds.append(dict(feeds))


def _drawn(pipeline: Pipeline, watch: _Watch, source: Source, options: CaptureOptions, index: int) -> list[Call]:
    """The calls of a prompt that are kept."""
    watch.start(f"prompt {index + 1}, {options.prompts[index]!r}")
    request = options.request(index)
    pipeline(request.replace(decode=source.component == "vae_decoder"))
    guidance = pipeline.model.facts.default_guidance if request.guidance is None else request.guidance
    generator = np.random.default_rng([options.seed, index])
    calls = []
    for position in stratified(len(watch.feeds), options.timesteps, generator):
        feeds = watch.feeds[position]
        # One picture of one prompt: a second row is the negative prompt's.
        negatives = len(next(iter(feeds.values()))) - 1
        scale = guidance if negatives else 1.0
        calls.append(Call(feeds, prompt=index, timestep=_timestep(feeds), negatives=negatives, guidance=scale))
    return calls


def _timestep(feeds: Mapping[str, Array]) -> float:
    return float(feeds["timestep"].flat[0]) if "timestep" in feeds else 0.0


def _drawing(source: Source) -> Bundle:
    """The bundle with those graphs alone that draw: plain ones in fp32."""
    manifest = source.bundle.manifest
    assert manifest is not None
    names = {*_TEXT_ENCODERS, "unet", source.component}
    artifacts = tuple(
        a for a in manifest.artifacts if a.component in names and not a.target and a.precision == PRECISION
    )
    return Bundle(source.bundle.path, dataclasses.replace(manifest, artifacts=artifacts, engines=()))


def _held(folder: Path, inputs: Mapping[str, Any]) -> dict[int, CapturedPrompt]:
    """The prompts that a folder holds already; those of another capture are removed."""
    before = load_capture(folder)
    if before is None:
        return {}
    if not changed_inputs(before.inputs, inputs):
        whole = {}
        for file in before.files:
            with suppress(ArtifactError):
                check_prompt(folder, file)
                whole[file.prompt] = file
        return whole
    (folder / CAPTURE).unlink()
    for file in before.files:
        (folder / file.file).unlink(missing_ok=True)
    return {}


def _capture(folder: Path, inputs: Mapping[str, Any], held: Mapping[int, CapturedPrompt]) -> Capture:
    return Capture(folder, inputs, tuple(held[index] for index in sorted(held)))


def _check_family(facts: ModelFacts) -> None:
    if facts.is_inpainting or facts.is_editing:
        raise CalibrationError(
            f"unet: expected a U-Net that draws from text alone, got one that also takes a picture "
            f"({facts.unet_channels} channels). Such models cannot be calibrated: use them in fp16."
        )


def _check_disk(pipeline: Pipeline, options: CaptureOptions, missing: Iterable[int], folder: Path) -> None:
    facts, encoder = pipeline.model.facts, pipeline.model.prompt_encoder
    height, width = options.height or facts.default_size, options.width or facts.default_size
    latents = options.timesteps * facts.unet_channels * (height // facts.vae_factor) * (width // facts.vae_factor)
    text = pipeline.model.components["unet"].spec.input("encoder_hidden_states")
    assert text is not None
    chunk = 2 * TEXT_LENGTH * int(text.shape[-1])
    floats = sum(latents + chunk * encoder.chunk_count(options.prompts[index]) for index in missing)
    needed, free = int(_SLACK * _FLOAT * floats), shutil.disk_usage(folder).free
    if not needed <= free:
        raise UsageError(
            f"{folder}: expected {needed / 1e9:.1f} GB of free disk for the captured calls, got {free / 1e9:.1f} GB. "
            "Free some, or capture fewer prompts or timesteps."
        )
