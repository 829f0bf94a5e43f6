"""Nodes and bytes of our graphs beside `optimum-cli export onnx`'s, plain and with --slim, of the same checkpoints.

Tiny random checkpoints by family, every component, and Stable Diffusion 1.5 with all its layers at a tenth of their
width, which has the nodes of the real one. With --full its networks at their published size (the text encoder with a
small vocabulary), each in a checkpoint whose other networks are tiny, which keeps optimum's memory down: 7 GB for the
U-Net; more than 10 GB with --slim, which is left out there. Seconds and peak memory are those of a whole export
command; ours compares every graph with PyTorch, too.

    python benchmarks/scripts/graph_size.py --venv build/optimum-venv --full --json benchmarks/results/graph-size.json
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
from optimum_env import Ran, ensure_venv, export_with_latentrt, export_with_optimum, use_older_names, versions_in

FAMILIES = ("sd15", "sd21", "sdxl_base", "lcm")
# Stable Diffusion 1.5 as published; the pictures that an export is proven on are small.
UNET: dict[str, Any] = {
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 128,
}
TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
FULL = ("unet", "text_encoder", "vae")
COMPONENTS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")


def full_size(network: str) -> Callable[[Path], Path]:
    """Writes Stable Diffusion 1.5 with one network at its published size."""

    def write(folder: Path) -> Path:
        # The U-Net and the text encoder share a width.
        text = {"text_encoder": TEXT, "unet": {**TEXT, "num_hidden_layers": 1}, "vae": {}}[network]
        unet = {"text_encoder": {"cross_attention_dim": TEXT["hidden_size"]}, "unet": UNET, "vae": {}}[network]
        return write_sd15(folder, unet=unet, text=text, vae=VAE if network == "vae" else {})

    return write


def narrow(folder: Path) -> Path:
    """Writes Stable Diffusion 1.5 with all its layers, and few channels."""
    return write_sd15(
        folder,
        unet={**UNET, "block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 32},
        text={"num_hidden_layers": TEXT["num_hidden_layers"]},
        vae={**VAE, "block_out_channels": (32, 32, 64, 64)},
    )


def write_sd15(folder: Path, *, unet: Mapping[str, Any], text: Mapping[str, Any], vae: Mapping[str, Any]) -> Path:
    """Writes the tests' tiny sd15 with some values of its configs changed.

    Every weight is random: a norm that multiplies by one and adds zero, as networks begin, would be optimized away.
    """
    import families

    families.sd15(folder)
    changed = {
        "unet": families.make_unet({**families.SD_UNET, **unet}, seed=0),
        "text_encoder": families.make_text_encoder({**families.TEXT, **text}, seed=0),
        "vae": families.make_vae({**families.SD_VAE, **vae}, seed=0),
    }
    for name, network in changed.items():
        network.save_pretrained(folder / name)
    return folder


def count(graph: onnx.GraphProto) -> int:
    """Nodes of a graph and of the graphs inside it."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return len(graph.node) + sum(count(subgraph) for subgraph in inner)


def sizes(folder: Path) -> dict[str, dict[str, int]]:
    """Component -> nodes, bytes of graph and weights, number of files."""
    found = {}
    for component in COMPONENTS:
        path = folder / component / "model.onnx"
        if path.exists():
            model = onnx.load(path, load_external_data=False)
            files = [file for file in path.parent.iterdir() if file.suffix != ".json"]
            found[component] = {
                "nodes": count(model.graph),
                "bytes": sum(file.stat().st_size for file in files),
                "files": len(files),
                "opset": next(imported.version for imported in model.opset_import if not imported.domain),
            }
    return found


def measure(python: Path, write: Callable[[Path], Path], work: Path, *, slim: bool = True) -> dict[str, dict[str, Any]]:
    """Export a checkpoint each way: way -> its components, seconds and memory."""
    checkpoint = use_older_names(write(work / "checkpoint"))
    ways: dict[str, Callable[[Path], Ran]] = {
        "latentrt": lambda folder: export_with_latentrt(checkpoint, folder),
        "optimum": lambda folder: export_with_optimum(python, checkpoint, folder),
    }
    if slim:
        ways["optimum --slim"] = lambda folder: export_with_optimum(python, checkpoint, folder, "--slim")
    found: dict[str, dict[str, Any]] = {}
    for way, export in ways.items():
        folder = work / "export"
        try:
            ran = export(folder)
            found[way] = {
                "components": sizes(folder),
                "seconds": round(ran.seconds, 1),
                "peak_mib": round(ran.peak_mib),
            }
        except RuntimeError as err:
            if way == "latentrt":
                raise
            found[way] = {"components": {}, "failed": str(err).strip().splitlines()[-1]}
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(checkpoint)
    return found


def larger(name: str, figures: dict[str, dict[str, Any]]) -> list[str]:
    """Where one of ours has more nodes or bytes than optimum's."""
    ours = figures["latentrt"]["components"]
    return [
        f"{name} {component}: {mine[unit]} {unit}, {way} {theirs[component][unit]}"
        for way in figures.keys() - {"latentrt"}
        for component, mine in ours.items()
        for unit in ("nodes", "bytes")
        if (theirs := figures[way]["components"]).get(component) and mine[unit] > theirs[component][unit]
    ]


def show(name: str, figures: dict[str, dict[str, Any]]) -> None:
    """Print a checkpoint's rows."""
    for component in figures["latentrt"]["components"]:
        cells = []
        for found in figures.values():
            size = found["components"].get(component)
            cells.append(f"{size['nodes']:6} {size['bytes'] / 1e6:10.3f} {size['files']:3}" if size else "failed")
        print(f"{name + ' ' + component:32}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
    cells = [
        f"{found['seconds']:.0f} s {found['peak_mib']} MiB" if "seconds" in found else "" for found in figures.values()
    ]
    print(f"{'':32}" + "".join(f"{cell:>24}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=Path("build/optimum-venv"), help="made if it is not there")
    parser.add_argument("--work", type=Path, help="where to export; default a temporary folder")
    parser.add_argument("--full", action="store_true", help="also Stable Diffusion 1.5 at full size: minutes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    python = ensure_venv(options.venv.resolve())
    import families

    checkpoints = {family: families.FAMILIES[family] for family in FAMILIES} | {"sd15, narrow": narrow}
    if options.full:
        checkpoints |= {f"full-size {network}": full_size(network) for network in FULL}
    figures = {}
    print(f"{'nodes, MB, files':32}" + "".join(f"{way:>24}" for way in ("latentrt", "optimum", "optimum --slim")))
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        for name, write in checkpoints.items():
            figures[name] = measure(python, write, Path(scratch), slim=name != "full-size unet")
            show(name, figures[name])
    if options.json:
        report = {
            "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()},
            "optimum": versions_in(python),
            "latentrt": {name: version(name) for name in ("latentrt", "torch", "diffusers", "onnxscript", "onnx-ir")},
            "exports": figures,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if found := [line for name, exported in figures.items() for line in larger(name, exported)]:
        raise SystemExit("expected no graph larger than optimum's, got\n" + "\n".join(found))


if __name__ == "__main__":
    main()
