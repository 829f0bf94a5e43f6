"""The noise schedule a checkpoint was trained with, read from diffusers' `scheduler_config.json`.

The tables carry diffusers' float32 roundings (`betas.py`), kept as float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from .betas import BetaFormula, alphas_cumprod_from_betas, betas_from_formula, rescale_zero_terminal_snr
from .errors import ConfigError

PredictionType = Literal["epsilon", "v_prediction", "sample"]
BetaSchedule = Literal[BetaFormula, "trained_betas"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]
SigmaSpacing = Literal["timesteps", "karras", "exponential"]
FinalSigmas = Literal["zero", "sigma_min"]

FloatArray = npt.NDArray[np.float64]

# diffusers gives the last sigma of a schedule with zero terminal SNR this alpha_cumprod, fp16's smallest number.
_ZERO_SNR_FLOOR = 2.0**-24


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """How much noise a training timestep holds, what the model predicts, and how steps are spaced by default.

    Attributes:
        alphas_cumprod: share of signal power left at each training timestep, (num_train_timesteps,), falling.
        prediction_type: what the model's output is.
        beta_schedule: where the betas came from; diffusers rounds the timesteps of a cosine schedule differently.
        timestep_spacing: Table 2 of Lin et al. 2023 (arXiv 2305.08891); None takes the sampler's own default.
        sigma_spacing: noise levels at the spaced timesteps, or spread between the extremes by another rule.
        steps_offset: added to the timesteps of the leading spacing.
        final_sigmas_type: end at sigma 0, or at the lowest sigma trained on.
        set_alpha_to_one: whether DDIM and PLMS end at alpha 1 rather than at timestep 0; None as the sampler does.
        skip_prk_steps: whether PNDM leaves out its Runge-Kutta warm-up. Without it PNDM is not supported.
        lower_order_final: whether the last of fewer than 15 DPM-Solver++ steps is of first order.
        euler_at_final: whether the last DPM-Solver++ step always is.
    """

    alphas_cumprod: FloatArray
    prediction_type: PredictionType = "epsilon"
    beta_schedule: BetaSchedule = "linear"
    timestep_spacing: TimestepSpacing | None = None
    sigma_spacing: SigmaSpacing = "timesteps"
    steps_offset: int = 0
    final_sigmas_type: FinalSigmas = "zero"
    set_alpha_to_one: bool | None = None
    skip_prk_steps: bool = True
    lower_order_final: bool = True
    euler_at_final: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read diffusers' `scheduler_config.json`.

        Raises:
            ConfigError: if a value is not supported or an option is unknown; its name and value are in the message.
        """
        _refuse_unsupported(config)
        class_name = config.get("_class_name")
        rescale = _boolean(config, "rescale_betas_zero_snr", False)
        alphas_cumprod, beta_schedule = _alphas_cumprod(config, rescale=rescale)
        set_alpha_to_one = config.get("set_alpha_to_one")
        return cls(
            alphas_cumprod=alphas_cumprod,
            beta_schedule=beta_schedule,
            prediction_type=_choice(config, "prediction_type", PredictionType, "epsilon"),
            timestep_spacing=_choice(config, "timestep_spacing", TimestepSpacing, None),
            sigma_spacing=_sigma_spacing(config),
            steps_offset=_integer(config, "steps_offset", 0, minimum=0),
            final_sigmas_type=_choice(config, "final_sigmas_type", FinalSigmas, "zero"),
            set_alpha_to_one=None if set_alpha_to_one is None else _boolean(config, "set_alpha_to_one", False),
            skip_prk_steps=_boolean(config, "skip_prk_steps", class_name != "PNDMScheduler"),
            lower_order_final=_boolean(config, "lower_order_final", True),
            euler_at_final=_boolean(config, "euler_at_final", False),
        )

    @property
    def num_train_timesteps(self) -> int:
        """How many timesteps the model was trained on, usually 1000."""
        return len(self.alphas_cumprod)

    @cached_property
    def sigmas(self) -> FloatArray:
        """Noise-to-signal ratio sqrt((1 - a) / a) of each training timestep, rising, finite; float32 roundings."""
        alphas = self.alphas_cumprod.astype(np.float32)
        if alphas[-1] == 0:
            alphas[-1] = _ZERO_SNR_FLOOR
        return cast(FloatArray, np.sqrt((np.float32(1) - alphas) / alphas).astype(np.float64))

    @cached_property
    def log_sigmas(self) -> FloatArray:
        """Natural logarithm of `sigmas`, rounded as in diffusers."""
        return cast(FloatArray, np.log(self.sigmas.astype(np.float32)).astype(np.float64))

    def sigma_to_timestep(self, sigma: float) -> float:
        """The timestep, not rounded, at which the model knows this sigma: linear in log sigma, cut at the ends."""
        log_sigma = math.log(max(sigma, 1e-10))
        low = int(np.searchsorted(self.log_sigmas, log_sigma, side="right")) - 1
        low = min(max(low, 0), len(self.log_sigmas) - 2)
        below, above = float(self.log_sigmas[low]), float(self.log_sigmas[low + 1])
        weight = min(max((below - log_sigma) / (below - above), 0.0), 1.0)
        return (1 - weight) * low + weight * (low + 1)

    def replace(self, **changes: Any) -> NoiseSchedule:
        """A copy with these attributes changed."""
        return dataclasses.replace(self, **changes)


# Options that are supported in one value only. Any other is refused by name rather than ignored.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "clip_sample": (False, None),
    "thresholding": (False, None),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    # diffusers maps the last three, of DEIS and UniPC, to midpoint when DPM-Solver++ reads them.
    "solver_type": ("midpoint", "logrho", "bh1", "bh2"),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "shift_terminal": (None,),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "lambda_min_clipped": (-math.inf, "-Infinity", "-inf", None),
    "variance_type": (None, "fixed_small"),
}

# Options that change nothing here, with the reason.
_IRRELEVANT: Mapping[str, str] = {
    "clip_sample_range": "only with clip_sample",
    "dynamic_thresholding_ratio": "only with thresholding",
    "sample_max_value": "only with thresholding",
    "flow_shift": "only with use_flow_sigmas",
    "time_shift_type": "only with use_dynamic_shifting",
    "predict_x0": "UniPC's own; no sampler here reads it",
    "disable_corrector": "UniPC's own",
    "solver_p": "UniPC's own",
    "original_inference_steps": "LCM's own",
    "timestep_scaling": "LCM's own",
    "noise_sampler_seed": "DPM++ SDE's own",
}

_READ = frozenset(
    {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
        "prediction_type",
        "timestep_spacing",
        "steps_offset",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "final_sigmas_type",
        "set_alpha_to_one",
        "skip_prk_steps",
        "lower_order_final",
        "euler_at_final",
    }
)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name.startswith("_") or name in _READ or name in _IRRELEVANT:
            continue
        if name not in _ONLY:
            raise ConfigError(f"{name}: expected an option of a known scheduler, got {value!r}. Remove it if unused.")
        if value not in _ONLY[name]:
            raise _unsupported(name, _ONLY[name][0], value)
    # diffusers' DDIM clips unless told otherwise; no other class here does.
    if config.get("_class_name") == "DDIMScheduler" and "clip_sample" not in config:
        raise _unsupported("clip_sample", False, "nothing, which means True for DDIMScheduler")


def _unsupported(name: str, expected: Any, value: Any) -> ConfigError:
    return ConfigError(
        f"{name}: expected {expected!r}, got {value!r}. This option is not supported; set it so in "
        "scheduler_config.json if the checkpoint works without."
    )


def _boolean(config: Mapping[str, Any], name: str, default: bool) -> bool:
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected true or false, got {value!r}. Correct scheduler_config.json.")
    return value


def _integer(config: Mapping[str, Any], name: str, default: int, *, minimum: int) -> int:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name}: expected an integer >= {minimum}, got {value!r}. Correct scheduler_config.json.")
    return value


def _choice(config: Mapping[str, Any], name: str, choices: Any, default: str | None) -> Any:
    value = config.get(name)
    if value is None:
        return default
    if value not in get_args(choices):
        raise ConfigError(
            f"{name}: expected one of {', '.join(get_args(choices))}, got {value!r}. No other is supported."
        )
    return value


def _sigma_spacing(config: Mapping[str, Any]) -> SigmaSpacing:
    karras = _boolean(config, "use_karras_sigmas", False)
    exponential = _boolean(config, "use_exponential_sigmas", False)
    if karras and exponential:
        raise ConfigError("use_exponential_sigmas: expected false beside use_karras_sigmas, got true. Keep one.")
    return "karras" if karras else "exponential" if exponential else "timesteps"


def _alphas_cumprod(config: Mapping[str, Any], *, rescale: bool) -> tuple[FloatArray, BetaSchedule]:
    count = _integer(config, "num_train_timesteps", 1000, minimum=2)
    trained = config.get("trained_betas")
    if trained is not None:
        schedule: BetaSchedule = "trained_betas"
        betas = _trained_betas(trained, count)
    else:
        schedule = formula = _choice(config, "beta_schedule", BetaFormula, "linear")
        betas = betas_from_formula(formula, _beta(config, "beta_start", 0.0001), _beta(config, "beta_end", 0.02), count)
    if rescale:
        betas = rescale_zero_terminal_snr(betas)
    return alphas_cumprod_from_betas(betas).astype(np.float64), schedule


def _beta(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ConfigError(f"{name}: expected a number between 0 and 1, got {value!r}. Correct scheduler_config.json.")
    return float(value)


def _trained_betas(values: Sequence[float], count: int) -> npt.NDArray[np.float32]:
    try:
        betas = np.asarray(values, np.float32)
    except (TypeError, ValueError) as err:
        raise ConfigError("trained_betas: expected a list of numbers, got other values. Correct it.") from err
    if betas.shape != (count,) or not np.all((betas > 0) & (betas <= 1)):
        raise ConfigError(
            f"trained_betas: expected {count} numbers in (0, 1], got shape {betas.shape}. "
            "It must hold one beta for each of num_train_timesteps."
        )
    return betas
