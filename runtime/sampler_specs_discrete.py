"""Samplers that visit training timesteps: DDPM's own posterior, DDIM, and what was made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .errors import ConfigError
from .noise_schedule import NoiseSchedule
from .parametrisation import Parametrisation
from .sampler_options import Option, flag, number, one_of, whole
from .sampler_spec import CLIPPING, SIGMA_READS, THRESHOLDING, TIMESTEP_SPACINGS, SamplerSpec, always, with_eta
from .solver_consistency import lcm, tcd
from .solver_ddim import ddim
from .solver_ddpm import ddpm
from .solver_discrete import reads_output, variance_preserving
from .solver_ipndm import iplms, ipndm
from .solver_pndm import pndm
from .steps import ddim_steps, ddpm_steps, sigma_steps
from .steps_consistency import lcm_steps, tcd_steps
from .steps_pndm import iplms_steps, pndm_steps


def _clipping(*, clips: bool) -> Mapping[str, Option]:
    """Options of the solvers that clip x_0 but not the noise; `clips` is what diffusers' class does by default."""
    options = {name: replace(option, to="solver") for name, option in {**CLIPPING, **THRESHOLDING}.items()}
    return {**options, "clip_sample": flag(False, class_default=clips)}


def _v_of_time(schedule: NoiseSchedule, _options: Mapping[str, Any]) -> Parametrisation:
    if schedule.class_name not in (None, "IPNDMScheduler"):
        raise ConfigError(
            "_class_name: expected IPNDMScheduler for iPLMS, whose model predicts v at times from 1 to 0, got "
            f"{schedule.class_name}. Choose iPNDM for a model trained on timesteps."
        )
    return Parametrisation("vp", "v_prediction")


_DISTILLED: Mapping[str, Option] = {
    "original_inference_steps": whole(50, 1, to="steps"),
    "strength": number(1.0, 0, 1, in_config=False, to="steps"),
}

DISCRETE_SAMPLERS: tuple[SamplerSpec, ...] = (
    SamplerSpec(
        name="ddim",
        label="DDIM",
        scheduler="DDIMScheduler",
        solver=ddim,
        steps=ddim_steps,
        space="vp",
        quantity="output",
        spacings=TIMESTEP_SPACINGS,
        reads=frozenset({"timestep_spacing", "steps_offset", "rescale_betas_zero_snr"}),
        options={
            **_clipping(clips=True),
            "eta": number(0.0, 0, 1, in_config=False),
            "set_alpha_to_one": flag(True, to="steps"),
            "use_clipped_model_output": flag(False, in_config=False),
        },
        takes_noise=with_eta,
        from_schedule=reads_output,
        model=variance_preserving,
    ),
    SamplerSpec(
        name="plms",
        label="PLMS",
        scheduler="PNDMScheduler",
        aliases=("pndm",),
        solver=pndm,
        steps=pndm_steps,
        space="vp",
        quantity="output",
        spacings=TIMESTEP_SPACINGS,
        reads=frozenset({"timestep_spacing", "steps_offset"}),
        options={
            "set_alpha_to_one": flag(False, to="steps"),
            "skip_prk_steps": flag(True, class_default=False, to="steps"),
        },
        from_schedule=reads_output,
        model=variance_preserving,
    ),
    SamplerSpec(
        name="ddpm",
        label="DDPM",
        scheduler="DDPMScheduler",
        solver=ddpm,
        steps=ddpm_steps,
        space="vp",
        quantity="output",
        spacings=TIMESTEP_SPACINGS,
        reads=frozenset({"timestep_spacing", "steps_offset", "rescale_betas_zero_snr"}),
        options={
            **_clipping(clips=True),
            # The learned ones need a model of twice as many output channels.
            "variance_type": one_of("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        },
        takes_noise=always,
        from_schedule=reads_output,
        model=variance_preserving,
    ),
    SamplerSpec(
        name="ipndm",
        label="iPNDM",
        scheduler=None,
        solver=ipndm,
        steps=sigma_steps,
        space="ve",
        reads=SIGMA_READS | {"rescale_betas_zero_snr", "final_sigmas_type"},
        options={"max_order": whole(4, 1, 4, in_config=False)},
    ),
    SamplerSpec(
        name="iplms",
        label="iPLMS",
        scheduler="IPNDMScheduler",
        solver=iplms,
        steps=iplms_steps,
        space="vp",
        quantity="epsilon",
        spacings=(),
        model=_v_of_time,
    ),
    SamplerSpec(
        name="lcm",
        label="LCM",
        scheduler="LCMScheduler",
        solver=lcm,
        steps=lcm_steps,
        space="vp",
        quantity="output",
        spacings=(),
        reads=frozenset({"rescale_betas_zero_snr"}),
        options={**_clipping(clips=False), **_DISTILLED, "timestep_scaling": number(10.0, 0)},
        takes_noise=always,
        from_schedule=reads_output,
        model=variance_preserving,
    ),
    SamplerSpec(
        name="tcd",
        label="TCD",
        scheduler="TCDScheduler",
        solver=tcd,
        steps=tcd_steps,
        space="vp",
        quantity="output",
        spacings=(),
        reads=frozenset({"rescale_betas_zero_snr"}),
        options={**_DISTILLED, "eta": number(0.0, 0, 1, in_config=False, to="steps")},
        takes_noise=with_eta,
        from_schedule=reads_output,
        model=variance_preserving,
    ),
)
