"""k-diffusion's samplers: variance exploding latents, steps between sigmas."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from .errors import ConfigError
from .noise_schedule import NoiseSchedule
from .parametrisation import Parametrisation
from .sampler_options import Option, number, one_of, whole
from .sampler_spec import CHURN, CLIPPING, SIGMA_READS, SamplerSpec, correction_of, with_churn, with_eta
from .solver_dpm2 import dpm2, dpm2_ancestral
from .solver_dpm_fast import dpm_fast, dpm_fast_steps
from .solver_euler import euler, euler_ancestral
from .solver_heun import heun, restart
from .solver_lms import lms
from .solver_sde import dpmpp_2s_ancestral, dpmpp_3m_sde, dpmpp_sde
from .steps import sigma_steps
from .steps_edm import EDM_OPTIONS, edm_model, edm_steps
from .steps_k import euler_steps, restart_steps

# Levels below would be equal in float32 beside those above.
_LEAST_SIGMA = 1e-6

_ANCESTRAL: Mapping[str, Option] = {
    "eta": number(1.0, 0, 1, in_config=False),
    "s_noise": number(1.0, 0, in_config=False),
}


def _with_restarts(options: Mapping[str, Any]) -> bool:
    return bool(options["restart_list"] != {})


def _model(schedule: NoiseSchedule, _options: Mapping[str, Any]) -> Parametrisation:
    if schedule.prediction_type == "flow_prediction":
        raise ConfigError(
            "prediction_type: expected epsilon, v_prediction or sample for variance exploding latents, got "
            "flow_prediction. Choose a sampler for rectified flow, such as Euler's for flow matching."
        )
    return Parametrisation("ve", schedule.prediction_type)


_variance_exploding = partial(SamplerSpec, space="ve", model=_model)

K_SAMPLERS: tuple[SamplerSpec, ...] = (
    _variance_exploding(
        name="euler",
        label="Euler",
        scheduler="EulerDiscreteScheduler",
        solver=euler,
        steps=euler_steps,
        reads=SIGMA_READS | {"rescale_betas_zero_snr", "final_sigmas_type"},
        options={
            **CHURN,
            "sigma_min": number(None, _LEAST_SIGMA, to="steps"),
            "sigma_max": number(None, _LEAST_SIGMA, to="steps"),
            "interpolation_type": one_of("linear", "log_linear", to="steps"),
            "timestep_type": one_of("discrete", "continuous", to="steps"),
        },
        takes_noise=with_churn,
    ),
    _variance_exploding(
        name="euler_ancestral",
        label="Euler a",
        scheduler="EulerAncestralDiscreteScheduler",
        solver=euler_ancestral,
        steps=sigma_steps,
        reads=frozenset({"timestep_spacing", "steps_offset", "rescale_betas_zero_snr"}),
        options=_ANCESTRAL,
        takes_noise=with_eta,
    ),
    _variance_exploding(
        name="heun",
        label="Heun",
        scheduler="HeunDiscreteScheduler",
        solver=heun,
        steps=sigma_steps,
        quantity="epsilon",
        reads=SIGMA_READS,
        options={**CHURN, **CLIPPING},
        correction=correction_of,
        takes_noise=with_churn,
    ),
    _variance_exploding(
        name="dpm_2",
        label="DPM2",
        scheduler="KDPM2DiscreteScheduler",
        aliases=("k_dpm_2",),
        solver=dpm2,
        steps=partial(sigma_steps, karras_rounds=True),
        quantity="epsilon",
        reads=SIGMA_READS,
        options=CHURN,
        takes_noise=with_churn,
    ),
    _variance_exploding(
        name="dpm_2_ancestral",
        label="DPM2 a",
        scheduler="KDPM2AncestralDiscreteScheduler",
        aliases=("k_dpm_2_a", "k_dpm_2_ancestral"),
        solver=dpm2_ancestral,
        steps=partial(sigma_steps, karras_rounds=True),
        quantity="epsilon",
        reads=SIGMA_READS,
        options=_ANCESTRAL,
        takes_noise=with_eta,
    ),
    _variance_exploding(
        name="lms",
        label="LMS",
        scheduler="LMSDiscreteScheduler",
        solver=lms,
        steps=sigma_steps,
        quantity="epsilon",
        reads=SIGMA_READS,
        options={"order": whole(4, 1, in_config=False)},
    ),
    _variance_exploding(
        name="dpmpp_2s_ancestral",
        label="DPM++ 2S a",
        scheduler=None,
        aliases=("dpmpp_2s_a",),
        solver=dpmpp_2s_ancestral,
        steps=sigma_steps,
        reads=SIGMA_READS,
        options=_ANCESTRAL,
        takes_noise=with_eta,
    ),
    _variance_exploding(
        name="dpmpp_sde",
        label="DPM++ SDE",
        scheduler="DPMSolverSDEScheduler",
        solver=dpmpp_sde,
        steps=sigma_steps,
        reads=SIGMA_READS,
        options={
            **_ANCESTRAL,
            "r": number(0.5, 0.01, 1, in_config=False),
            "noise_sampler_seed": whole(None, 0, to="noise"),
        },
        takes_noise=with_eta,
        brownian=True,
    ),
    _variance_exploding(
        name="dpmpp_3m_sde",
        label="DPM++ 3M SDE",
        scheduler=None,
        solver=dpmpp_3m_sde,
        steps=sigma_steps,
        reads=SIGMA_READS,
        options=_ANCESTRAL,
        takes_noise=with_eta,
        brownian=True,
    ),
    _variance_exploding(
        name="dpm_fast",
        label="DPM fast",
        scheduler=None,
        solver=dpm_fast,
        steps=dpm_fast_steps,
        quantity="epsilon",
        spacings=(),
        options={**_ANCESTRAL, "eta": number(0.0, 0, 1, in_config=False)},
        takes_noise=with_eta,
    ),
    _variance_exploding(
        name="restart",
        label="Restart",
        scheduler=None,
        solver=restart,
        steps=restart_steps,
        quantity="epsilon",
        reads=SIGMA_READS,
        options={
            "restart_list": Option(default=None, to="steps", in_config=False),
            "s_noise": number(1.0, 0, in_config=False),
        },
        takes_noise=_with_restarts,
    ),
    SamplerSpec(
        name="edm_euler",
        label="EDM Euler",
        scheduler="EDMEulerScheduler",
        solver=euler,
        steps=edm_steps,
        space="edm",
        reads=frozenset({"final_sigmas_type"}),
        spacings=("karras", "exponential"),
        options={**CHURN, **EDM_OPTIONS},
        model=edm_model,
        takes_noise=with_churn,
    ),
)
