"""Host time per step of each sampler beside diffusers' scheduler in the same run, without a model.

    python benchmarks/bench_samplers.py [--batch 1] [--size 64] [--steps 20] [--repeats 30] [--json]

What is timed is all that happens between two calls of the U-Net: input scaling and the step. `--size` is that of the
latent. The two sides take turns, so that both see the same machine; the figure is the median over all steps of all
repeats, which a busy machine's pauses of milliseconds do not reach.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import diffusers
import numpy as np
import torch

from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.parametrisation import Array
from latentrt.runtime.sampler_loop import drive
from latentrt.runtime.sampler_names import SAMPLERS, SamplerSpec
from latentrt.runtime.sampling_plan import plan_sampling, start_sampler

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading"}


def ours(spec: SamplerSpec, latents: Array, steps: int) -> Callable[[], list[float]]:
    plan = plan_sampling(NoiseSchedule.from_config(CONFIG), spec, steps)
    noise = np.ones_like(latents)
    options: dict[str, Any] = {"noise": lambda _: noise} if spec.eta else {}

    def run() -> list[float]:
        sampler = start_sampler(plan, latents, **options)
        ticks = [time.perf_counter()]
        ticks += [time.perf_counter() for _ in drive(sampler, lambda _: latents)]
        return np.diff(ticks).tolist()

    return run


def theirs(spec: SamplerSpec, latents: Array, steps: int) -> Callable[[], list[float]]:
    options = {"plms": {"skip_prk_steps": True}, "ddim": {"clip_sample": False}}.get(spec.name, {})
    scheduler = getattr(diffusers, spec.scheduler)(**CONFIG, **options)
    output = torch.from_numpy(latents)

    def run() -> list[float]:
        scheduler.set_timesteps(steps)
        sample = output
        ticks = [time.perf_counter()]
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
            ticks.append(time.perf_counter())
        return np.diff(ticks).tolist()

    return run


def measure(spec: SamplerSpec, latents: Array, *, steps: int, repeats: int) -> dict[str, Any]:
    sides = ours(spec, latents, steps), theirs(spec, latents, steps)
    for side in sides:
        side()
    runs = [[side() for side in sides] for _ in range(repeats)]
    latentrt, reference = (statistics.median(chain(*column)) * 1e6 for column in zip(*runs, strict=True))
    return {
        "sampler": spec.label,
        "latentrt_us": round(latentrt, 1),
        "diffusers_us": round(reference, 1),
        "ratio": round(reference / latentrt, 2),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "__array__ implementation")
    shape = (options.batch, 4, options.size, options.size)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    rows = [measure(spec, latents, steps=options.steps, repeats=options.repeats) for spec in SAMPLERS]
    if options.json:
        versions = {"numpy": np.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
        print(json.dumps({"shape": shape, "threads": torch.get_num_threads(), "versions": versions, "rows": rows}))
        return 0
    print(f"host time per step, latents {'x'.join(map(str, shape))}, {torch.get_num_threads()} torch thread(s)")
    print(f"{'sampler':<12}{'latentrt us':>13}{'diffusers us':>14}{'ratio':>8}")
    for row in rows:
        print(f"{row['sampler']:<12}{row['latentrt_us']:>13}{row['diffusers_us']:>14}{row['ratio']:>8}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
