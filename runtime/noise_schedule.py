"""The noise schedule a checkpoint was trained with, read from diffusers' `scheduler_config.json`.

The tables carry diffusers' float32 roundings (`betas.py`), kept as float64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from .betas import BetaFormula, alphas_cumprod_from_betas, betas_from_formula, rescale_zero_terminal_snr
from .errors import ConfigError

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
BetaSchedule = Literal[BetaFormula, "trained_betas"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]
SigmaSpacing = Literal[
    "timesteps", "karras", "exponential", "beta", "lu_lambdas", "flow", "sgm_uniform", "ays", "ays_sdxl"
]
FinalSigmas = Literal["zero", "sigma_min"]

FloatArray = npt.NDArray[np.float64]

# diffusers gives the last sigma of a schedule with zero terminal SNR this alpha_cumprod, fp16's smallest number.
_ZERO_SNR_FLOOR = 2.0**-24


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseSchedule:
    """How much noise a training timestep holds, what the model predicts, and how steps are spaced by default.

    Attributes:
        betas: noise added at each training timestep, (num_train_timesteps,), float32.
        rescale_betas_zero_snr: whether the last timestep is pure noise: Lin et al. 2023 (arXiv 2305.08891).
        prediction_type: what the model's output is.
        beta_schedule: where the betas came from; diffusers rounds the timesteps of a cosine schedule differently.
        timestep_spacing: Table 2 of Lin et al. 2023; None takes the sampler's own default.
        sigma_spacing: noise levels at the spaced timesteps, or spread between the extremes by another rule.
        steps_offset: added to the timesteps of the leading spacing.
        final_sigmas_type: end at sigma 0, or at the lowest sigma trained on.
        options: what else the config holds, for the sampler that knows it.
        class_name: diffusers' scheduler class of the config; None if it does not say.
    """

    betas: npt.NDArray[np.float32]
    rescale_betas_zero_snr: bool = False
    prediction_type: PredictionType = "epsilon"
    beta_schedule: BetaSchedule = "linear"
    timestep_spacing: TimestepSpacing | None = None
    sigma_spacing: SigmaSpacing = "timesteps"
    steps_offset: int = 0
    final_sigmas_type: FinalSigmas = "zero"
    options: Mapping[str, Any] = field(default_factory=dict)
    class_name: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read diffusers' `scheduler_config.json`.

        Options of a sampler are kept and checked when one is chosen: those of other classes do not matter to it.

        Raises:
            ConfigError: if a value is not supported or an option is unknown; its name and value are in the message.
        """
        for name, value in config.items():
            if not name.startswith("_") and name not in _READ and name not in SOLVER_OPTIONS:
                raise ConfigError(
                    f"{name}: expected an option of a known scheduler, got {value!r}. Remove it if unused."
                )
        class_name = config.get("_class_name")
        betas, beta_schedule = _betas(config, _CLASS_DEFAULTS.get(str(class_name), {}))
        return cls(
            betas=betas,
            rescale_betas_zero_snr=_boolean(config, "rescale_betas_zero_snr", False),
            beta_schedule=beta_schedule,
            prediction_type=_choice(config, "prediction_type", PredictionType, _predicted(class_name)),
            timestep_spacing=_choice(config, "timestep_spacing", TimestepSpacing, None),
            sigma_spacing=_sigma_spacing(config),
            steps_offset=_integer(config, "steps_offset", 0, minimum=0),
            final_sigmas_type=_choice(config, "final_sigmas_type", FinalSigmas, "zero"),
            options={name: value for name, value in config.items() if name in SOLVER_OPTIONS},
            class_name=None if class_name is None else str(class_name),
        )

    def as_read_by(self, known: Collection[str]) -> NoiseSchedule:
        """The schedule as a diffusers class with these config options sees it: it ignores those it does not have."""
        changes: dict[str, Any] = {}
        if "rescale_betas_zero_snr" not in known:
            changes["rescale_betas_zero_snr"] = False
        if "timestep_spacing" not in known:
            changes["timestep_spacing"] = None
        if "steps_offset" not in known:
            changes["steps_offset"] = 0
        if "final_sigmas_type" not in known:
            changes["final_sigmas_type"] = "zero"
        if self.sigma_spacing != "timesteps" and _FLAGS[self.sigma_spacing] not in known:
            changes["sigma_spacing"] = "timesteps"
        return self.replace(**changes) if any(getattr(self, name) != new for name, new in changes.items()) else self

    @cached_property
    def alphas_cumprod(self) -> FloatArray:
        """Share of signal power left at each training timestep, (num_train_timesteps,), falling; float32 roundings."""
        betas = rescale_zero_terminal_snr(self.betas) if self.rescale_betas_zero_snr else self.betas
        return alphas_cumprod_from_betas(betas).astype(np.float64)

    @property
    def num_train_timesteps(self) -> int:
        """How many timesteps the model was trained on, usually 1000."""
        return len(self.betas)

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


# What this module reads of a config.
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
        "use_beta_sigmas",
        "use_lu_lambdas",
        "use_flow_sigmas",
        "final_sigmas_type",
    }
)

SOLVER_OPTIONS = frozenset(
    {
        "algorithm_type",
        "base_image_seq_len",
        "base_shift",
        "clip_sample",
        "clip_sample_range",
        "corrector_order",
        "disable_corrector",
        "dynamic_thresholding_ratio",
        "euler_at_final",
        "flow_shift",
        "interpolation_type",
        "invert_sigmas",
        "lambda_min_clipped",
        "lower_order_final",
        "max_image_seq_len",
        "max_shift",
        "noise_sampler_seed",
        "original_inference_steps",
        "predict_x0",
        "predictor_order",
        "rho",
        "sample_max_value",
        "set_alpha_to_one",
        "shift",
        "shift_terminal",
        "sigma_data",
        "sigma_max",
        "sigma_min",
        "sigma_schedule",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "stochastic_sampling",
        "tau_func",
        "thresholding",
        "time_shift_type",
        "timestep_scaling",
        "timestep_type",
        "use_dynamic_shifting",
        "variance_type",
    }
)
"""Options of one or the other sampler; `sampler_names` says which, with their defaults."""

# Where a class of diffusers has other defaults than DDPM's 0.0001, 0.02 and linear. A saved config always holds them.
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "HeunDiscreteScheduler": _SD_BETAS,
    "KDPM2DiscreteScheduler": _SD_BETAS,
    "KDPM2AncestralDiscreteScheduler": _SD_BETAS,
    "DPMSolverSDEScheduler": _SD_BETAS,
    "LCMScheduler": {**_SD_BETAS, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {**_SD_BETAS, "beta_schedule": "scaled_linear"},
}

_FLAGS: Mapping[str, str] = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu_lambdas": "use_lu_lambdas",
    "flow": "use_flow_sigmas",
}


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


def _predicted(class_name: Any) -> PredictionType:
    """What a model predicts whose config does not say: rectified flows have no such option."""
    return "flow_prediction" if str(class_name).startswith("FlowMatch") else "epsilon"


def _sigma_spacing(config: Mapping[str, Any]) -> SigmaSpacing:
    chosen = [spacing for spacing, name in _FLAGS.items() if _boolean(config, name, False)]
    if len(chosen) > 1:
        first, second = (_FLAGS[spacing] for spacing in chosen[:2])
        raise ConfigError(f"{second}: expected false beside {first}, got true. Keep one.")
    return cast(SigmaSpacing, chosen[0]) if chosen else "timesteps"


def _betas(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[npt.NDArray[np.float32], BetaSchedule]:
    count = _integer(config, "num_train_timesteps", 1000, minimum=2)
    trained = config.get("trained_betas")
    if trained is not None:
        return _trained_betas(trained, count), "trained_betas"
    formula = _choice(config, "beta_schedule", BetaFormula, defaults.get("beta_schedule", "linear"))
    start = _beta(config, "beta_start", defaults.get("beta_start", 0.0001))
    return betas_from_formula(formula, start, _beta(config, "beta_end", defaults.get("beta_end", 0.02)), count), formula


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
