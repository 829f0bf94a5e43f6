r"""Swapping a LoRA at published size: against diffusers' load and fuse, and against exporting again.

    python benchmarks/scripts/bench_lora.py --checkpoint sd15 --bundle sd15.bundle \
        --json benchmarks/results/lora-swap.json

The LoRA has random factors for all attention layers of the U-Net and the text encoder. A swap is what a user waits for
between two pictures: the new weights are computed and the networks that change are opened again. Without `--export`
the export is left out: it takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

from latentrt.export.checkpoint import open_checkpoint
from latentrt.export.exporter import export_checkpoint
from latentrt.export.graph_builder import components_of
from latentrt.export.graph_files import save_onnx
from latentrt.export.lora_bundle import add_lora
from latentrt.export.networks import open_network
from latentrt.export.ort_fusions import fuse
from latentrt.export.to_onnx import to_onnx
from latentrt.export.tool_versions import tool_versions
from latentrt.export.trace_cache import default_cache
from latentrt.runtime.bundle import Bundle, open_bundle
from latentrt.runtime.components import Components
from latentrt.runtime.graph_weights import GraphWeights
from latentrt.runtime.lora_store import open_loras
from latentrt.runtime.lora_weights import lora_weights
from latentrt.runtime.session import OnnxSession

NETWORKS = ("text_encoder", "unet")
ATTENTION = re.compile(r"attn[12]\.to_(q|k|v|out\.0)\.weight|self_attn\.(q|k|v|out)_proj\.weight")
# In a process of its own, so that its memory and its threads are its own.
DIFFUSERS = """
import json, sys, time
from pathlib import Path
from latentrt.export.networks import libraries_quiet
with libraries_quiet():
    import diffusers, torch
    path, lora = sys.argv[1], Path(sys.argv[2])
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(path, torch_dtype=torch.float16, safety_checker=None)
    found = []
    for _ in range(2):
        started = time.perf_counter()
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
        loaded = time.perf_counter()
        pipeline.fuse_lora(lora_scale=0.8)
        fused = time.perf_counter()
        pipeline.unfuse_lora()
        pipeline.unload_lora_weights()
        unfused = time.perf_counter()
        found.append({"load": loaded - started, "fuse": fused - loaded, "unfuse_and_unload": unfused - fused})
json.dump(found[1], sys.stdout)
"""


def write_lora(path: Path, bundle: Bundle, precision: str, rank: int, *, seed: int) -> int:
    """Write random factors in peft's format; returns how many layers they change."""
    rng, tensors = np.random.default_rng(seed), {}
    for network in NETWORKS:
        for parameter, weight in GraphWeights.open(bundle.graph(network, precision)).by_parameter.items():
            if ATTENTION.search(parameter):
                key = f"{network}.{parameter.removesuffix('.weight')}"
                outputs, inputs = weight.shape
                tensors[f"{key}.lora_A.weight"] = rng.standard_normal((rank, inputs), np.float32).astype(np.float16)
                up = 0.01 * rng.standard_normal((outputs, rank), np.float32)
                tensors[f"{key}.lora_B.weight"] = up.astype(np.float16)
    save_file(tensors, path)
    return len(tensors) // 2


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure_swap(bundle: Bundle, precision: str) -> dict[str, float]:
    """Seconds of each part of a swap, and of whole ones."""
    loras, seconds = open_loras(bundle, ["a"]), {}
    for network in NETWORKS:
        seconds[f"compute_{network}"] = timed(partial(lora_weights, loras, bundle.graph(network, precision), network))
    components = Components(bundle, precision, backend="onnxruntime", verify=False)
    for network in NETWORKS:
        seconds[f"open_{network}"] = timed(partial(components.__getitem__, network))
    for name, wanted in (("base_to_a", ["a"]), ("a_to_b", ["b"]), ("b_to_base", [])):
        seconds[name] = timed(partial(components.set_loras, wanted))
    return seconds


def measure_cpu_graph(checkpoint: Path, bundle: Bundle, work: Path) -> dict[str, float]:
    """A swap of the U-Net in the graph that `latentrt optimize --target cpu` makes: fp32, its weights mapped."""
    networks = {name: open_network(part) for name, part in open_checkpoint(checkpoint).parts.items()}
    save_onnx(to_onnx(components_of(networks)["unet"], cache=default_cache()), work / "model.onnx")
    path, model = work / "model.fp32.cpu.onnx", ir.load(work / "model.onnx")
    fuse(model, "cpu")
    ir.save(model, path)
    loras, held = open_loras(bundle, ["a"]), dict[str, Any]()
    seconds = {"open_base": timed(partial(OnnxSession, path, optimize=False))}
    seconds["compute"] = timed(lambda: held.update(lora_weights(loras, path, "unet")))
    seconds["open_with_lora"] = timed(partial(OnnxSession, path, optimize=False, weights=held))
    return seconds


def measure_diffusers(checkpoint: Path, lora: Path) -> dict[str, float]:
    command = [sys.executable, "-c", DIFFUSERS, str(checkpoint), str(lora)]
    content: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return content


def measure_export(checkpoint: Path, lora: Path, work: Path, precision: str) -> float:
    opened = open_checkpoint(checkpoint, loras=[(lora, 0.8)])
    return timed(lambda: export_checkpoint(opened, work / "fused.bundle", precisions=[precision], check="quick"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="diffusers folder that the bundle was made from")
    parser.add_argument("--bundle", type=Path, required=True, help="is not changed")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--export", action="store_true", help="also export with the LoRA folded in")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="on the bundle's filesystem; default the temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        copy = Path(shutil.copytree(options.bundle, work / "copy.bundle", copy_function=os.link))
        lora = work / "a.safetensors"
        layers = write_lora(lora, open_bundle(copy), options.precision, options.rank, seed=0)
        write_lora(work / "b.safetensors", open_bundle(copy), options.precision, options.rank, seed=1)
        results: dict[str, Any] = {"add": timed(lambda: add_lora(copy, lora, scale=0.8))}
        add_lora(copy, work / "b.safetensors")
        results["swap"] = measure_swap(open_bundle(copy), options.precision)
        results["unet_fp32_cpu"] = measure_cpu_graph(options.checkpoint, open_bundle(copy), work)
        results["diffusers"] = measure_diffusers(options.checkpoint, lora)
        if options.export:
            results["export_again"] = measure_export(options.checkpoint, lora, work, options.precision)
        size = lora.stat().st_size
    for name, figures in results.items():
        each = figures if isinstance(figures, dict) else {"": figures}
        print(f"{name}: {', '.join(f'{part} {seconds:.2f} s'.strip() for part, seconds in each.items())}")
    if options.json:
        content = {
            "machine": {"cpu": platform.processor(), "cores": os.cpu_count(), "gpu": "none: not run on a GPU"},
            "tools": tool_versions(),
            "load_average": os.getloadavg()[0],
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "bundle": options.bundle.name,
            "precision": options.precision,
            "weights": "random",
            "lora": {"rank": options.rank, "layers": layers, "bytes": size},
            "seconds": results,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
