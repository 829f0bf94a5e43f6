"""DEIS, UniPC and SA-Solver: exponential Adams methods, over the same latents as DPM-Solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .dpm_options import LAMBDA_MIN, SHIFT, SHIFTING, VARIANCE, dpm_model
from .errors import ConfigError
from .noise_schedule import NoiseSchedule
from .parametrisation import Parametrisation
from .sampler_loop import Correction
from .sampler_options import Option, flag, number, one_of, only, whole
from .sampler_spec import SIGMA_READS, THRESHOLDING, SamplerSpec, correction_of
from .solver_deis import deis
from .solver_sa import sa_solver
from .solver_unipc import unipc
from .steps_dpm import deis_steps, unipc_steps

_DEIS = SamplerSpec(
    name="deis",
    label="DEIS",
    scheduler="DEISMultistepScheduler",
    solver=deis,
    steps=deis_steps,
    space="vp",
    takes_levels=True,
    reads=SIGMA_READS | {"use_flow_sigmas"},
    model=dpm_model,
    correction=correction_of,
    options={
        **THRESHOLDING,
        **SHIFTING,
        "algorithm_type": only("deis", aliases={"dpmsolver": "deis", "dpmsolver++": "deis"}),
        "solver_order": whole(2, 1, 3),
        "solver_type": only(
            "logrho", aliases={"midpoint": "logrho", "heun": "logrho", "bh1": "logrho", "bh2": "logrho"}
        ),
        "lower_order_final": flag(True),
    },
)


def _data_correction(options: Mapping[str, Any]) -> Correction | None:
    # diffusers' UniPC thresholds only the denoised latents that it integrates.
    return correction_of(options) if options["predict_x0"] else None


def _unipc_model(schedule: NoiseSchedule, options: Mapping[str, Any]) -> Parametrisation:
    disabled = options["disable_corrector"]
    if not isinstance(disabled, list | tuple) or any(isinstance(i, bool) or not isinstance(i, int) for i in disabled):
        raise ConfigError(
            f"disable_corrector: expected a list of step indices, got {disabled!r}. Write [] to correct every step."
        )
    return dpm_model(schedule, options)


_UNIPC = SamplerSpec(
    name="uni_pc",
    label="UniPC",
    scheduler="UniPCMultistepScheduler",
    solver=unipc,
    steps=unipc_steps,
    space="vp",
    takes_levels=True,
    reads=SIGMA_READS | {"use_flow_sigmas", "final_sigmas_type", "rescale_betas_zero_snr"},
    model=_unipc_model,
    correction=_data_correction,
    options={
        **THRESHOLDING,
        **SHIFTING,
        "time_shift_type": one_of("exponential", "linear", to="steps"),
        "shift_terminal": number(None, 0, 1, to="steps"),
        "sigma_min": number(None, 0, to="steps"),
        "sigma_max": number(None, 0, to="steps"),
        "solver_order": whole(2, 1, 4),
        "solver_type": one_of("bh2", "bh1", aliases={"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}),
        "predict_x0": flag(True),
        "lower_order_final": flag(True),
        "disable_corrector": Option(default=()),
        "solver_p": only(None),
    },
)


def _sa_model(schedule: NoiseSchedule, options: Mapping[str, Any]) -> Parametrisation:
    tau_func = options["tau_func"]
    if tau_func is not None and not callable(tau_func):
        raise ConfigError(f"tau_func: expected a function of the timestep, got {tau_func!r}. Leave it out, or set tau.")
    return dpm_model(schedule, options)


_SA = SamplerSpec(
    name="sa_solver",
    label="SA-Solver",
    scheduler="SASolverScheduler",
    solver=sa_solver,
    steps=deis_steps,
    space="vp",
    takes_levels=True,
    takes_noise=lambda options: options["tau_func"] is not None or bool(options["tau"] > 0),
    reads=SIGMA_READS | {"use_flow_sigmas"},
    model=_sa_model,
    correction=correction_of,
    options={
        **THRESHOLDING,
        "flow_shift": SHIFT,
        "predictor_order": whole(2, 1, 4),
        "corrector_order": whole(2, 1, 4),
        "algorithm_type": one_of("data_prediction", "noise_prediction"),
        "lower_order_final": flag(True),
        "tau_func": Option(default=None),
        "tau": number(1.0, 0, in_config=False),
        "lambda_min_clipped": LAMBDA_MIN,
        "variance_type": VARIANCE,
    },
)


ADAMS_SAMPLERS: tuple[SamplerSpec, ...] = (
    _DEIS,
    _UNIPC,
    replace(_UNIPC, name="uni_pc_bh1", label="UniPC bh1", aliases=(), preset={"solver_type": "bh1"}),
    replace(_UNIPC, name="uni_pc_bh2", label="UniPC bh2", aliases=(), preset={"solver_type": "bh2"}),
    _SA,
)
