"""What a benchmark measured, all samples included, and the file that keeps it.

The file is JSON of these dataclasses as they stand; times are seconds, sizes bytes. SCHEMA is raised whenever a reader
of an older file would go wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from latentrt.runtime.errors import ArtifactError
from latentrt.runtime.manifest import write_atomic

from .cases import Case

SCHEMA = 1
# In their order in a run. The rest of `end_to_end`, which no stage has, is `other` in reports.
STAGES = ("tokenize", "text_encoder", "unet", "sampler", "vae_decoder", "encode")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One timed run, from prompts to the bytes of PNG files in memory.

    Attributes:
        turn: its place among all runs of the benchmark, from 0: runs of different rows take turns.
        seconds: end to end.
        stages: by names of STAGES; those that a system does not tell apart are missing. `unet` is all its calls,
            `sampler` what passes between the first call and the end of the last step outside of them.
        calls: of the U-Net, each.
        gpu_calls: the same by CUDA events; None where there are none.
    """

    turn: int
    seconds: float
    stages: Mapping[str, float]
    calls: tuple[float, ...]
    gpu_calls: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """A fresh process, from its start to the first picture.

    Attributes:
        process: from the start of the interpreter to the end of the first picture.
        imports: of the system's modules.
        load: of the model.
        first: picture, from the call on.
        peak_rss: of the process by then.
    """

    process: float
    imports: float
    load: float
    first: float
    peak_rss: int


@dataclass(frozen=True, kw_only=True)
class Vram:
    """Memory on the GPU, in bytes; None for what is not known.

    Attributes:
        weights: of the networks.
        activation: scratch memory of engines.
        io: buffers of inputs and outputs.
        context: CUDA's own, with what the libraries load.
        peak: at the highest, of the process where NVML tells it, else of all that was taken meanwhile.
        peak_of: `process` or `gpu`.
        reason: why nothing is known.
    """

    weights: int | None = None
    activation: int | None = None
    io: int | None = None
    context: int | None = None
    peak: int | None = None
    peak_of: str | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of a row's process.

    Attributes:
        rss_loaded: resident, with the model loaded and before the first picture.
        peak_rss: resident, at the highest.
        vram: on the GPU.
    """

    rss_loaded: int
    peak_rss: int
    vram: Vram


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Of what a latentrt row loads; zeros for peers.

    Attributes:
        graphs: bytes of graphs and weights in the precision of the row.
        engines: bytes of engines.
        bundle: bytes of the whole bundle.
    """

    graphs: int
    engines: int
    bundle: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one call of a component takes, counted in its graph at the row's size and rows.

    Attributes:
        flops: operations; a multiplication and an addition are two.
        weight_bytes: read by a call, in the row's precision.
        activation_bytes: least that inputs and outputs of convolutions and products move, in the row's precision.
        calls: in a run.
    """

    flops: int
    weight_bytes: int
    activation_bytes: int
    calls: int


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What a device could do at most.

    Attributes:
        device: for people.
        flops: a second, in the precision of the row; None if it is not known.
        bandwidth: bytes a second; None if it is not known.
        source: where the figures are from: a published one, or `measured` with what.
    """

    device: str
    flops: float | None
    bandwidth: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Work by component (`text_encoder`, `unet`, `vae_decoder`…), and the peak it is held against."""

    work: Mapping[str, Work]
    peak: Peak


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a row's pictures cost against the fp32 reference, by picture where there are several.

    Attributes:
        prompts: that were drawn, with consecutive seeds.
        psnr: in dB, against fp32 pictures of the same settings and seeds.
        ssim: likewise; empty without SciPy.
        lpips: likewise; empty without weights.
        latent_l2: relative L2 distance of the latents after each step from fp32's, mean over the pictures.
        finest_psnr: in dB, against fp32 pictures of many steps, which is what all the settings cost; empty where the
            sampler draws other pictures by design (it adds noise).
        accuracy: share of the pictures that show their prompts; None without a judge.
    """

    prompts: int
    psnr: tuple[float, ...] = ()
    ssim: tuple[float, ...] = ()
    lpips: tuple[float, ...] = ()
    latent_l2: tuple[float, ...] = ()
    finest_psnr: tuple[float, ...] = ()
    accuracy: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A case and what was measured of it.

    Attributes:
        skipped: why it was not measured; None if it was.
        backend: what ran it, for people: `onnxruntime CPU`.
        on_gpu: whether that was a GPU.
        precisions: of each network, by component; of peers `{"all": …}`.
        notes: what is not as it was asked for, and why.
        warm_up: seconds of the runs before the timed ones, the first call first.
        runs: timed.
        settled: whether the interval of the median came within the bound before the time was up.
        pictures: files for the report, relative to the results' file, in the order of prompts.
    """

    case: Case
    skipped: str | None = None
    backend: str = ""
    on_gpu: bool = False
    precisions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warm_up: tuple[float, ...] = ()
    runs: tuple[Run, ...] = ()
    settled: bool = False
    cold: tuple[ColdStart, ...] = ()
    memory: Memory | None = None
    disk: Disk | None = None
    roofline: Roofline | None = None
    quality: Quality | None = None
    pictures: tuple[str, ...] = ()

    @property
    def seconds(self) -> tuple[float, ...]:
        """End to end, of each timed run."""
        return tuple(run.seconds for run in self.runs)


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """What measuring costs: what a timed run takes beyond an untimed one.

    Attributes:
        share: of the untimed run; below zero where noise is larger than the cost.
        interval: of the share at 95 %; None for fewer than 6 pairs.
        pairs: of runs; the share is the median of theirs.
        counted: the same share by what the clock was told of, at what telling it takes; exact where runs are too noisy
            to tell, and without what it may do to caches. None if it was not counted.
    """

    share: float
    interval: tuple[float, float] | None
    pairs: int
    counted: float | None = None

    @property
    def found(self) -> bool:
        """Whether there is a cost at all beyond what chance does: the interval is above 0."""
        return self.interval is not None and self.interval[0] > 0

    def __str__(self) -> str:
        """For people."""
        within = "no interval" if self.interval is None else f"{self.interval[0]:.2%} to {self.interval[1]:.2%}"
        counted = "" if self.counted is None else f"; by count {self.counted:.3%}"
        return f"{self.share:.2%} of a run ({within}, {self.pairs} pairs){counted}"


@dataclass(frozen=True, kw_only=True)
class Results:
    """A benchmark.

    Attributes:
        schema: of the file.
        command: that made it.
        date: when it began, ISO 8601 with its offset.
        latentrt: the version.
        model: name, family, sources, `random_weights`, and SHA-256 of the bundle's files by name.
        machine: hardware, clocks, driver, load.
        packages: versions, by distribution; of an environment of its own by `name (optimum)`.
        prompts: that were drawn in timed runs.
        seed: of the first picture of each run.
        confidence: bound on the half width of the median's 95 % interval, relative.
        interleaved: whether the systems were loaded at the same time and took turns run by run; otherwise they took
            turns by blocks, being loaded anew, because the memory was too small for all.
        stolen: share of the processors' time during the timed runs that the host of this virtual machine gave to
            others; None if it is not known.
        overhead: of the quickest row of latentrt; None if it was not measured.
        reference: what `Quality` compares with, for people.
        rows: in the order of the command's options; what could not be measured included.
    """

    schema: int = SCHEMA
    command: str
    date: str
    latentrt: str
    model: Mapping[str, Any]
    machine: Mapping[str, Any]
    packages: Mapping[str, str]
    prompts: tuple[str, ...]
    seed: int
    confidence: float
    interleaved: bool
    stolen: float | None = None
    overhead: Overhead | None = None
    reference: str = ""
    rows: tuple[Row, ...]

    @property
    def on_gpu(self) -> bool:
        """Whether any row ran on a GPU."""
        return any(row.on_gpu for row in self.rows)

    @property
    def random_weights(self) -> bool:
        """Whether the weights are random, so that pictures mean nothing."""
        return bool(self.model.get("random_weights"))


_ADAPTER: TypeAdapter[Results] = TypeAdapter(Results)


def save_results(path: Path, results: Results) -> None:
    """Write a results file.

    Raises:
        OSError: the disk is full or the folder not writable.
    """
    write_atomic(path, _ADAPTER.dump_json(results, indent=1) + b"\n")


def load_results(path: Path) -> Results:
    """Read a results file.

    Raises:
        ArtifactError: it is missing, no results file, or of another schema.
    """
    try:
        text = path.read_bytes()
    except OSError as err:
        raise ArtifactError(f"{path}: expected a results file of latentrt bench, got {err}.") from err
    try:
        found = json.loads(text)
        schema = found["schema"]
    except (ValueError, KeyError, TypeError) as err:
        raise ArtifactError(f"{path}: expected a results file of latentrt bench, got other content. Give one.") from err
    if schema != SCHEMA:
        raise ArtifactError(f"{path}: expected results of schema {SCHEMA}, got {schema}. Measure again.")
    try:
        return _ADAPTER.validate_python(found)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ArtifactError(f"{path}: expected {where} as schema {SCHEMA} has it, got: {first['msg']}.") from err


def to_json(results: Results) -> dict[str, Any]:
    """The results as the file has them."""
    return asdict(results)
