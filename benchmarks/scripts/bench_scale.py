"""Exports at published size: time, memory, disk and figures, with random weights.

    python benchmarks/scripts/bench_scale.py --families sd1,sdxl --json benchmarks/results/scale-cpu.json

Each export runs in a process of its own, whose peak memory is its VmHWM. For every family: a first export (cold, the
graphs are traced), then one of another checkpoint of the same architecture (warm, quick check), and the warm one again
without the cache, whose files must be the same, byte for byte. Weights are random: no picture means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from full_size import FAMILIES, held_families, write_checkpoint

from latentrt.export.tool_versions import tool_versions
from latentrt.runtime.manifest import load_manifest

# In the child: the stages with the peak of memory in each, which the kernel counts anew after a write to clear_refs.
CHILD = """
import json, sys, time
from pathlib import Path
from latentrt.export.exporter import export_checkpoint
def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) * 1024
started, stages = time.perf_counter(), []
def report(message, share):
    now = time.perf_counter() - started
    if stages:
        stages[-1] |= {"peak_bytes": peak(), "seconds": now - stages[-1]["at"]}
    stages.append({"stage": message, "at": now})
source, bundle, precision, check = sys.argv[1:]
export_checkpoint(Path(source), Path(bundle), precisions=[precision], check=check, report=report)
report("end", 1.0)
json.dump({"seconds": time.perf_counter() - started, "stages": stages[:-1]}, sys.stdout)
"""


def run(checkpoint: Path, bundle: Path, precision: str, check: str, cache: Path) -> dict[str, Any]:
    """One export in a fresh process."""
    shutil.rmtree(bundle, ignore_errors=True)
    started = time.perf_counter()
    command = [sys.executable, "-c", CHILD, str(checkpoint), str(bundle), precision, check]
    environment = {**os.environ, "LATENTRT_CACHE": str(cache)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    content: dict[str, Any] = json.loads(done.stdout)
    content["process_seconds"] = time.perf_counter() - started
    manifest = load_manifest(bundle)
    content["graphs"] = {
        artifact.component: {
            "precision": artifact.precision,
            "parameters": artifact.parameters,
            "bytes": sum(manifest.files[name].size for name in artifact.files),
            "files": len(artifact.files),
            "relative_l2": artifact.parity["worst_relative_l2"],
            "check": artifact.parity["check"],
        }
        for artifact in manifest.artifacts
    }
    content["peak_bytes"] = max(stage["peak_bytes"] for stage in content["stages"])
    content["unet_peak_bytes"] = max(s["peak_bytes"] for s in content["stages"] if s["stage"].startswith("unet"))
    return content


def same(first: Path, second: Path) -> bool:
    """Whether two bundles hold the same files."""
    return load_manifest(first).files == load_manifest(second).files


def measure(family: str, precision: str, work: Path) -> dict[str, Any]:
    """Cold, warm and warm-without-cache exports of a family."""
    checkpoints = [write_checkpoint(family, work / f"{family}-{seed}", seed=seed) for seed in (0, 1)]
    bundle, again, cache = work / "bundle", work / "again", work / "cache"
    results: dict[str, Any] = {"cold": run(checkpoints[0], bundle, precision, "full", cache)}
    shutil.rmtree(checkpoints[0])
    results["warm"] = run(checkpoints[1], bundle, precision, "auto", cache)
    results["traced_again"] = run(checkpoints[1], again, precision, "quick", work / "other-cache")
    results["bit_equal"] = same(bundle, again)
    for folder in (checkpoints[1], bundle, again):
        shutil.rmtree(folder)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default="sd1,sdxl", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="where tens of gigabytes fit; default the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        families = {name: measure(name, options.precision, Path(work)) for name in options.families.split(",")}
    for name, results in families.items():
        for kind in ("cold", "warm", "traced_again"):
            figures = results[kind]
            peak, unet = figures["peak_bytes"] / 1e9, figures["unet_peak_bytes"] / 1e9
            error = figures["graphs"]["unet"]["relative_l2"]
            print(f"{name} {kind}: {figures['seconds']:.0f} s, peak {peak:.2f} GB, U-Net {unet:.2f} GB, {error:.1e}")
        print(f"{name}: the graph from the cache gives the same files: {results['bit_equal']}")
    if options.json:
        machine = {"cpu": platform.processor(), "cores": os.cpu_count(), "gpu": "none: not run on a GPU"}
        families = {**held_families(options.json), **families}
        content = {"machine": machine, "tools": tool_versions(), "weights": "random", "families": families}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    if not all(results["bit_equal"] for results in families.values()):
        raise SystemExit("expected the same files with and without the cache of traced graphs")


if __name__ == "__main__":
    main()
