"""How often a picture shows what its prompt asks for: diffusers on the checkpoint, and each precision of a bundle.

    python benchmarks/scripts/prompt_accuracy.py --bundle build/demo/shapes.bundle --count 500

The shapes checkpoint is drawn with 20 steps of DPM++ 2M Karras at guidance 5, picture i with seed i, and
`examples/shapes/score.py` looks at the pictures. Beside accuracy it prints the PSNR of a bundle's pictures against
those of diffusers, which are the same pictures where the runtime is right.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "shapes"))

from score import evaluation_requests, score  # noqa: E402

Pictures = NDArray[np.uint8]
Draw = Callable[[Sequence[str], Sequence[int]], Pictures]
BATCH = 20


def with_diffusers(checkpoint: Path, *, steps: int, guidance: float) -> Draw:
    """Draw with diffusers' pipeline in float32."""
    import diffusers
    import torch

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32, safety_checker=None)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Pictures:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        images = pipe(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        ).images
        pictures: Pictures = (images * 255).round().astype(np.uint8)
        return pictures

    return draw


def with_latentrt(bundle: Path, precision: str, *, steps: int, guidance: float) -> Draw:
    """Draw with the torch-free runtime; seeds are consecutive."""
    from latentrt.runtime import Pipeline

    pipe = Pipeline.load(bundle, precision=precision)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Pictures:
        return pipe(
            prompts, sampler="DPM++ 2M", schedule="karras", steps=steps, guidance=guidance, seed=seeds[0]
        ).images

    return draw


def evaluate(draw: Draw, count: int) -> tuple[dict[str, Any], Pictures, float]:
    """Score, pictures and seconds of `count` evaluation prompts."""
    requests = evaluation_requests(count, 0)
    started = time.perf_counter()
    batches = []
    for start in range(0, count, BATCH):
        prompts = [request.prompt for request in requests[start : start + BATCH]]
        batches.append(draw(prompts, list(range(start, start + len(prompts)))))
    seconds = time.perf_counter() - started
    pictures = np.concatenate(batches)
    return score(requests, list(pictures)).to_json(), pictures, seconds


def psnr(a: Pictures, b: Pictures) -> float | None:
    """Over all pixels, in dB; None for equal pictures."""
    mse = float(np.mean((a.astype(np.float64) - b) ** 2))
    return None if mse == 0 else float(10 * np.log10(255**2 / mse))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples" / "shapes")
    parser.add_argument("--bundle", type=Path, help="also draw with this bundle, in each precision")
    parser.add_argument("--precision", default="fp32,fp16")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    settings = {"steps": options.steps, "guidance": options.guidance}
    runs: dict[str, Draw] = {"diffusers fp32": with_diffusers(options.checkpoint, **settings)}
    if options.bundle:
        for precision in options.precision.split(","):
            runs[f"latentrt {precision}"] = with_latentrt(options.bundle, precision, **settings)
    report: dict[str, Any] = {"count": options.count, "sampler": "DPM++ 2M Karras", **settings, "runs": {}}
    reference: Pictures | None = None
    for name, draw in runs.items():
        figures, pictures, seconds = evaluate(draw, options.count)
        reference = pictures if reference is None else reference
        decibels = psnr(pictures, reference)
        entry = {"score": figures, "seconds": round(seconds, 1), "psnr_db": decibels}
        report["runs"][name] = entry
        accuracy = "  ".join(f"{key} {value['accuracy']:.1%}" for key, value in figures.items())
        print(f"{name:16} {accuracy}  PSNR {decibels or float('inf'):.1f} dB  {seconds:.0f} s", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**report, "gpu": "not run on a GPU"}, indent=1) + "\n")


if __name__ == "__main__":
    main()
