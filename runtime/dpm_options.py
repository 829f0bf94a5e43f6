"""Options that the samplers of the DPM-Solver family share, and how they read a model's output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError
from .noise_schedule import NoiseSchedule
from .parametrisation import Parametrisation
from .sampler_options import Option, flag, number, one_of, only

LAMBDA_MIN = number(-math.inf, aliases={"-Infinity": -math.inf, "-inf": -math.inf}, to="steps")
# A model that predicts its variance has twice the channels, which no Stable Diffusion does.
VARIANCE = Option(
    default=None, choices=(None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"), to="model"
)
SHIFT = number(1.0, 0, to="steps")
SHIFTING: Mapping[str, Option] = {
    "flow_shift": SHIFT,
    "use_dynamic_shifting": flag(False, to="steps"),
    "time_shift_type": only("exponential", to="steps"),
    "mu": number(None, to="steps", in_config=False),
}
SOLVER_TYPE = one_of("midpoint", "heun", aliases={"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"})
ALGORITHM_ALIASES = {"deis": "dpmsolver++"}


def stochastic(options: Mapping[str, Any]) -> bool:
    """For `takes_noise`: whether an SDE is solved."""
    return str(options["algorithm_type"]).startswith("sde-")


def dpm_model(schedule: NoiseSchedule, options: Mapping[str, Any]) -> Parametrisation:
    """How the output is read; combinations that diffusers has no or no sensible answer to are refused here."""
    flow, prediction = schedule.sigma_spacing == "flow", schedule.prediction_type
    if prediction == "flow_prediction" and not flow:
        raise ConfigError(
            f"use_flow_sigmas: expected true for flow_prediction, got spacing {schedule.sigma_spacing}. "
            "Set it, and leave the spacing to the checkpoint."
        )
    if prediction == "v_prediction" and flow:
        raise ConfigError(
            "prediction_type: expected flow_prediction with use_flow_sigmas, got v_prediction. Correct one of them."
        )
    algorithm, order = options.get("algorithm_type"), options.get("solver_order")
    if algorithm == "sde-dpmsolver" and order == 3:
        raise ConfigError("solver_order: expected 1 or 2 for sde-dpmsolver, got 3. Choose one of these.")
    if algorithm == "sde-dpmsolver" and schedule.final_sigmas_type == "zero":
        raise ConfigError(
            "final_sigmas_type: expected sigma_min for sde-dpmsolver, got zero. Set it, or choose sde-dpmsolver++."
        )
    return Parametrisation("flow" if flow else "vp", prediction)
