"""What single files hold beside the networks that draw, known by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Buffers of the original implementation's sampler; betas are in the scheduler's config.
_SCHEDULE = (
    "betas|(sqrt_|log_one_minus_|sqrt_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod|alphas_cumprod_prev"
    "|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|lvlb_weights|logvar|scale_factor|denoiser\\.sigmas"
)
_ENCODERS = r"(cond_stage_model|conditioner\.embedders\.\d)"
_AVERAGE = re.compile(r"(first_stage_model\.)?model_ema\.")
_LORA = re.compile(r"lora_(unet|te\d?)_")
_OTHERS = re.compile(
    "|".join(
        (
            rf"({_SCHEDULE})$",
            # Marks of v-prediction and a zero terminal signal-to-noise ratio, without values.
            r"(v_pred|ztsnr)$",
            # Constants, and the heads of CLIP that draw nothing.
            rf"{_ENCODERS}\.(.+\.)?(position_ids|logit_scale|attn_mask)$",
            rf"{_ENCODERS}\.(transformer|model)\.(vision_model|visual_projection|visual)\.",
            r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_projection\.weight$",
            # Stable Diffusion 2 reads its encoder before the last layer.
            r"cond_stage_model\.model\.(transformer\.resblocks\.23\.|text_projection$)",
            # Left by training.
            r"first_stage_model\.(loss\.|logvar$)",
            r"(global_step|epoch|(optimizer|optimizer_states|lr_schedulers|callbacks|embedding_manager)\..+)$",
        )
    )
)


def is_extra(name: str) -> bool:
    """Whether a tensor of a single file is known to draw nothing."""
    return any(pattern.match(name) for pattern in (_AVERAGE, _LORA, _OTHERS))


def notes_on(names: Iterable[str]) -> tuple[str, ...]:
    """What a user may want to know of the tensors that are left out."""
    names = list(names)
    average, lora = (sum(bool(pattern.match(name)) for name in names) for pattern in (_AVERAGE, _LORA))
    notes = []
    if average:
        notes.append(f"left out: {average} tensors of a running average (EMA) of the weights")
    if lora:
        notes.append(f"left out: {lora} tensors of a LoRA that is not merged into the weights")
    return tuple(notes)
