"""A U-Net in int8 on the CPU beside its fp32 graph, in one process, a run of each in turn.

    python benchmarks/scripts/bench_int8_cpu.py --bundle shapes.bundle --json benchmarks/results/int8-cpu.json

Two networks: the bundle's, and one of SD 1.5's width (its two upper levels, random weights) at 32 x 32 latents. Scales
are those of one run on noise: they decide about no kernel, and so about no time. What is timed is the process's CPU
time on one thread, which other work on the machine disturbs less than the clock.

    int8          pairs as TensorRT wants them, in float32
    int8 on cpu   the same integers as `QuantizedOnCpuPass` lays them out
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from latentrt.benchmarks.machine_facts import machine_facts
from latentrt.calibrate.layer_quant import LayerQuant
from latentrt.calibrate.layers import Layer, graph_layers
from latentrt.calibrate.quantize_pass import QuantizePass
from latentrt.export.graph_files import save_onnx
from latentrt.export.networks import libraries_quiet
from latentrt.export.published_configs import published_configs
from latentrt.export.quantized_on_cpu import QuantizedOnCpuPass
from latentrt.export.to_onnx import to_onnx
from latentrt.export.unet import unet_component
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.specs import Array

# As sensitive as they are cheap: no plan quantizes them.
KEPT = ("conv_in", "conv_out", "time_embedding", "time_emb_proj")
MATMUL_OPTION = "MatMulAddFusion"


def wide_unet(path: Path) -> Path:
    """Write a U-Net with the two upper levels of SD 1.5's, one layer in each block."""
    config = dict(published_configs("sd1")["unet"])
    config |= {
        "block_out_channels": [320, 640],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2,
    }
    with libraries_quiet():
        import diffusers
        import torch

        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel.from_config(config).eval()
    save_onnx(to_onnx(unet_component(unet)), path)
    return path


def feeds_of(model: ir.Model, side: int) -> dict[str, Array]:
    """Noise for two rows."""
    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "latent_height": side, "latent_width": side, "sequence_length": 77}
    shapes = {
        str(value.name): [sizes[str(size.value)] if isinstance(size, ir.SymbolicDim) else size for size in value.shape]
        for value in model.graph.inputs
        if value.shape is not None
    }
    feeds: dict[str, Array] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return feeds | {"timestep": np.full(2, 500, np.float32)}


def scales_of(path: Path, layers: list[Layer], feeds: Mapping[str, Array], folder: Path) -> dict[str, float]:
    """By layer, the largest absolute value of its input over 127."""
    model = ir.load(path)
    made = {str(value.name): value for node in model.graph for value in node.outputs}
    for name in sorted({layer.input for layer in layers} & made.keys()):
        model.graph.outputs.append(made[name])
    save_onnx(model, folder / "probe.onnx")
    session = ort.InferenceSession(folder / "probe.onnx", providers=["CPUExecutionProvider"])
    found = dict(zip([out.name for out in session.get_outputs()], session.run(None, dict(feeds)), strict=True))
    return {layer.name: float(np.abs({**found, **feeds}[layer.input]).max()) / 127 for layer in layers}


def session_of(path: Path, folder: Path, *disabled: str) -> tuple[Any, dict[str, int]]:
    """A session on one thread, and how many of the operators that multiply it has of each kind."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    dump = folder / "optimized.onnx"
    options.optimized_model_filepath = str(dump)
    prefix = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{prefix}_file_name", "optimized.data")
    options.add_session_config_entry(f"{prefix}_min_size_in_bytes", "1024")
    session = ort.InferenceSession(path, options, ["CPUExecutionProvider"], disabled_optimizers=list(disabled))
    operators = Counter(node.op_type for node in onnx.load(dump, load_external_data=False).graph.node)
    kinds = ("Conv", "FusedConv", "QLinearConv", "MatMul", "FusedMatMul", "MatMulIntegerToFloat", "Gemm")
    return session, {kind: operators[kind] for kind in kinds if operators[kind]}


def measure(path: Path, side: int, folder: Path, runs: int) -> dict[str, Any]:
    """Times and operators of one network's graphs, and how far their answers are apart."""
    model = ir.load(path)
    feeds = feeds_of(model, side)
    sizes = {"batch": 1, "latent_height": side, "latent_width": side, "sequence_length": 77}
    layers = [layer for layer in graph_layers(model, sizes) if layer.quantizable and layer.kind not in KEPT]
    quants = {name: LayerQuant(scale=scale) for name, scale in scales_of(path, layers, feeds, folder).items()}
    graphs = {"fp32": path}
    for name, on_cpu in (("int8", False), ("int8 on cpu", True)):
        model = ir.load(path)
        QuantizePass(quants)(model)
        if on_cpu:
            QuantizedOnCpuPass()(model)
        graphs[name] = save_onnx(model, folder / f"{name.replace(' ', '-')}.onnx")[0]
    opened = {name: session_of(graph, folder) for name, graph in graphs.items()}
    opened[f"int8 on cpu, without {MATMUL_OPTION}"] = session_of(graphs["int8 on cpu"], folder, MATMUL_OPTION)
    seconds: dict[str, list[float]] = {name: [] for name in opened}
    answers = {name: session.run(["out_sample"], feeds)[0] for name, (session, _) in opened.items()}
    for _ in range(runs):
        for name, (session, _) in opened.items():
            started = time.process_time()
            session.run(["out_sample"], feeds)
            seconds[name].append(time.process_time() - started)
    median = {name: float(np.median(times)) for name, times in seconds.items()}
    return {
        "latents": side,
        "int8_share_of_macs": round(sum(layer.share for layer in layers), 4),
        "graphs": {
            name: {
                "cpu_seconds": round(median[name], 4),
                "of_fp32": round(median[name] / median["fp32"], 3),
                "operators": operators,
                "relative_l2": float(np.linalg.norm(answers[name] - answers["fp32"]) / np.linalg.norm(answers["fp32"])),
            }
            for name, (_, operators) in opened.items()
        },
    }


def main() -> int:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = open_bundle(told.bundle).graph("unet", "fp32")
        networks = {
            told.bundle.name: measure(own, 16, folder, told.runs),
            "sd1 width": measure(wide_unet(folder / "wide.onnx"), 32, folder, max(3, told.runs // 3)),
        }
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine_facts(),
        "load_at_start": round(load, 2),
        "threads": 1,
        "onnxruntime": ort.__version__,
        "networks": networks,
    }
    text = json.dumps(report, indent=1)
    if told.json:
        told.json.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
