"""The sections of README.md that show what was measured, made from the files of benchmarks/results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from measured_sections import Kept, Section, percent, seconds, table
from project_bars import END_TO_END, FULL_SIZE, SAMPLERS, ratio_text, row_of

from latentrt.benchmarks.cases import OURS
from latentrt.benchmarks.peer_ratios import speed_up
from latentrt.benchmarks.report_cells import NOTHING, digits, ran_where
from latentrt.benchmarks.results_file import Results, Row

EXPORTS = ("export-cpu.json", "export-full-size-cpu.json")
INT8_CPU, INT8_SHAPES = "int8-cpu.json", "int8-shapes.json"
OPTIMUM = "optimum-cli"
ON_CPU = "on the CPU, not run on a GPU"
MODELS = {"shapes": "shapes", "sd1": "SD 1.5, random weights"}
MIB = 2**20
# Plans of int8-shapes.json by what they are called in the table.
INT8_ROWS = {
    "fp32": "fp32",
    "fp16": "fp16",
    "latentrt, psnr=32": "`latentrt calibrate`",
    "latentrt, sqnr=28": "`latentrt calibrate --budget sqnr=28`",
    "min-max, not smoothed": "largest values, no smoothing",
    "percentile, not smoothed": "percentile, no smoothing",
    "onnxruntime, min-max": "ONNX Runtime's `quantize_static`, as TensorRT takes it",
}


def name_of(row: Row) -> str:
    """Of a row, where nothing else differs."""
    return f"{row.case.subject.system} {row.case.subject.precision}"


def where(results: Results) -> str:
    """On what machine it ran, and on what device."""
    return f"{results.machine['cores']} cores of {results.machine['cpu']}. {ran_where(results)}"


def reference(results: Results) -> Row:
    """What the ratios of a table are to: latentrt in fp32.

    Raises:
        ValueError: it was not measured.
    """
    found = row_of(results, OURS)
    if found is None:
        raise ValueError("expected a measured row of latentrt in fp32, got none")
    return found


def skipped(*benchmarks: Results) -> str:
    """What could not be measured, and why, each in a paragraph."""
    rows = [row for results in benchmarks for row in results.rows if row.skipped]
    return "".join(
        dict.fromkeys(f"\n\n{name_of(row)} was not measured: {str(row.skipped).rstrip('.')}." for row in rows)
    )


def end_to_end(kept: Kept) -> str:
    """Medians of a picture, beside the peers, of both models."""
    small, large = kept.results(END_TO_END), kept.results(FULL_SIZE)
    columns = [{name_of(row): _times(found, row) for row in found.rows if row.runs} for found in (small, large)]
    names = dict.fromkeys(name for column in columns for name in column)
    nothing = (NOTHING, NOTHING)
    rows = [(name, *columns[0].get(name, nothing), *columns[1].get(name, nothing)) for name in names]
    drawn = [_drawn(found) for found in (small, large)]
    head = ("", "shapes", "ratio", "SD 1.5's width", "ratio")
    return (
        "From a prompt to PNG bytes, medians; the ratio is how many times as long it takes as latentrt in fp32, with "
        f"its 95 % interval. The shapes model: {drawn[0]}. {where(small)} Stable Diffusion 1.5's width: {drawn[1]}. "
        f"{ran_where(large)}\n\n{table(head, rows)}{skipped(small, large)}"
    )


def cold_start(kept: Kept) -> str:
    """Fresh processes, and the memory of each."""
    results = kept.results(END_TO_END)
    ours = _median(reference(results), "process")
    rows = []
    for row in (row for row in results.rows if row.cold):
        whole, loaded = _median(row, "process"), NOTHING
        if row.memory is not None:
            loaded = f"{row.memory.rss_loaded / MIB:,.0f} MiB"
        peak = statistics.median(start.peak_rss for start in row.cold) / MIB
        ratio = digits(whole / ours, 3)
        rows.append((name_of(row), seconds(whole), ratio, seconds(_median(row, "imports")), loaded, f"{peak:,.0f} MiB"))
    head = ("", "process to first picture", "ratio", "of it imports", "memory, model loaded", "at most")
    count = len(reference(results).cold)
    return (
        f"Medians of {count} fresh processes each, the shapes model: {_drawn(results)}. {where(results)} "
        f"Memory at most is that of these processes.\n\n{table(head, rows)}"
    )


def exported(kept: Kept) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """What `bench_export.py` measured: checkpoint -> way -> figures."""
    return {name: ways for file in EXPORTS for name, ways in kept.report(file)["exports"].items()}


def exports(kept: Kept) -> str:
    """What an export takes and leaves, beside optimum-cli."""
    rows = []
    for checkpoint, ways in exported(kept).items():
        for way, found in ways.items():
            name = f"{MODELS[checkpoint]}: {way}"
            if "failed" in found:
                rows.append((name, "failed", *[NOTHING] * 4))
                continue
            size = f"{found['bytes'] / 1e6:,.1f} MB"
            figures = (f"{found['seconds']:.0f} s", f"{found['peak_mib']:,} MiB", str(found["files"]), size)
            rows.append((name, *figures, f"{found['nodes']:,}"))
    head = ("", "time", "memory at most", "files", "graphs and weights", "nodes")
    return (
        f"Whole commands in fp32, {ON_CPU}. latentrt compares every graph with PyTorch in that time; an architecture "
        f"is known once a checkpoint of it was exported.\n\n{table(head, rows)}"
    )


def samplers(kept: Kept) -> str:
    """The range of a sampler's speed-ups, and the two that are used most."""
    report = kept.report(SAMPLERS)
    ratios = {row["sampler"]: row["ratio"] for row in report["rows"]}
    shape = "x".join(map(str, report["shape"]))
    return (
        "A sampler's own arithmetic, for what the accelerator waits between two calls of the U-Net, is "
        f"{digits(min(ratios.values()), 2)} to {digits(max(ratios.values()), 2)} times faster than that of diffusers' "
        f"scheduler of the same name, for latents of {shape}: DPM++ 2M {digits(ratios['DPM++ 2M'], 2)}, "
        f"UniPC {digits(ratios['UniPC'], 2)} ({ON_CPU})."
    )


def int8_on_cpu(kept: Kept) -> str:
    """Share of fp32's time that a call in int8 takes."""
    networks = kept.report(INT8_CPU)["networks"]
    shares = ", ".join(
        f"{digits(found['graphs']['int8 on cpu']['of_fp32'], 2)} {_network(name)}" for name, found in networks.items()
    )
    return (
        "ONNX Runtime has int8 kernels for matrix products and none for convolutions with float outputs. A call of the "
        f"U-Net, laid out by `latentrt optimize`, takes of fp32's time: {shares} (CPU time on one "
        "thread; not run on a GPU)."
    )


def int8_quality(kept: Kept) -> str:
    """What plans cost on the shapes model."""
    found = kept.report(INT8_SHAPES)["table"]
    rows = [(title, *_int8_cells(found[name])) for name, title in INT8_ROWS.items()]
    prompts = {row["prompts"] for row in found.values()}
    head = ("", "MACs in int8", "PSNR", "SQNR", "right pictures")
    return (
        f"The shapes model's U-Net, {' or '.join(map(str, sorted(prompts)))} held-out prompts, against fp32 pictures "
        f"of the same seeds (ONNX Runtime {ON_CPU}). SQNR is that of the guided prediction, mean over the "
        "timesteps.\n\n"
        f"{table(head, rows)}"
    )


README_SECTIONS = (
    Section(
        title="End to end",
        files=(END_TO_END, FULL_SIZE),
        command="make bench ONLY=end-to-end,full-size",
        write=end_to_end,
    ),
    Section(title="Cold start and memory", files=(END_TO_END,), command="make bench ONLY=end-to-end", write=cold_start),
    Section(
        title="Export against optimum-cli",
        files=EXPORTS,
        command="make bench ONLY=export,export-full-size",
        write=exports,
    ),
    Section(title="Samplers", files=(SAMPLERS,), command="make bench ONLY=samplers", write=samplers),
    Section(title="Int8 on a CPU", files=(INT8_CPU,), command="make bench ONLY=int8", write=int8_on_cpu),
    Section(title="Quality of int8", files=(INT8_SHAPES,), command="make bench-int8", write=int8_quality),
)


def _times(results: Results, row: Row) -> tuple[str, str]:
    base = reference(results)
    return seconds(statistics.median(row.seconds)), "1" if row is base else ratio_text(speed_up(results, base, row))


def _drawn(results: Results) -> str:
    case = reference(results).case
    return f"{case.subject.width}x{case.subject.height}, {case.settings.label}"


def _median(row: Row, part: str) -> float:
    return statistics.median(float(getattr(start, part)) for start in row.cold)


def _network(name: str) -> str:
    return "on the shapes model" if name.endswith(".bundle") else "at SD 1.5's width"


def _int8_cells(row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    share = percent(row["macs_int8"]) if "macs_int8" in row else ""
    psnr = f"{row['psnr']['mean']:.1f} dB" if "psnr" in row else ""
    noise = f"{row['sqnr_guided']['mean_db']:.1f} dB" if "sqnr_guided" in row else ""
    return share, psnr, noise, percent(row["accuracy"])
