"""Host time per step of each sampler beside diffusers' scheduler of the same name, without a model.

    python benchmarks/scripts/bench_samplers.py --samplers "DPM++ 2M,UniPC" --json build/samplers.json

Both sides get the same constant array as the model's output, so all that is timed is a sampler's own arithmetic: what
the accelerator waits for between two calls of the U-Net. The two sides take turns in one run, and the ratio is of
medians over all runs: absolute times of a shared machine mean little. diffusers runs on torch with its usual number of
threads. Its schedulers of second order are called twice a step; both calls count as one step here.
"""

from __future__ import annotations

import argparse
import inspect
import json
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from latentrt.benchmarks.machine_facts import machine_facts
from latentrt.runtime.brownian import BrownianNoise
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.parametrisation import Array
from latentrt.runtime.sampler_loop import drive
from latentrt.runtime.sampler_names import SAMPLERS, resolve_sampler
from latentrt.runtime.sampler_spec import SamplerSpec
from latentrt.runtime.sampling_plan import plan_sampling, start_sampler

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
BAR, TIGHT_BAR = 2.0, 4.0
TIGHT = ("dpmpp_2m", "uni_pc")


def config_of(spec: SamplerSpec) -> dict[str, Any]:
    """The noise schedule of Stable Diffusion; DPM-Solver, unlike DPM-Solver++, cannot step to sigma 0."""
    final = "sigma_min" if spec.preset.get("algorithm_type") == "dpmsolver" else "zero"
    return {**CONFIG, "final_sigmas_type": final}


def ours(spec: SamplerSpec, latents: Array, steps: int) -> Callable[[], float]:
    plan = plan_sampling(NoiseSchedule.from_config(config_of(spec)), spec, steps)
    noise = np.ones_like(latents)
    options: dict[str, Any] = {"noise": lambda _: noise} if plan.takes_noise else {}
    # diffusers' other SDE schedulers draw independent noise; so do ours then, for like to be compared with like.
    brownian = spec.brownian and spec.scheduler == "DPMSolverSDEScheduler"
    if brownian:
        levels = [sigma for step in plan.steps for sigma in (step.sigma, step.sigma_next) if sigma > 0]

    def run() -> float:
        if brownian:
            options["brownian"] = BrownianNoise([0], latents.shape, min(levels), max(levels))
        sampler = start_sampler(plan, latents, **options)
        began = time.perf_counter()
        for _ in drive(sampler, lambda _: latents):
            pass
        return (time.perf_counter() - began) / steps

    return run


def theirs(spec: SamplerSpec, latents: Array, steps: int) -> Callable[[], float]:
    cls = getattr(diffusers, str(spec.scheduler))
    known = inspect.signature(cls.__init__).parameters
    options = {name: value for name, value in {**config_of(spec), **spec.preset}.items() if name in known}
    if "skip_prk_steps" in known:
        options["skip_prk_steps"] = True
    scheduler = cls(**options)
    output, generator = torch.from_numpy(latents), torch.Generator("cpu")
    scales = hasattr(scheduler, "scale_model_input")
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters

    def run() -> float:
        scheduler.set_timesteps(steps)
        arguments = {"generator": generator} if takes_generator else {}
        sample = output
        began = time.perf_counter()
        for timestep in scheduler.timesteps:
            if scales:
                scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(output, timestep, sample, return_dict=False, **arguments)[0]
        return (time.perf_counter() - began) / steps

    return run


def measure(spec: SamplerSpec, latents: Array, *, steps: int, repeats: int) -> dict[str, Any]:
    sides = ours(spec, latents, steps), theirs(spec, latents, steps)
    for side in sides:
        side()
    runs = [[side() for side in sides] for _ in range(repeats)]
    latentrt, reference = (statistics.median(column) * 1e6 for column in zip(*runs, strict=True))
    return {
        "sampler": spec.label,
        "scheduler": spec.scheduler,
        "latentrt_us": round(latentrt, 1),
        "diffusers_us": round(reference, 1),
        "ratio": round(reference / latentrt, 2),
        "bar": TIGHT_BAR if spec.name in TIGHT else BAR,
    }


def comparable(spec: SamplerSpec) -> bool:
    """Whether diffusers has a scheduler for it that this machine can make."""
    try:
        return spec.scheduler is not None and bool(theirs(spec, np.zeros((1, 4, 8, 8), np.float32), 4)())
    except (ImportError, TypeError, ValueError) as err:
        print(f"{spec.label}: not compared, diffusers' {spec.scheduler} cannot be made or run here: {err}"[:160])
        return False


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--samplers", help="names divided by commas; default all that diffusers has")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    shape = (options.batch, 4, options.size, options.size)
    latents = np.random.default_rng(0).standard_normal(shape, np.float32)
    named = SAMPLERS if options.samplers is None else [resolve_sampler(n) for n in options.samplers.split(",")]
    compared = [spec for spec in named if comparable(spec)]
    rows = [measure(spec, latents, steps=options.steps, repeats=options.repeats) for spec in compared]
    print(f"host time per step, latents {'x'.join(map(str, shape))}, {torch.get_num_threads()} torch thread(s)")
    print(f"{'sampler':<28}{'latentrt us':>13}{'diffusers us':>14}{'ratio':>8}{'bar':>6}")
    for row in rows:
        missed = "" if row["ratio"] >= row["bar"] else "  below the bar"
        figures = f"{row['latentrt_us']:>13}{row['diffusers_us']:>14}{row['ratio']:>8}{row['bar']:>6}"
        print(f"{row['sampler']:<28}{figures}{missed}")
    if options.json:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": machine_facts(),
            "versions": {"numpy": np.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
            "threads": torch.get_num_threads(),
            "shape": shape,
            "steps": options.steps,
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
