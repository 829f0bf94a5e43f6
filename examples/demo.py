"""The whole path on the shapes checkpoint: export, verify, calibrate, build, generate, score. `make demo` runs it.

Everything goes through the `latentrt` command, as a user would call it; the last lines say where the files are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from latentrt.runtime import contact_sheet

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "examples" / "shapes"
PROMPTS = json.loads((ROOT / "examples" / "demo_prompts.json").read_text())
TARGETS = ("sm86", "sm89", "sm120")
EXPORTED = ("fp32", "fp16")
PRECISIONS = (*EXPORTED, "int8")
DRAWN = ("--sampler", "DPM++ 2M", "--schedule", "karras", "--steps", "20", "--guidance", "5")
# Fewer prompts than by default, so that the demo takes minutes.
COUNTS = "16,2,8"


def latentrt(*words: str) -> dict[str, Any]:
    """Run one subcommand with --json and return its object; its own message ends the demo if it fails."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "latentrt.runtime.cli", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"demo: latentrt {' '.join(words)} failed:\n{done.stdout}")
    print(f"  {time.perf_counter() - started:6.1f} s  latentrt {' '.join(words)[:110]}", flush=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def build(bundle: Path, precision: str, *more: str) -> list[dict[str, Any]]:
    """Engines for every target."""
    done = latentrt("build", str(bundle), "--target", ",".join(TARGETS), "--precision", precision, *more)
    engines: list[dict[str, Any]] = done["engines"]
    return engines


def generate(bundle: Path, precision: str, folder: Path) -> list[Image.Image]:
    """The demo's prompts, one picture each, in one process."""
    requests = folder / "requests.txt"
    folder.mkdir(parents=True, exist_ok=True)
    requests.write_text("\n".join(request["prompt"] for request in PROMPTS) + "\n")
    latentrt(
        *("generate", str(bundle), "--prompts", str(requests), "-o", str(folder / "picture.png")),
        *("--precision", precision, *DRAWN, "--seed", "42"),
    )
    return [Image.open(folder / f"picture-{index:02}.png") for index in range(len(PROMPTS))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--checkpoint", type=Path, default=SHAPES)
    out, checkpoint = parser.parse_args().out, parser.parse_args().checkpoint
    out.mkdir(parents=True, exist_ok=True)
    bundle = out / "shapes.bundle"

    latentrt("export", str(checkpoint), "-o", str(bundle), "--precision", ",".join(EXPORTED))
    calibrated = latentrt(
        *("calibrate", str(bundle), "--prompts", "shapes", "--counts", COUNTS, *DRAWN),
        *("--report", str(out / "calibration.html")),
    )
    latentrt("verify", str(bundle))
    engines = [*build(bundle, "fp16"), *build(bundle, "int8", "--components", "unet")]

    sys.path.insert(0, str(SHAPES))
    from scenes import Request
    from score import score

    requests = [Request(**request) for request in PROMPTS]
    pictures = {precision: generate(bundle, precision, out / precision) for precision in PRECISIONS}
    scores = {}
    for precision, images in pictures.items():
        sheet = contact_sheet([np.asarray(image) for image in images], columns=4)
        Image.fromarray(sheet).save(out / f"sheet-{precision}.png")
        scores[precision] = score(requests, images)
    print_summary(bundle, engines, scores, pictures, out)
    print_calibration(calibrated)


def psnr(pictures: dict[str, list[Image.Image]], precision: str) -> float:
    """Pictures against fp32 ones, dB over all pixels."""
    a, b = (np.stack([np.asarray(i, dtype=np.float64) for i in pictures[p]]) for p in ("fp32", precision))
    mse = float(np.mean((a - b) ** 2))
    return float("inf") if mse == 0 else 10 * np.log10(255**2 / mse)


def print_summary(
    bundle: Path, built: list[dict[str, Any]], scores: dict[str, Any], pictures: dict[str, list[Image.Image]], out: Path
) -> None:
    """One table: component, precision, size, parity, engine size, planned VRAM (weights + activations); then scores."""
    manifest = latentrt("inspect", str(bundle))
    table = Table(title="shapes.bundle", title_justify="left")
    for column in ("component", "precision", "ONNX MB", "relative L2", "engines MB", "planned VRAM MB"):
        table.add_column(column, justify="left" if column in ("component", "precision") else "right")
    for artifact in manifest["artifacts"]:
        engines = [
            e
            for e in built
            if (e["component"], e["precision"], "") == tuple(artifact[x] for x in ("component", "precision", "target"))
        ]
        size = sum(manifest["files"][name]["size"] for name in artifact["files"]) / 1e6
        table.add_row(
            artifact["component"],
            f"{artifact['precision']} {artifact['target']}".rstrip(),
            f"{size:.1f}",
            f"{artifact['parity']['worst_relative_l2']:.1e}",
            " ".join(f"{'+'.join(e['targets'])}:{e['engine_bytes'] / 1e6:.1f}" for e in engines) or "-",
            " ".join(f"{(e['weight_bytes'] + e['activation_bytes']) / 1e6:.0f}" for e in engines) or "-",
        )
    console = Console(width=140) if not sys.stdout.isatty() else Console()
    console.print(table)
    for precision, result in scores.items():
        right = result.content
        print(f"{precision}: {right.right} of {right.total} pictures show the colour, background and shape asked for")
    for precision in PRECISIONS[1:]:
        print(f"{precision} pictures against fp32: {psnr(pictures, precision):.1f} dB")
    print("engines: built ahead of time; not run on a GPU")
    print(f"bundle   {bundle}\npictures {', '.join(str(out / f'sheet-{precision}.png') for precision in PRECISIONS)}")


def print_calibration(calibrated: dict[str, Any]) -> None:
    """What of the U-Net is int8, and whether held-out pictures hold the budget."""
    share = f"{calibrated['quantized_layers']} of {calibrated['layers']} layers, {calibrated['macs_share']:.1%} of MACs"
    (budget,) = calibrated["budgets"]
    print(f"int8     {share}; {budget['budget']}: {budget['value']:.1f} dB on held-out prompts")
    print(f"report   {calibrated['report']}")


if __name__ == "__main__":
    main()
