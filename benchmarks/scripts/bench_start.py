"""Seconds and peak memory from a fresh process to the first picture: latentrt beside diffusers, in one run.

Both draw the same prompt from the same checkpoint with the same sampler, steps, guidance and seed on the CPU. Each
measurement is a process of its own; the two alternate, so a busy machine slows both. Ratios are what to quote.

    python benchmarks/scripts/bench_start.py shapes.bundle --checkpoint examples/shapes
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "a small red circle on a blue background"

MEASURE = """
import json, resource, time
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
start = time.perf_counter()
{imports}
imported = time.perf_counter()
memory = peak()
{draw}
print(json.dumps({{"import_s": imported - start, "import_mib": memory,
                  "picture_s": time.perf_counter() - imported, "picture_mib": peak(),
                  "mean": float(picture.mean())}}))
"""

PROGRAMS = {
    "latentrt": MEASURE.format(
        imports="from latentrt.runtime import Pipeline",
        draw="""
pipe = Pipeline.load({bundle!r})
picture = pipe({prompt!r}, sampler="DPM++ 2M", schedule="karras", steps={steps}, guidance=5.0, seed=42).images[0]
""",
    ),
    "diffusers": MEASURE.format(
        imports="import numpy, torch, diffusers\nfrom diffusers import StableDiffusionPipeline",
        draw="""
diffusers.utils.logging.disable_progress_bar()
pipe = StableDiffusionPipeline.from_pretrained({checkpoint!r}, dtype=torch.float32, safety_checker=None)
pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
pipe.set_progress_bar_config(disable=True)
picture = pipe({prompt!r}, num_inference_steps={steps}, guidance_scale=5.0, output_type="np",
               generator=torch.Generator("cpu").manual_seed(42)).images[0] * 255
""",
    ),
}


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one program in a fresh interpreter and read its figures."""
    values = {
        "bundle": str(options.bundle.resolve()),
        "checkpoint": str(options.checkpoint.resolve()),
        "prompt": PROMPT,
        "steps": options.steps,
    }
    program = PROGRAMS[name]
    for key, value in values.items():
        program = program.replace(f"{{{key}!r}}", repr(value)).replace(f"{{{key}}}", str(value))
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**figures, "process_s": time.perf_counter() - began}


def main() -> None:
    """Alternate the programs, take medians, print them with their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?", default=Path("build/demo/shapes.bundle"))
    parser.add_argument("--checkpoint", type=Path, default=Path("examples/shapes"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in PROGRAMS}
    for _ in range(options.rounds):
        for name, results in runs.items():
            results.append(measure(name, options))
    medians = {
        name: {key: statistics.median(run[key] for run in results) for key in results[0]}
        for name, results in runs.items()
    }
    ours, theirs = medians["latentrt"], medians["diffusers"]
    print(f"{'':24}{'latentrt':>12}{'diffusers':>12}{'ratio':>9}")
    for key, label in {
        "import_s": "import, s",
        "import_mib": "after import, MiB",
        "picture_s": "load + picture, s",
        "process_s": "whole process, s",
        "picture_mib": "peak, MiB",
    }.items():
        print(f"{label:24}{ours[key]:12.3f}{theirs[key]:12.3f}{theirs[key] / ours[key]:8.1f}x")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "machine": {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()},
            "steps": options.steps,
            "rounds": options.rounds,
            "medians": medians,
            "gpu": "not run on a GPU",
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
