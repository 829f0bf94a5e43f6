"""Samplers of rectified flows: Stable Diffusion 3, Flux and other model families with a flow-matching scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError
from .noise_schedule import NoiseSchedule
from .parametrisation import Parametrisation
from .sampler_options import Option, flag, number, one_of, whole
from .sampler_spec import CHURN, SamplerSpec, with_churn
from .solver_flow import flow_euler, flow_heun
from .steps_flow import flow_steps


def _velocity(schedule: NoiseSchedule, _options: Mapping[str, Any]) -> Parametrisation:
    # diffusers' flow-matching classes have no prediction_type: theirs is the velocity.
    of_a_flow = schedule.class_name is None or schedule.class_name.startswith("FlowMatch")
    if not of_a_flow and schedule.prediction_type != "flow_prediction":
        raise ConfigError(
            f"_class_name: expected a flow-matching scheduler or flow_prediction for a sampler of flows, got "
            f"{schedule.class_name} with {schedule.prediction_type}. Choose Euler or Heun."
        )
    return Parametrisation("flow", "flow_prediction")


_SHIFT: Mapping[str, Option] = {"shift": number(1.0, 1e-6, to="steps")}

FLOW_SAMPLERS: tuple[SamplerSpec, ...] = (
    SamplerSpec(
        name="flow_euler",
        label="Flow Euler",
        scheduler="FlowMatchEulerDiscreteScheduler",
        aliases=("flow_match_euler",),
        solver=flow_euler,
        steps=flow_steps,
        space="flow",
        quantity="output",
        spacings=("karras", "exponential", "beta"),
        reads=frozenset({"use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"}),
        options={
            **_SHIFT,
            "use_dynamic_shifting": flag(False, to="steps"),
            "mu": number(None, in_config=False, to="steps"),
            "image_seq_len": whole(None, 1, in_config=False, to="steps"),
            "base_shift": number(0.5, to="steps"),
            "max_shift": number(1.15, to="steps"),
            "base_image_seq_len": whole(256, 1, to="steps"),
            "max_image_seq_len": whole(4096, 1, to="steps"),
            "time_shift_type": one_of("exponential", "linear", to="steps"),
            "shift_terminal": number(None, 0, 1, to="steps"),
            "invert_sigmas": flag(False, to="steps"),
            "stochastic_sampling": flag(False),
        },
        takes_noise=lambda options: bool(options["stochastic_sampling"]),
        model=_velocity,
    ),
    SamplerSpec(
        name="flow_heun",
        label="Flow Heun",
        scheduler="FlowMatchHeunDiscreteScheduler",
        aliases=("flow_match_heun",),
        solver=flow_heun,
        steps=flow_steps,
        space="flow",
        quantity="output",
        spacings=(),
        options={**_SHIFT, **CHURN},
        takes_noise=with_churn,
        model=_velocity,
    ),
)
