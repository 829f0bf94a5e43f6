"""Every sampler through the whole pipeline, with guidance and without, beside diffusers and beside its own U-Net."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_oracle import (
    BOUND,
    compare,
    diffusers_pipeline,
    record_diffusers,
    record_ours,
    relative_l2,
    watched,
)

from latentrt.runtime import Pipeline
from latentrt.runtime.brownian import BrownianNoise
from latentrt.runtime.model_facts import Schedules
from latentrt.runtime.noise import batch_noise
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.parametrisation import Array
from latentrt.runtime.sampler_loop import Evaluation, drive
from latentrt.runtime.sampler_names import SAMPLERS, resolve_sampler
from latentrt.runtime.sampling_plan import plan_sampling, start_sampler

PROMPT = "a small red circle on a blue background"
SIZE: dict[str, Any] = {"height": 64, "width": 64}
STEPS = 5

# Our name, and the options that make diffusers' class do the same. Samplers that diffusers lacks, or has for models
# of another kind (EDM, flows, iPLMS), are held to their own steps around diffusers' U-Net.
DIFFUSERS: dict[str, dict[str, Any]] = {
    "DDIM": {"clip_sample": False},
    "PLMS": {},
    "DDPM": {"clip_sample": False},
    "LCM": {},
    "TCD": {},
    "Euler": {},
    "Euler a": {},
    "Heun": {},
    "DPM2": {},
    "DPM2 a": {},
    "LMS": {},
    "DPM++ SDE": {"noise_sampler_seed": 11},
    "DPM++ 2M": {},
    "DPM++ 3M": {"solver_order": 3},
    # diffusers refuses these down to sigma 0, and gives NaN there for bh1.
    "DPM-Solver 1": {"algorithm_type": "dpmsolver", "solver_order": 1, "final_sigmas_type": "sigma_min"},
    "DPM-Solver 2": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    "DPM-Solver 3": {"algorithm_type": "dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"},
    "DPM++ 2S": {"lower_order_final": True},
    "DPM++ 3S": {"solver_order": 3, "lower_order_final": True},
    "DEIS": {},
    "UniPC": {},
    "UniPC bh1": {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    "UniPC bh2": {"solver_type": "bh2"},
    "SA-Solver": {},
}
OWN = [
    spec.label
    for spec in SAMPLERS
    if spec.label not in DIFFUSERS and spec.space in ("vp", "ve") and spec.name != "iplms"
]


@pytest.fixture(scope="module")
def reference(shapes_checkpoint: Path) -> Any:
    return diffusers_pipeline(shapes_checkpoint)


@pytest.fixture(scope="module")
def ours(shapes_bundle: Path) -> Pipeline:
    return Pipeline.load(shapes_bundle, precision="fp32")


def test_no_sampler_is_left_out() -> None:
    labels = {spec.label for spec in SAMPLERS}
    assert set(DIFFUSERS) <= labels
    assert labels - set(DIFFUSERS) - set(OWN) == {"EDM Euler", "EDM DPM++ 2M", "Flow Euler", "Flow Heun", "iPLMS"}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_by_name_and_unguided(name: str, ours: Pipeline, reference: Any) -> None:
    """One row a picture, where a runtime that writes the U-Net's output over its input returns noise."""
    spec, options = resolve_sampler(name), DIFFUSERS[name]
    wanted = record_diffusers(
        reference, spec.scheduler, options, prompt=PROMPT, num_inference_steps=STEPS, guidance_scale=1.0, seed=11,
        **SIZE,
    )  # fmt: skip
    ending = {name: value for name, value in options.items() if name == "final_sigmas_type"}
    pipe = configured(ours, {**dict(reference.scheduler.config), **ending})
    with watched(pipe, "unet") as unet:
        found = record_ours(pipe, PROMPT, sampler=name, steps=STEPS, guidance=1.0, seed=11, **SIZE)
    assert set(unet.rows) == {1}
    compare(found, wanted)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_by_config_and_guided(name: str, ours: Pipeline, reference: Any) -> None:
    """The scheduler_config.json that diffusers would write selects the sampler and its options."""
    spec, options = resolve_sampler(name), DIFFUSERS[name]
    wanted = record_diffusers(
        reference, spec.scheduler, options, prompt=PROMPT, num_inference_steps=STEPS, guidance_scale=4.0, seed=12,
        **SIZE,
    )  # fmt: skip
    pipe = configured(ours, scheduler_config(reference, spec.scheduler, options))
    with watched(pipe, "unet") as unet:
        found = record_ours(pipe, PROMPT, steps=STEPS, guidance=4.0, seed=12, **SIZE)
    assert set(unet.rows) == {2}
    compare(found, wanted)


@pytest.mark.parametrize("name", OWN)
def test_those_that_diffusers_lacks(name: str, ours: Pipeline, reference: Any) -> None:
    """The sampler's own steps around diffusers' U-Net, without the pipeline: rows, noise and text are right."""
    import torch

    spec = resolve_sampler(name)
    with torch.no_grad():
        embeds, _ = reference.encode_prompt(PROMPT, "cpu", 1, False)

    def predict(evaluation: Evaluation) -> Array:
        sample, timestep = torch.from_numpy(evaluation.sample), torch.tensor(evaluation.timestep)
        with torch.no_grad():
            output: Array = reference.unet(sample, timestep, encoder_hidden_states=embeds).sample.numpy()
        return output

    plan = plan_sampling(ours.model.schedules.of(spec), spec, STEPS)
    noise, shape = batch_noise(11, 1), (1, 4, 8, 8)
    latents = noise(shape) * np.float32(plan.init_noise_sigma)
    levels = [step.sigma for step in plan.steps]
    brownian = BrownianNoise([11], shape, min(levels), max(levels)) if spec.brownian else None
    wanted = [step.latents for step in drive(start_sampler(plan, latents, noise=noise, brownian=brownian), predict)]
    found = record_ours(ours, PROMPT, sampler=name, steps=STEPS, guidance=1.0, seed=11, **SIZE)
    errors = [relative_l2(a, b) for a, b in zip(found.latents, wanted, strict=True)]
    assert max(errors) <= BOUND, errors


def test_the_checkpoints_own_scheduler(ours: Pipeline, reference: Any) -> None:
    """Nothing chosen: PNDM, as the checkpoint's config says."""
    wanted = record_diffusers(reference, prompt=PROMPT, num_inference_steps=STEPS, seed=11, **SIZE)
    compare(record_ours(ours, PROMPT, steps=STEPS, seed=11, **SIZE), wanted)


@pytest.mark.parametrize("name", ["DPM++ 2M SDE", "DPM++ SDE", "DPM++ 3M SDE", "Euler a", "PLMS", "UniPC", "Heun"])
def test_a_single_step(name: str, ours: Pipeline) -> None:
    """There is no path between two noise levels to draw a Brownian motion over, and no history."""
    result = ours(PROMPT, sampler=name, steps=1, guidance=1.0, seed=11, **SIZE)
    assert np.isfinite(result.latents).all()


def configured(pipe: Pipeline, config: dict[str, Any]) -> Pipeline:
    """The pipeline of a bundle with another scheduler_config.json."""
    schedule = NoiseSchedule.from_config(config)
    model = dataclasses.replace(
        pipe.model, schedules=Schedules(own=schedule, other=schedule), default_sampler=config["_class_name"]
    )
    return dataclasses.replace(pipe, model=model)


def scheduler_config(pipe: Any, scheduler: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """What `save_pretrained` of the scheduler would write."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(diffusers, str(scheduler)).from_config(pipe.scheduler.config, **options)
    config: dict[str, Any] = json.loads(made.to_json_string())
    return config
