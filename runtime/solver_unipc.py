"""UniPC: a predictor and a corrector of one form, with one evaluation a step."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

from .exponential_weights import unified_weights
from .parametrisation import Array, alpha_sigma, combine
from .sampler_loop import Sampler
from .solver_multistep import Past, data_update, epsilon_of, log_lengths, noise_update, remember, total_of
from .solver_parts import Levels, at
from .steps import Steps


def unipc(
    x: Array,
    steps: Steps,
    *,
    solver_order: int = 2,
    solver_type: Literal["bh1", "bh2"] = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Collection[int] = (),
    levels: Levels = alpha_sigma,
) -> Sampler:
    """UniPC: Zhao et al. 2023 (arXiv 2302.04867), Algorithms 5 to 8, with B_1(h) or B_2(h).

    The model is evaluated at what the predictor gives; with its answer the latent is corrected before it goes on.

    Args:
        x: initial latent.
        steps: a step to sigma 0 is of first order.
        solver_order: of the predictor; the corrector's is one more.
        solver_type: B(h) of the formulas with two outputs, h or e^h - 1; the others do not depend on it.
        predict_x0: whether the denoised latent is integrated, or the noise.
        lower_order_final: lower the order of the last steps to how many are left.
        disable_corrector: indices of steps whose result is not corrected.
        levels: of the space.
    """
    total, past, rate = total_of(steps), Past(), 1.0 if predict_x0 else -1.0
    update = data_update if predict_x0 else noise_update
    start, order = x, 0
    for step in steps:
        denoised = yield at(x, step)
        if step.sigma_next == 0:
            # Noise has no finite weight here; the denoised latent is the limit.
            x = combine((1.0, denoised))
            continue
        output = denoised if predict_x0 else epsilon_of(x, denoised, step.sigma, levels)
        known, past = past, remember(past, step.sigma, output, solver_order + 1)
        if known and step.index - 1 not in disable_corrector:
            sigma = known[0][0]
            h = math.log(sigma / step.sigma)
            weights = unified_weights(
                h, log_lengths(known[:order]), new=True, rate=rate, gain=_gain(solver_type, rate, h)
            )
            x = update(start, sigma, step.sigma, weights, past, levels=levels)
        left = total - step.index if lower_order_final else solver_order
        start, order = x, min(solver_order, left, len(past))
        h = math.log(step.sigma / step.sigma_next)
        weights = unified_weights(h, log_lengths(past[:order]), rate=rate, gain=_gain(solver_type, rate, h))
        x = update(x, step.sigma, step.sigma_next, weights, past, levels=levels)
    return x


def _gain(solver_type: str, rate: float, h: float) -> float:
    return rate * h if solver_type == "bh1" else -math.expm1(-rate * h)
