"""Names of samplers and spacings, and the plan made from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from latentrt.runtime.errors import ConfigError, UsageError
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.sampler_names import SAMPLERS, resolve_sampler, resolve_schedule
from latentrt.runtime.sampling_plan import plan_sampling, start_sampler

SCHEDULE = NoiseSchedule.from_config(
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
)


@pytest.mark.parametrize(
    ("name", "expected", "schedule"),
    [
        ("DPM++ 2M", "dpmpp_2m", None),
        ("dpm++ 2m", "dpmpp_2m", None),
        ("dpmpp_2m", "dpmpp_2m", None),
        ("sample_dpmpp_2m", "dpmpp_2m", None),
        ("DPMSolverMultistepScheduler", "dpmpp_2m", None),
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("DPM++ 2M Exponential", "dpmpp_2m", "exponential"),
        ("dpmpp_2m_karras", "dpmpp_2m", "karras"),
        ("Euler a", "euler_ancestral", None),
        ("Euler A", "euler_ancestral", None),
        ("euler_ancestral", "euler_ancestral", None),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral", None),
        ("Euler", "euler", None),
        ("EulerDiscreteScheduler", "euler", None),
        ("DDIM", "ddim", None),
        ("DDIMScheduler", "ddim", None),
        ("PLMS", "plms", None),
        ("pndm", "plms", None),
        ("PNDMScheduler", "plms", None),
    ],
)
def test_spellings(name: str, expected: str, schedule: str | None) -> None:
    spec = resolve_sampler(name)
    assert (spec.name, spec.schedule) == (expected, schedule)


A1111 = (
    "DPM++ 2M;DPM++ SDE;DPM++ 2M SDE;DPM++ 2M SDE Heun;DPM++ 2S a;DPM++ 3M SDE;Euler a;Euler;LMS;Heun;DPM2;DPM2 a;"
    "DPM fast;Restart;DDIM;PLMS;UniPC;LCM"
)
COMFYUI = (
    "euler;euler_ancestral;heun;dpm_2;dpm_2_ancestral;lms;dpm_fast;dpmpp_2s_ancestral;dpmpp_sde;dpmpp_sde_gpu;dpmpp_2m;"
    "dpmpp_2m_sde;dpmpp_2m_sde_gpu;dpmpp_2m_sde_heun;dpmpp_3m_sde;dpmpp_3m_sde_gpu;ddpm;lcm;ipndm;deis;sa_solver;ddim;"
    "uni_pc;uni_pc_bh2"
)
K_DIFFUSION = "sample_euler;sample_heun;sample_dpm_2;sample_lms;sample_dpmpp_2s_ancestral;sample_dpmpp_3m_sde;k_heun"
DIFFUSERS = (
    "DDPM;DDIM;PNDM;LMSDiscrete;EulerDiscrete;EulerAncestralDiscrete;HeunDiscrete;KDPM2Discrete;KDPM2AncestralDiscrete;"
    "DPMSolverMultistep;DPMSolverSinglestep;DPMSolverSDE;DEISMultistep;UniPCMultistep;IPNDM;SASolver;LCM;TCD;EDMEuler;"
    "EDMDPMSolverMultistep;FlowMatchEulerDiscrete;FlowMatchHeunDiscrete"
)


@pytest.mark.parametrize("name", [*A1111.split(";"), *COMFYUI.split(";"), *K_DIFFUSION.split(";")])
def test_the_names_of_the_web_uis(name: str) -> None:
    assert resolve_sampler(name).name


@pytest.mark.parametrize("name", DIFFUSERS.split(";"))
def test_the_classes_of_diffusers(name: str) -> None:
    assert resolve_sampler(f"{name}Scheduler").scheduler == f"{name}Scheduler"


def test_no_name_stands_for_two_samplers() -> None:
    names = [spec.name for spec in SAMPLERS]
    assert len(set(names)) == len(names)
    for spec in SAMPLERS:
        for spelling in (spec.name, spec.label, *spec.aliases):
            assert resolve_sampler(spelling).name == spec.name, spelling


def test_a_name_stands_for_its_own_method_and_a_class_for_what_its_config_says() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    schedule = NoiseSchedule.from_config(config)
    by_class = plan_sampling(schedule, resolve_sampler("DPMSolverMultistepScheduler"), 5).options
    assert (by_class["algorithm_type"], by_class["solver_order"]) == ("sde-dpmsolver++", 3)
    by_name = plan_sampling(schedule, resolve_sampler("DPM++ 2M"), 5)
    assert (by_name.options["algorithm_type"], by_name.options["solver_order"]) == ("dpmsolver++", 2)
    assert not by_name.takes_noise


@pytest.mark.parametrize(
    ("name", "near"),
    [("DPM++ 2N", "DPM++ 2M"), ("eular", "Euler"), ("DDIN", "DDIM"), ("euler ancestrel", "Euler a"), ("", "DDIM")],
)
def test_an_unknown_sampler_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=r"^sampler: expected one of ") as caught:
        resolve_sampler(name)
    first_sentence = str(caught.value).split(", got ")[0]
    assert near in first_sentence
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("karras", "karras"), ("Karras", "karras"), ("leading", "leading"), ("default", None), ("Automatic", None)],
)
def test_schedules(name: str, expected: str | None) -> None:
    assert resolve_schedule(name) == expected
    assert resolve_schedule(None) is None


def test_an_unknown_schedule_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"^schedule: expected one of karras.*, got 'karas'"):
        resolve_schedule("karas")


@pytest.mark.parametrize("spec", SAMPLERS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("count", [0, -1, 1001, 2.5, True, math.nan, "20", None])
def test_an_impossible_number_of_steps_is_refused(spec: Any, count: Any) -> None:
    with pytest.raises(UsageError, match=r"^num_inference_steps: expected a whole number from 1 to 1000, got "):
        plan_sampling(SCHEDULE, spec, count)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "euler"])
def test_an_offset_beyond_the_last_timestep_is_refused(sampler: str) -> None:
    with pytest.raises(UsageError, match=r"^num_inference_steps: expected timesteps up to 999, got 1000"):
        plan_sampling(SCHEDULE, resolve_sampler(sampler), 1000, spacing="leading")


# Restart goes back up between its steps, in a way of its own.
@pytest.mark.parametrize(
    "spec", [s for s in SAMPLERS if "leading" in s.spacings and s.name != "restart"], ids=lambda spec: spec.name
)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
# 61 and 995 are among the counts for which arange(1000, 0, -1000 / count) is one too long.
@pytest.mark.parametrize("count", [1, 3, 61, 333, 995])
def test_steps_fall_and_stay_inside_the_training_range(spec: Any, spacing: str, count: int) -> None:
    steps = plan_sampling(SCHEDULE, spec, count, spacing=spacing).steps
    again = 1 if spec.name == "plms" and count > 1 else 0
    assert [step.index for step in steps] == list(range(count + again))
    # PLMS visits its second timestep twice.
    timesteps = list(dict.fromkeys(step.timestep for step in steps))
    assert len(timesteps) == count
    assert all(0 <= t <= 999 for t in timesteps)
    assert timesteps == sorted(timesteps, reverse=True)
    assert all(step.sigma_next <= step.sigma for step in steps)


@pytest.mark.parametrize("sampler", ["DDIM", "PLMS"])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_ddim_and_plms_refuse_a_spacing_of_sigmas(sampler: str, spacing: str) -> None:
    with pytest.raises(
        UsageError, match=rf"^schedule: expected leading, linspace or trailing for {sampler}, got {spacing}"
    ):
        plan_sampling(SCHEDULE, resolve_sampler(sampler), 10, spacing=spacing)


def test_a_spacing_asked_for_goes_before_the_one_in_the_name() -> None:
    spec = resolve_sampler("DPM++ 2M Karras")
    assert plan_sampling(SCHEDULE, spec, 10).schedule.sigma_spacing == "karras"
    assert plan_sampling(SCHEDULE, spec, 10, spacing="trailing").schedule.sigma_spacing == "timesteps"
    assert plan_sampling(SCHEDULE, spec, 10, spacing="default").schedule.sigma_spacing == "karras"


def test_epsilon_cannot_start_from_pure_noise() -> None:
    schedule = NoiseSchedule.from_config({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"})
    with pytest.raises(ConfigError, match=r"^prediction_type: expected v_prediction for DDIM"):
        plan_sampling(schedule, resolve_sampler("DDIM"), 10)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("Euler a", {}, "^noise: expected a source of noise for Euler a"),
        ("DDIM", {"eta": 0.5}, "^noise: expected a source of noise for DDIM"),
        ("DDIM", {"eta": -0.1}, "^eta: expected a number from 0 to 1, got -0.1"),
        ("DDIM", {"eta": math.nan}, "^eta: expected a number from 0 to 1, got nan"),
        ("Euler", {"eta": 0.0}, "^eta: expected an option of Euler"),
    ],
)
def test_options_that_do_not_fit_are_refused(sampler: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        start_sampler(plan_sampling(SCHEDULE, resolve_sampler(sampler), 4, options=options), np.ones((1, 4, 8, 8)))
