"""Export of whole checkpoints: `latentrt export` beside `optimum-cli export onnx`, each in a process of its own.

    python benchmarks/scripts/bench_export.py shapes=examples/shapes sd1=random --json build/export.json

`sd1=random` is Stable Diffusion 1.5 at its published size with random weights. latentrt exports twice: first with an
empty cache, then into another folder with the cache that the first left, as for every further checkpoint of an
architecture. It compares its graphs with PyTorch each time, in the seconds that are stated; optimum-cli does not for
pipelines. Seconds and peak memory are those of the command. What the first export and optimum wrote is kept under
--work, for `latentrt bench` to draw with: NAME/checkpoint, NAME/bundle, NAME/optimum.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from full_size import FAMILIES, write_checkpoint
from graph_size import sizes
from optimum_env import Ran, ensure_venv, export_with_latentrt, export_with_optimum, use_older_names, versions_in

from latentrt.benchmarks.machine_facts import machine_facts

COLD, KNOWN, OPTIMUM = "latentrt", "latentrt, architecture known", "optimum-cli"
RANDOM = "random"


def prepare(name: str, source: str, folder: Path) -> Path:
    """A checkpoint that optimum reads, too: a copy of `source`, or one of published size, by the family's name.

    One that is there already is kept where it was made from random weights: they are the same each time.
    """
    if source == RANDOM:
        return folder if (folder / "model_index.json").exists() else use_older_names(write_checkpoint(name, folder))
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    return use_older_names(folder)


def figures_of(folder: Path, ran: Ran) -> dict[str, Any]:
    """What a finished export took and left."""
    components = sizes(folder)
    totals = {unit: sum(each[unit] for each in components.values()) for unit in ("nodes", "bytes", "files")}
    return {"seconds": round(ran.seconds, 1), "peak_mib": round(ran.peak_mib), **totals, "components": components}


def measure(checkpoint: Path, work: Path, python: Path | None, precision: str) -> dict[str, dict[str, Any]]:
    """Export a checkpoint each way: way -> its figures.

    Args:
        work: keeps `bundle` and `optimum`.
        python: of optimum's environment; None leaves optimum out.
        precision: of latentrt's graphs; optimum-cli writes fp32.
    """
    bundle, again, optimum, cache = (work / name for name in ("bundle", "again", "optimum", "cache"))
    for folder in (bundle, again, optimum, cache):
        shutil.rmtree(folder, ignore_errors=True)
    environment = {"LATENTRT_CACHE": str(cache)}
    found = {COLD: figures_of(bundle, export_with_latentrt(checkpoint, bundle, precision, environment))}
    found[KNOWN] = figures_of(again, export_with_latentrt(checkpoint, again, precision, environment))
    for folder in (again, cache):
        shutil.rmtree(folder)
    if python is not None:
        try:
            found[OPTIMUM] = figures_of(optimum, export_with_optimum(python, checkpoint, optimum))
        except RuntimeError as err:
            found[OPTIMUM] = {"failed": str(err).strip().splitlines()[-1]}
    return found


def show(name: str, ways: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a checkpoint's rows."""
    for way, found in ways.items():
        if "failed" in found:
            print(f"{name:10}{way:32}{found['failed']}", flush=True)
            continue
        cells = f"{found['seconds']:8.1f} s{found['peak_mib']:8} MiB{found['bytes'] / 1e6:11.1f} MB"
        print(f"{name:10}{way:32}{cells}{found['files']:5} files{found['nodes']:7} nodes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoints", nargs="+", metavar="NAME=FOLDER", help=f"or NAME={RANDOM}, NAME one of {', '.join(FAMILIES)}"
    )
    parser.add_argument("--work", type=Path, default=Path("build/bench/models"), help="keeps what was exported")
    parser.add_argument("--precision", default="fp32", help="of latentrt's graphs")
    parser.add_argument("--venv", type=Path, default=Path("build/optimum-venv"), help="made if it is not there")
    parser.add_argument("--no-optimum", action="store_true", help="latentrt alone")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    given = dict(checkpoint.split("=", 1) for checkpoint in options.checkpoints if "=" in checkpoint)
    if len(given) != len(options.checkpoints):
        parser.error(f"checkpoints: expected NAME=FOLDER, each name once, got {' '.join(options.checkpoints)}")
    if unknown := [name for name, source in given.items() if source == RANDOM and name not in FAMILIES]:
        parser.error(f"checkpoints: expected the name of a family for random weights, got {', '.join(unknown)}")
    python = None if options.no_optimum else ensure_venv(options.venv.resolve())
    exports = {}
    for name, source in given.items():
        work = options.work.resolve() / name
        exports[name] = measure(prepare(name, source, work / "checkpoint"), work, python, options.precision)
        show(name, exports[name])
    if options.json:
        tools = ("latentrt", "torch", "diffusers", "transformers", "onnxscript", "onnx-ir")
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": machine_facts(),
            "latentrt": {tool: version(tool) for tool in tools},
            "optimum": {} if python is None else versions_in(python),
            "precision": options.precision,
            "random_weights": [name for name, source in given.items() if source == RANDOM],
            "exports": exports,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
