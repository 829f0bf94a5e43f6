"""The denoising loop: guidance around the U-Net, a sampler on top."""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
from numpy.typing import NDArray

from .errors import BackendError
from .parametrisation import Array
from .sampler_loop import Evaluation, Sampler, StepResult, drive
from .specs import Session


def guided(
    unet: Session, embeddings: NDArray[np.float32], negative: NDArray[np.float32] | None, guidance: float
) -> Callable[[Evaluation], Array]:
    """The U-Net as the function of an evaluation that samplers ask for.

    With `negative` it is one call of 2b rows, negative first, and classifier-free guidance (Ho and Salimans 2022, arXiv
    2207.12598): negative + guidance (positive - negative). Without, it is one call of b rows.

    Args:
        embeddings: of the prompts, (b, 77, d).
        negative: of the negative prompts, (b, 77, d), or None for no guidance.
    """
    context = embeddings if negative is None else np.concatenate([negative, embeddings])
    timestep = unet.spec.input("timestep")
    # optimum exports one timestep for all rows; latentrt one for each.
    fixed = timestep.shape if timestep is not None and timestep.shape in ((), (1,)) else None

    def predict(evaluation: Evaluation) -> Array:
        sample = evaluation.sample if negative is None else np.concatenate([evaluation.sample] * 2)
        told = np.float32(evaluation.timestep or 0.0)
        steps = np.full((len(sample),) if fixed is None else (1,) * len(fixed), told)
        output = unet({"sample": sample, "timestep": steps, "encoder_hidden_states": context})["out_sample"]
        if not np.isfinite(output).all():
            raise BackendError(
                f"unet: expected finite values at step {evaluation.step_index}, got NaN or infinity from "
                f"{unet.backend}. An fp16 graph may overflow here: use precision fp32, or export again to see where."
            )
        if negative is None:
            return output.astype(np.float32, copy=False)
        without, with_prompt = np.split(output.astype(np.float32, copy=False), 2)
        return without + np.float32(guidance) * (with_prompt - without)

    return predict


def denoise(sampler: Sampler, predict: Callable[[Evaluation], Array]) -> Generator[StepResult, None, Array]:
    """Run a sampler to its end: yields each step's result, returns the final latents.

    Progress, preview, cancellation and calibration capture are consumers of this generator; closing it cancels.
    """
    return (yield from drive(sampler, predict))
