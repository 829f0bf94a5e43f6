"""Engines of U-Nets at published size, built ahead of time: time, peak memory and size, in half and eight bits.

    python benchmarks/scripts/bench_build.py --families sd1,sdxl --json benchmarks/results/build-cpu.json

A checkpoint with random weights is written and exported in fp16, then its U-Net is built with TensorRT-RTX for each
target, each in a process of its own. The int8 graph has the layers in int8 that a calibrated one usually has, with
made-up scales: its engine's size means something, its numbers do not. `thin` is the file that `--strip` writes. No
engine is run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx_ir as ir
from full_size import held_families, write_checkpoint

from latentrt.calibrate.layer_quant import LayerQuant
from latentrt.calibrate.quantize_pass import CHANNEL_AXIS, QuantizePass
from latentrt.export.build_options import BuildOptions
from latentrt.export.engine_jobs import build_engines
from latentrt.export.exporter import export_checkpoint
from latentrt.export.graph_files import save_onnx
from latentrt.export.graph_values import is_weight
from latentrt.export.tool_versions import tool_versions
from latentrt.runtime.manifest import Artifact, key_of, load_manifest, record_of, update_manifest
from latentrt.runtime.trt_flavour import installed_flavour

SIZES = {"sd1": 512, "sd2": 512, "sdxl": 1024, "refiner": 1024}
# What stays in half precision whatever a calibration says: a ten thousandth of the work, or too sensitive.
HALF = re.compile(
    r"(^|\.)(conv_in|conv_out|time_embedding|add_embedding|time_emb_proj|conv_shortcut|attn2\.to_k|attn2\.to_v)\."
)


def int8_graph(bundle: Path) -> None:
    """Add the U-Net in int8, with one made-up scale for every input."""
    half = load_manifest(bundle).artifact("unet", "fp16")
    assert half is not None
    model = ir.load(bundle / half.path)
    weights = [
        str(node.inputs[1].name)
        for node in model.graph
        if node.op_type in CHANNEL_AXIS and is_weight(node.inputs[1]) and node.inputs[1] is not None
    ]
    QuantizePass({name: LayerQuant(1 / 16) for name in weights if not HALF.search(name)})(model)
    files = [path.relative_to(bundle).as_posix() for path in save_onnx(model, bundle / "unet/model.int8.onnx")]
    inputs = {"made_from": half.key, "scales": "made up"}
    artifact = Artifact("unet", "int8", files[0], tuple(files), half.opset, key_of(inputs), inputs, {}, half.parameters)
    records = {name: record_of(bundle / name) for name in files}

    def change(manifest: Any) -> Any:
        from dataclasses import replace

        return replace(
            manifest, files={**manifest.files, **records}, artifacts=(*manifest.artifacts, artifact), engines=()
        )

    update_manifest(bundle, change)


def prepare(family: str, work: Path) -> Path:
    """A bundle with the U-Net in fp16 and int8."""
    checkpoint, bundle = work / family, work / f"{family}.bundle"
    write_checkpoint(family, checkpoint)
    export_checkpoint(checkpoint, bundle, precisions=["fp16"], check="quick")
    shutil.rmtree(checkpoint)
    int8_graph(bundle)
    return bundle


def build(bundle: Path, options: BuildOptions) -> dict[str, Any]:
    """One engine, and the peak memory of this process."""
    (result,) = build_engines(bundle, options)
    sidecar = result.sidecar
    return {
        "status": result.status,
        "seconds": sidecar.build_seconds,
        "engine_bytes": sidecar.engine_bytes,
        "weight_bytes": sidecar.weight_bytes,
        "activation_bytes": sidecar.activation_bytes,
        "flops": dict(sidecar.flops),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measured(bundle: Path, size: int, target: str, precision: str, *, strip: bool) -> dict[str, Any]:
    """One engine, in a process of its own."""
    command = [sys.executable, __file__, "--build", str(bundle), str(size), target, precision, str(int(strip))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def family_results(family: str, targets: list[str], work: Path) -> dict[str, Any]:
    """All engines of a family's U-Net."""
    # In a process of its own: a process forked from a large one would count that one's memory.
    subprocess.run([sys.executable, __file__, "--prepare", family, str(work)], check=True)
    bundle, size = work / f"{family}.bundle", SIZES[family]
    results = {
        f"{precision}{' thin' * strip} {target}": measured(bundle, size, target, precision, strip=strip)
        for precision, strip in (("fp16", False), ("int8", False), ("fp16", True))
        for target in (targets if not strip else targets[:1])
    }
    shutil.rmtree(bundle)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", default="sd1", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--targets", default="sm89,sm120")
    parser.add_argument("--work", type=Path, help="where tens of gigabytes fit; default the temporary folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--prepare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--build", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(options.prepare[0], Path(options.prepare[1]))
        return
    if options.build:
        bundle, size, target, precision, strip = options.build
        asked = BuildOptions(
            target=target,
            precision=precision,
            size=size,
            components=("unet",),
            flavour="tensorrt_rtx",
            strip=strip == "1",
            cache="off",
            force=True,
        )
        print(json.dumps(build(Path(bundle), asked)))
        return
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        families = {
            name: family_results(name, options.targets.split(","), Path(work)) for name in options.families.split(",")
        }
    for name, results in families.items():
        for kind, figures in results.items():
            engine, peak = figures["engine_bytes"] / 1e6, figures["peak_bytes"] / 1e9
            print(f"{name} {kind}: {figures['seconds']:.0f} s, peak {peak:.2f} GB, engine {engine:.1f} MB")
    if options.json:
        machine = {"cpu": platform.processor(), "cores": os.cpu_count(), "gpu": "none: no engine was run"}
        tools = {**tool_versions(), "tensorrt_rtx": (installed_flavour("tensorrt_rtx") or ("none",))[0]}
        families = {**held_families(options.json), **families}
        content = {"machine": machine, "tools": tools, "weights": "random", "families": families}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
