"""The DPM-Solver family: exponential integrators over the variance-preserving latent, or one of rectified flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from .dpm_options import ALGORITHM_ALIASES, LAMBDA_MIN, SHIFTING, SOLVER_TYPE, VARIANCE, dpm_model, stochastic
from .errors import ConfigError
from .noise_schedule import NoiseSchedule
from .parametrisation import Parametrisation
from .sampler_options import flag, number, one_of, only, whole
from .sampler_spec import SIGMA_READS, THRESHOLDING, SamplerSpec, correction_of, with_eta
from .sampler_specs_adams import ADAMS_SAMPLERS
from .solver_dpm import dpm_multistep
from .solver_dpm_singlestep import dpm_singlestep
from .solver_dpmpp import dpmpp_multistep
from .steps_dpm import dpm_multistep_steps, edm_multistep_steps
from .steps_edm import EDM_OPTIONS, edm_model

_MULTISTEP = SamplerSpec(
    name="dpmpp_2m",
    label="DPM++ 2M",
    scheduler="DPMSolverMultistepScheduler",
    solver=dpm_multistep,
    steps=dpm_multistep_steps,
    space="vp",
    takes_levels=True,
    takes_noise=stochastic,
    reads=SIGMA_READS | {"use_lu_lambdas", "use_flow_sigmas", "final_sigmas_type", "rescale_betas_zero_snr"},
    model=dpm_model,
    correction=correction_of,
    options={
        **THRESHOLDING,
        **SHIFTING,
        "algorithm_type": one_of(
            "dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", aliases=ALGORITHM_ALIASES
        ),
        "solver_order": whole(2, 1, 3),
        "solver_type": SOLVER_TYPE,
        "lower_order_final": flag(True),
        "euler_at_final": flag(False),
        "lambda_min_clipped": LAMBDA_MIN,
        "variance_type": VARIANCE,
    },
)


def _multistep(name: str, label: str, algorithm_type: str, solver_order: int, *aliases: str) -> SamplerSpec:
    preset = {"algorithm_type": algorithm_type, "solver_order": solver_order}
    return replace(_MULTISTEP, name=name, label=label, aliases=aliases, preset=preset)


def _multistep_sde(name: str, label: str, *aliases: str, **preset: Any) -> SamplerSpec:
    options = {
        **_MULTISTEP.options,
        "algorithm_type": only("sde-dpmsolver++"),
        "solver_order": only(2),
        "eta": number(1.0, 0, in_config=False),
        "s_noise": number(1.0, 0, in_config=False),
    }
    return replace(
        _MULTISTEP,
        name=name,
        label=label,
        aliases=aliases,
        solver=dpmpp_multistep,
        options=options,
        preset={"algorithm_type": "sde-dpmsolver++", "solver_order": 2, **preset},
        takes_noise=with_eta,
        brownian=True,
    )


_SINGLESTEP = SamplerSpec(
    name="dpmpp_2s",
    label="DPM++ 2S",
    scheduler="DPMSolverSinglestepScheduler",
    solver=dpm_singlestep,
    steps=partial(dpm_multistep_steps, karras_rounding="always"),
    space="vp",
    takes_levels=True,
    takes_noise=stochastic,
    reads=(SIGMA_READS - {"timestep_spacing", "steps_offset"}) | {"use_flow_sigmas", "final_sigmas_type"},
    model=dpm_model,
    correction=correction_of,
    options={
        **THRESHOLDING,
        **SHIFTING,
        "algorithm_type": one_of("dpmsolver++", "dpmsolver", "sde-dpmsolver++", aliases=ALGORITHM_ALIASES),
        "solver_order": whole(2, 1, 3),
        "solver_type": SOLVER_TYPE,
        "lower_order_final": flag(False),
        "lambda_min_clipped": LAMBDA_MIN,
        "variance_type": VARIANCE,
    },
)


def _edm_model(schedule: NoiseSchedule, options: Mapping[str, Any]) -> Parametrisation:
    if stochastic(options) and options["solver_order"] == 3:
        raise ConfigError("solver_order: expected 1 or 2 for sde-dpmsolver++, got 3. Choose one of these.")
    return edm_model(schedule, options)


_EDM = SamplerSpec(
    name="edm_dpmpp_2m",
    label="EDM DPM++ 2M",
    scheduler="EDMDPMSolverMultistepScheduler",
    solver=dpm_multistep,
    steps=edm_multistep_steps,
    space="edm",
    takes_levels=True,
    takes_noise=stochastic,
    reads=frozenset({"final_sigmas_type"}),
    spacings=("karras", "exponential"),
    model=_edm_model,
    correction=correction_of,
    options={
        **THRESHOLDING,
        **EDM_OPTIONS,
        "algorithm_type": one_of("dpmsolver++", "sde-dpmsolver++", aliases=ALGORITHM_ALIASES),
        "solver_order": whole(2, 1, 3),
        "solver_type": SOLVER_TYPE,
        "lower_order_final": flag(True),
        "euler_at_final": flag(False),
    },
)

DPM_SAMPLERS: tuple[SamplerSpec, ...] = (
    replace(_MULTISTEP, named={"algorithm_type": "dpmsolver++", "solver_order": 2}),
    _multistep_sde("dpmpp_2m_sde", "DPM++ 2M SDE", "dpmpp_2m_sde_gpu", solver_type="midpoint"),
    _multistep_sde("dpmpp_2m_sde_heun", "DPM++ 2M SDE Heun", "dpmpp_2m_sde_heun_gpu", solver_type="heun"),
    _multistep("dpmpp_3m", "DPM++ 3M", "dpmsolver++", 3),
    *(_multistep(f"dpm_solver_{order}", f"DPM-Solver {order}", "dpmsolver", order) for order in (1, 2, 3)),
    _SINGLESTEP,
    replace(_SINGLESTEP, name="dpmpp_3s", label="DPM++ 3S", aliases=(), preset={"solver_order": 3}),
    *ADAMS_SAMPLERS,
    _EDM,
)
