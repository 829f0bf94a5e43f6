"""The tables that are too long for README.md: those of benchmarks/results/README.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from measured_sections import Kept, Section, seconds, table
from measured_tables import EXPORTS, INT8_CPU, MODELS, ON_CPU, OPTIMUM, exported, where
from project_bars import SAMPLERS, ratio_text

from latentrt.benchmarks.cases import OURS, Case
from latentrt.benchmarks.peer_ratios import base_row, speed_up
from latentrt.benchmarks.report_cells import NOTHING, digits
from latentrt.benchmarks.results_file import Results, Row

GROWTH = {"batch": "growth-batch-cpu.json", "size": "growth-size-cpu.json", "steps": "growth-steps-cpu.json"}


def growth(kept: Kept) -> str:
    """By batch, size and steps: medians, how they grow, and beside diffusers."""
    found = {varied: kept.results(name) for varied, name in GROWTH.items()}
    rows = [cells for varied, results in found.items() for cells in _grown(varied, results)]
    head = ("", "latentrt", "of the first", "diffusers", "of the first", "ratio")
    return (
        "Medians of a run that draws the whole batch, and as multiples of the first of their kind; the ratio is "
        f"diffusers' time to latentrt's, with its 95 % interval. {where(found['batch'])}\n\n{table(head, rows)}"
    )


def samplers(kept: Kept) -> str:
    """Host time of a step, each sampler."""
    report = kept.report(SAMPLERS)
    sides = ("latentrt", "diffusers")
    rows = [
        (
            *(row["sampler"], row["scheduler"], *(f"{row[f'{side}_us']:,.1f} µs" for side in sides)),
            *(digits(row["ratio"], 3), digits(row["bar"], 2)),
        )
        for row in report["rows"]
    ]
    shape = "x".join(map(str, report["shape"]))
    head = ("", "diffusers' class", "latentrt", "diffusers", "ratio", "wanted")
    return f"Host time of a step, latents of {shape}, {ON_CPU}.\n\n{table(head, rows)}"


def int8_on_cpu(kept: Kept) -> str:
    """Time of a call in int8 by how the graph is laid out."""
    rows = [
        (f"{network}: {graph}", seconds(figures["cpu_seconds"]), digits(figures["of_fp32"], 3))
        for network, found in kept.report(INT8_CPU)["networks"].items()
        for graph, figures in found["graphs"].items()
    ]
    return f"CPU time of a call of the U-Net on one thread; not run on a GPU.\n\n{table(('', 'time', 'of fp32'), rows)}"


def components(kept: Kept) -> str:
    """Nodes and bytes of each graph, beside optimum-cli's."""
    rows = []
    for checkpoint, ways in exported(kept).items():
        theirs = ways.get(OPTIMUM, {}).get("components", {})
        for component, mine in ways[OURS]["components"].items():
            graphs = (mine, theirs.get(component))
            cells = [cell for write in (_nodes, _size) for cell in map(write, graphs)]
            rows.append((f"{MODELS[checkpoint]}: {component}", *cells))
    head = ("", "nodes", "optimum-cli's", "graph and weights", "optimum-cli's")
    return f"Graphs by component, fp32, {ON_CPU}.\n\n{table(head, rows)}"


DETAIL_SECTIONS = (
    Section(title="Growth", files=tuple(GROWTH.values()), command="make bench ONLY=growth", write=growth),
    Section(title="Samplers", files=(SAMPLERS,), command="make bench ONLY=samplers", write=samplers),
    Section(title="Int8 on a CPU", files=(INT8_CPU,), command="make bench ONLY=int8", write=int8_on_cpu),
    Section(title="Graphs", files=EXPORTS, command="make bench ONLY=export,export-full-size", write=components),
)


def _grown(varied: str, results: Results) -> list[tuple[str, ...]]:
    pairs = [(row, base_row(results, row, "diffusers")) for row in results.rows if _ours(row)]
    firsts = [None if row is None else statistics.median(row.seconds) for row in pairs[0]]
    lines = []
    for ours, peer in pairs:
        ratio = NOTHING if peer is None else ratio_text(speed_up(results, ours, peer))
        cells = [cell for row, first in zip((ours, peer), firsts, strict=True) for cell in _growing(row, first)]
        lines.append((_varied(varied, ours.case), *cells, ratio))
    return lines


def _ours(row: Row) -> bool:
    return bool(row.runs) and row.case.subject.system == OURS


def _growing(row: Row | None, first: float | None) -> tuple[str, str]:
    if row is None or first is None:
        return NOTHING, NOTHING
    median = statistics.median(row.seconds)
    return seconds(median), digits(median / first, 3)


def _varied(varied: str, case: Case) -> str:
    return {
        "batch": f"batch {case.subject.batch}",
        "size": f"{case.subject.width}x{case.subject.height}",
        "steps": f"{case.settings.steps} steps",
    }[varied]


def _nodes(graph: Mapping[str, Any] | None) -> str:
    return NOTHING if graph is None else f"{graph['nodes']:,}"


def _size(graph: Mapping[str, Any] | None) -> str:
    return NOTHING if graph is None else f"{graph['bytes'] / 1e6:,.2f} MB"
