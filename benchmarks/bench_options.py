"""What a benchmark is to measure: the options of `latentrt bench`, and the cases that they make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from latentrt.runtime.backends import BACKENDS, provider_of
from latentrt.runtime.bundle import Bundle
from latentrt.runtime.errors import UsageError
from latentrt.runtime.model_facts import read_facts, read_schedules
from latentrt.runtime.sampler_names import resolve_sampler, resolve_schedule

from .cases import OURS, PEERS, Case, Settings, Subject, System

Interval = tuple[float, float]
_WHOLE: Interval = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is to be measured; every combination is a row.

    Attributes:
        sizes: (width, height) in pixels; none for what the checkpoint was trained at.
        samplers: names in any spelling; none for the checkpoint's own.
        guidance: scale, and the shares of the steps between which it acts; none for the family's own.
        precisions: none for all that the bundle holds.
        against: systems to compare with.
        checkpoint: of the peers; None for the one that the bundle was exported from, if it is still there.
        optimum_python: interpreter of an environment with optimum-onnx.
        optimum_model: folder that `optimum-cli export onnx` wrote; None for the bundle.
        prompts: everyday, shapes, or a file with a prompt a line.
        warm_up: runs before the timed ones.
        min_runs: timed, of each row, at least.
        max_runs: at most.
        confidence: half width of the median's 95 % interval, relative, at which a row is settled.
        seconds: a row's timed runs may take.
        cold: fresh processes of each system.
        quality: prompts to draw for the price of the speed; 0 for none.
        judge: `FILE.py:function` for prompt accuracy.
        lpips: weights of LPIPS.
        threads: of the processor for each system; 0 for all.
        isolate: whether systems are loaded one at a time; None where the memory is too small for all.
        loras: of the bundle, by name, with scales or None for each one's own.
        residency: as `Pipeline.load` has it.
    """

    bundle: Path
    sizes: tuple[tuple[int, int], ...] = ()
    batches: tuple[int, ...] = (1,)
    steps: tuple[int, ...] = (20,)
    samplers: tuple[str, ...] = ()
    schedule: str | None = None
    guidance: tuple[tuple[float, Interval], ...] = ()
    precisions: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("auto",)
    against: tuple[str, ...] = ()
    checkpoint: Path | None = None
    optimum_python: Path | None = None
    optimum_model: Path | None = None
    prompts: str = "everyday"
    seed: int = 0
    warm_up: int = 2
    min_runs: int = 7
    max_runs: int = 40
    confidence: float = 0.02
    seconds: float = 60.0
    cold: int = 3
    quality: int = 8
    judge: str | None = None
    lpips: Path | None = None
    threads: int = 0
    isolate: bool | None = None
    loras: dict[str, float | None] = field(default_factory=dict)
    residency: str = "all"

    def __post_init__(self) -> None:
        """Check what needs no bundle.

        Raises:
            UsageError: a number is out of its range, or a name is not known.
        """
        for name, least in (("warm_up", 1), ("min_runs", 1), ("max_runs", self.min_runs), ("cold", 0), ("quality", 0)):
            _at_least(name, getattr(self, name), least)
        _at_least("threads", self.threads, 0)
        _at_least("seed", self.seed, 0)
        for name, values in (("batch", self.batches), ("steps", self.steps), ("size", sum(self.sizes, ()))):
            for value in values:
                _at_least(name, value, 1)
        if not 0 < self.confidence < 1:
            raise UsageError(f"confidence: expected a share between 0 and 1, such as 0.02, got {self.confidence:g}.")
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise UsageError(f"seconds: expected more than 0, got {self.seconds:g}.")
        _known("against", self.against, PEERS)
        _known("backend", self.backends, BACKENDS)


def read_integers(name: str, text: str) -> tuple[int, ...]:
    """Whole numbers divided by commas, each once.

    Raises:
        UsageError: one of them is none, or there is none at all.
    """
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as err:
        raise UsageError(f"{name}: expected whole numbers divided by commas, such as 1,4, got {text!r}.") from err
    return numbers


def read_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """`512` or `512x768` (width x height), several divided by commas, as (width, height) each.

    Raises:
        UsageError: a part is no size.
    """
    try:
        return tuple(dict.fromkeys(_size(part) for part in text.split(",")))
    except ValueError as err:
        raise UsageError(f"size: expected sizes such as 512 or 512x768, got {text!r}.") from err


def read_guidance(text: str) -> tuple[tuple[float, Interval], ...]:
    """`5`, or `5:0.2-0.8` for guidance between shares of the steps, several divided by commas.

    Raises:
        UsageError: a part is none of these.
    """
    try:
        return tuple(dict.fromkeys(_guidance(part) for part in text.split(",")))
    except ValueError as err:
        raise UsageError(f"guidance: expected SCALE or SCALE:START-END, such as 5:0.2-0.8, got {text!r}.") from err


def read_names(text: str | None) -> tuple[str, ...]:
    """Names divided by commas, each once; none for None."""
    return tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))


def cases_of(options: BenchOptions, bundle: Bundle) -> tuple[Case, ...]:
    """The rows of a benchmark: those of latentrt by size and batch, and after them those of the peers.

    Peers draw in fp16 on a GPU and in fp32 on a CPU, which is what their users take there.

    Raises:
        UsageError: there is no such sampler or schedule, or a size does not fit the model.
        ConfigError: a config of the bundle holds what is not supported.
    """
    facts = read_facts(bundle)
    side = facts.default_size
    sizes = options.sizes or ((side, side),)
    for number in {number for size in sizes for number in size}:
        if number % facts.vae_factor:
            raise UsageError(f"size: expected multiples of {facts.vae_factor}, got {number}.")
    settings = tuple(_settings(options, bundle, facts.default_guidance))
    precisions = options.precisions or tuple(bundle.precisions())
    device = "cuda" if any(_on_gpu(backend) for backend in options.backends) else "cpu"
    rivals = [(cast(System, name), "fp16" if device == "cuda" else "fp32", device) for name in options.against]
    own = [(OURS, precision, backend) for precision in precisions for backend in options.backends]
    return tuple(
        Case(
            subject=Subject(
                system=system, precision=precision, backend=backend, width=width, height=height, batch=batch
            ),
            settings=each,
        )
        for (width, height), batch in itertools.product(sizes, options.batches)
        for each in settings
        for system, precision, backend in (*own, *rivals)
    )


def _settings(options: BenchOptions, bundle: Bundle, default_guidance: float) -> Iterable[Settings]:
    schedule = resolve_schedule(options.schedule)
    named = [resolve_sampler(name) for name in options.samplers]
    # The checkpoint's own goes by its class: by another name it would take that name's options, not the config's.
    own = str(read_schedules(bundle).own.class_name)
    samplers = [(spec.label, schedule or spec.schedule) for spec in named] or [(own, schedule)]
    scales = options.guidance or ((default_guidance, _WHOLE),)
    for (sampler, spacing), steps, (scale, within) in itertools.product(samplers, options.steps, scales):
        yield Settings(
            sampler=sampler,
            schedule=spacing,
            steps=steps,
            guidance=scale,
            guidance_interval=within,
        )


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height or width)


def _guidance(text: str) -> tuple[float, Interval]:
    scale, sign, within = text.partition(":")
    start, end = (float(share) for share in within.split("-")) if sign else _WHOLE
    if not (0 <= start < end <= 1 and math.isfinite(float(scale))):
        raise ValueError("out of range")
    return float(scale), (start, end)


def _on_gpu(backend: str) -> bool:
    return backend.startswith("tensorrt") or provider_of(backend) == "cuda"


def _at_least(name: str, value: int, least: int) -> None:
    if not value >= least:
        raise UsageError(f"{name.replace('_', '-')}: expected {least} or more, got {value}.")


def _known(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    for each in given:
        if each not in known:
            raise UsageError(f"{name}: expected some of {', '.join(known)}, got {each!r}.")
