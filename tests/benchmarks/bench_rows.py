"""Results of a benchmark that nobody ran: seeded numbers of two systems, three precisions and two batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from latentrt.benchmarks.cases import Case, Settings, Subject, System
from latentrt.benchmarks.quality_pictures import reference_name
from latentrt.benchmarks.results_file import (
    ColdStart,
    Disk,
    Memory,
    Overhead,
    Peak,
    Quality,
    Results,
    Roofline,
    Row,
    Run,
    Vram,
    Work,
)
from latentrt.runtime.image import Pictures, save_png

STEPS = 20
SIDE = 64
PROMPTS = ("a red circle", 'a <script>alert("blue")</script> & square')
SETTINGS = Settings(sampler="DPM++ 2M", schedule="karras", steps=STEPS, guidance=5.0)
# Seconds of a U-Net call at one picture, and levels that pictures are off the fp32 ones.
CALLS = {"fp32": 0.020, "fp16": 0.016, "int8": 0.011}
OFF = {"fp32": 0, "fp16": 1, "int8": 4}
_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
_GB = 10**9


def bench_results(*, runs: int = 40, on_gpu: bool = False, random_weights: bool = False) -> Results:
    """Twelve rows, two of them skipped; the same at every call.

    Args:
        runs: timed, of each row.
        on_gpu: the rows ran on one, with events' times and video memory.
        random_weights: no row has quality or pictures.
    """
    rng = np.random.default_rng(7)
    systems: tuple[System, ...] = ("latentrt", "diffusers")
    cases = [_case(system, precision, batch) for system in systems for precision in CALLS for batch in (1, 4)]
    rows = [_row(case, place, runs, on_gpu, random_weights, rng) for place, case in enumerate(cases)]
    return Results(
        command="latentrt bench shapes.bundle --batch 1,4 --precision fp32,fp16,int8 --against diffusers",
        date="2026-11-23T15:00:00+00:00",
        latentrt="0.1.0",
        model={
            "name": "shapes",
            "family": "sd1",
            "random_weights": random_weights,
            "files": {"unet/model.onnx": "ab" * 32, "vae_decoder/model.onnx": "cd" * 32},
        },
        machine={"cpu": "Example CPU 9000", "cores": 2, "gpu": "Example GPU" if on_gpu else "none"},
        packages={"numpy": "2.4.6", "onnxruntime": "1.32.0", "torch": "2.13.0"},
        prompts=PROMPTS,
        seed=100,
        confidence=0.02,
        interleaved=True,
        overhead=Overhead(share=0.0004, interval=(-0.001, 0.0018), pairs=40),
        reference="latentrt fp32 pictures of the same settings and seeds",
        rows=tuple(rows),
    )


def bench_row(results: Results, system: System, precision: str, batch: int) -> Row:
    """The row of a case."""
    return next(row for row in results.rows if row.case == _case(system, precision, batch))


def with_row(results: Results, row: Row) -> Results:
    """The results with a row in the place of that of its case."""
    return replace(results, rows=tuple(row if each.case == row.case else each for each in results.rows))


def write_pictures(folder: Path, results: Results) -> None:
    """The pictures that the rows name, off those of their reference by the levels of OFF."""
    for row in results.rows:
        for index, name in enumerate(row.pictures):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(path, drawn_picture(index, row.case.subject.precision))
            save_png(folder / reference_name(name), drawn_picture(index, "fp32"))


def drawn_picture(index: int, precision: str) -> Pictures:
    """Noise (SIDE, SIDE, 3) of a prompt's seed."""
    pixels = np.random.default_rng(index).integers(40, 200, (SIDE, SIDE, 3)) + OFF[precision]
    return pixels.astype(np.uint8)


def _case(system: System, precision: str, batch: int) -> Case:
    backend = "onnxruntime" if system == "latentrt" else "cpu"
    subject = Subject(system=system, precision=precision, backend=backend, width=SIDE, height=SIDE, batch=batch)
    return Case(subject=subject, settings=SETTINGS)


def _row(case: Case, place: int, runs: int, on_gpu: bool, random_weights: bool, rng: np.random.Generator) -> Row:
    subject = case.subject
    ours = subject.system == "latentrt"
    if not ours and subject.precision == "int8":
        return Row(case=case, skipped="diffusers: expected fp32 or fp16, got int8. It has no int8 networks.")
    slower = (1.0 if ours else 1.5) * subject.batch**0.9
    call = CALLS[subject.precision] * slower
    timed = tuple(_run(12 * turn + place, call, slower, on_gpu, rng) for turn in range(runs))
    pictures = tuple(
        f"pictures/{place:03}-{subject.system}-{subject.precision}/{index:05}.png"
        for index in range(0 if random_weights else len(PROMPTS))
    )
    device = "Example GPU" if on_gpu else "CPU"
    return Row(
        case=case,
        backend=f"{'onnxruntime' if ours else 'torch'} {device}",
        on_gpu=on_gpu,
        precisions={"text_encoder": subject.precision, "unet": subject.precision} if ours else {"all": "fp32"},
        notes=() if subject.precision != "int8" else ("vae_decoder: fp16, there is no int8 one",),
        warm_up=(3 * STEPS * call, 1.05 * STEPS * call),
        runs=timed,
        settled=subject.batch == 1,
        cold=_cold(STEPS * call, ours, rng),
        memory=_memory(subject.precision, ours, on_gpu),
        disk=Disk(graphs=10**7 * _BYTES[subject.precision], engines=0, bundle=9 * 10**7 if ours else 0),
        roofline=_roofline(subject, device),
        quality=None if random_weights else _quality(subject.precision, rng),
        pictures=pictures,
    )


def _run(turn: int, call: float, slower: float, on_gpu: bool, rng: np.random.Generator) -> Run:
    calls = call * (1 + rng.gamma(2.0, 0.01, STEPS))
    stages = {
        "tokenize": 0.0004,
        "text_encoder": 0.006 * slower,
        "unet": float(calls.sum()),
        "sampler": 0.0002 * STEPS,
        "vae_decoder": 0.03 * slower,
        "encode": 0.002 * slower,
    }
    stages = {name: seconds * float(1 + rng.gamma(2.0, 0.01)) for name, seconds in stages.items()}
    return Run(
        turn=turn,
        seconds=sum(stages.values()) * 1.003,
        stages=stages,
        calls=tuple(calls.tolist()),
        gpu_calls=tuple((0.9 * calls).tolist()) if on_gpu else None,
    )


def _cold(first: float, ours: bool, rng: np.random.Generator) -> tuple[ColdStart, ...]:
    imports, load = (0.2, 0.6) if ours else (7.0, 3.0)
    starts = []
    for factor in 1 + 0.05 * rng.random(3):
        times = {"imports": imports * factor, "load": load * factor, "first": 1.5 * first * factor}
        starts.append(ColdStart(process=0.1 + sum(times.values()), peak_rss=int(_GB * factor), **times))
    return tuple(starts)


def _memory(precision: str, ours: bool, on_gpu: bool) -> Memory:
    weights = 10**8 * _BYTES[precision]
    vram = Vram(reason="not run on a GPU")
    if on_gpu and ours:
        context = 4 * 10**8
        vram = Vram(weights=weights, activation=2 * 10**8, io=10**7, context=context, peak=_GB, peak_of="process")
    elif on_gpu:
        vram = Vram(peak=2 * _GB, peak_of="process")
    loaded = (2 if ours else 9) * 10**8 + weights
    return Memory(rss_loaded=loaded, peak_rss=loaded + 3 * 10**8, vram=vram)


def _roofline(subject: Subject, device: str) -> Roofline:
    nbytes = _BYTES[subject.precision]
    rows = subject.batch
    return Roofline(
        work={
            "text_encoder": Work(
                flops=2 * 10**8, weight_bytes=10**6 * nbytes, activation_bytes=10**5 * nbytes, calls=1
            ),
            "unet": Work(
                flops=2 * 10**9 * rows,
                weight_bytes=8 * 10**6 * nbytes,
                activation_bytes=5 * 10**6 * nbytes * rows,
                calls=STEPS,
            ),
            "vae_decoder": Work(
                flops=3 * 10**9, weight_bytes=10**6 * nbytes, activation_bytes=2 * 10**7 * nbytes, calls=rows
            ),
        },
        peak=Peak(device=device, flops=2e11 * 4 / nbytes, bandwidth=2e10, source="measured: GEMM, copy"),
    )


def _quality(precision: str, rng: np.random.Generator) -> Quality:
    mean = {"fp32": 99.0, "fp16": 58.0, "int8": 33.0}[precision]
    psnr = tuple((mean + rng.normal(0, 0.5, 8)).tolist())
    return Quality(
        prompts=8,
        psnr=psnr,
        ssim=tuple(1 - 10 ** (-value / 12) for value in psnr),
        latent_l2=tuple((rng.uniform(0.5, 2) * 10 ** (-mean / 20) * np.linspace(0.2, 1.0, STEPS)).tolist()),
        finest_psnr=tuple((min(mean, 36.0) - 3 + rng.normal(0, 0.5, 8)).tolist()),
        accuracy=0.96 if precision == "int8" else 0.98,
    )
