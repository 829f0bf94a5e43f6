"""`latentrt doctor`: which backends this machine can use, and why not the others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from .doctor import Report, examine


def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="Also judge the graphs and engines of this bundle.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Say what this machine can run and why not the rest; exit code 0 if it can generate pictures.

    Examples:
      latentrt doctor

      latentrt doctor shapes.bundle --json
    """
    report = examine(bundle)
    if as_json:
        print(json.dumps({**dataclasses.asdict(report), "can_generate": report.can_generate}))
    else:
        _print(report)
    return 0 if report.can_generate else 1


def _print(report: Report) -> None:
    from .console import log

    facts, machine = report.facts, report.machine
    log(f"latentrt {facts['latentrt']}, python {facts['python']}, numpy {facts['numpy']}, {facts['platform']}")
    log(f"{facts['cores']} cores ({', '.join(facts['cpu_features']) or 'no features stated'})")
    log(f"memory: {_gigabytes(facts['memory_free_bytes'])} free of {_gigabytes(facts['memory_total_bytes'])}")
    log(
        f"disk: {_gigabytes(facts['disk_free_bytes'])} free here, {_gigabytes(facts['temp_free_bytes'])} free in the "
        "temporary folder"
    )
    if machine.driver or machine.cuda:
        cuda = "unknown" if machine.cuda is None else f"{machine.cuda[0]}.{machine.cuda[1]}"
        log(f"NVIDIA driver {machine.driver or 'of unknown version'}, CUDA up to {cuda}")
    for gpu in machine.gpus:
        log(f"GPU: {gpu.name}, {gpu.sm}, {_gigabytes(gpu.memory_bytes)}")
    if not machine.gpus:
        log(f"GPU: none: {machine.why_no_gpu}")
    for backend in report.backends:
        version = f" {backend.version}" if backend.version else ""
        log(f"{backend.name}{version}: {'usable' if backend.usable else 'not usable'}: {backend.detail}")
        if backend.remedy:
            log(f"    {backend.remedy}")
    for extra in report.extras:
        if extra.missing:
            log(f"extra {extra.name}: missing {', '.join(extra.missing)}. Run: {extra.command}")
    for graph in report.graphs:
        log(f"graph {graph.path} ({graph.precision}): {graph.reason}")
    for engine in report.engines:
        log(f"engine {engine.path} ({engine.precision}, {'+'.join(engine.targets)}): {engine.reason or 'usable here'}")
    for problem in report.problems:
        log(f"problem: {problem}")
    log("This machine can generate pictures." if report.can_generate else "No backend here can generate pictures yet.")


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"
