"""Weights of exponential integrators: how much each known model output counts in one step.

In the half log signal-to-noise ratio, lambda = log(alpha / sigma_t) = -log(sigma), the flow of a diffusion model is
linear but for the model's output m, and a step of length h from lambda_s to lambda_t solves to

    x_t = sigma_t / sigma_s * x + alpha_t * integral of  e^-(h - v) m(lambda_s + v) dv   for denoised latents,
    x_t = alpha_t / alpha_s * x - sigma_t * integral of  e^(h - v)  m(lambda_s + v) dv   for noise,

v running from 0 to h. Both integrals are of  rate * e^(-rate * (h - v)) * m  with rate 1 and -1, the sign of the second
taken in; an SDE has a greater rate. The methods differ in what they put for m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def taylor_weights(
    h: float, lengths: Sequence[float], *, rate: float = 1.0, midpoint: bool = False, bend_shift: float = 0.0
) -> tuple[float, ...]:
    """Weights of DPM-Solver's multistep updates, newest output first: one more than there are lengths, at most three.

    The derivatives at the start of the step, by differences, in a Taylor series: Lu et al. 2022 (arXiv 2206.00927,
    2211.01095, appendices). As in its authors' code the third order halves the second derivative's term, so that it
    converges with order 2.

    Args:
        h: length of the step in lambda.
        lengths: of the steps before, newest first.
        rate: see above.
        midpoint: whether the second order takes the derivative's term at the middle instead of integrating it.
        bend_shift: added to the second derivative's coefficient.
    """
    phi_1, phi_2, phi_3 = phis(h, rate)
    if not lengths:
        return (phi_1,)
    if len(lengths) == 1:
        slope = (phi_1 / 2 if midpoint else phi_2) * h / lengths[0]
        return phi_1 + slope, -slope
    newer, older = lengths
    bend = (phi_2 * newer - (phi_3 + bend_shift) * h) / (newer + older)
    first, second = (phi_2 + bend) * h / newer, bend * h / older
    return phi_1 + first, -first - second, second


def phis(h: float, rate: float) -> tuple[float, float, float]:
    """What a constant output, its slope times h and minus its bend times h^2 count, as DPM-Solver names them.

    phi_1 = 1 - e^-z, phi_2 = 1 - phi_1 / z and phi_3 = phi_2 / z - 1/2 with z = rate * h.
    """
    z = rate * h
    phi_1 = -math.expm1(-z)
    if z == 0:
        return 0.0, 0.0, 0.0
    phi_2 = 1 - phi_1 / z
    return phi_1, phi_2, phi_2 / z - 0.5


def adams_weights(h: float, nodes: Sequence[float], *, rate: float = 1.0) -> list[float]:
    """Weights of outputs at these nodes such that the integral of the polynomial through them is exact.

    Args:
        h: length of the step in lambda.
        nodes: where the outputs are, from the start of the step; all different.
        rate: see above.
    """
    moments = [-math.expm1(-rate * h)]
    for power in range(1, len(nodes)):
        moments.append(h**power - power / rate * moments[-1])
    return _weights_of_moments(nodes, moments)


def _weights_of_moments(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """W with sum of w_i * nodes_i^k = moments_k: Björck and Pereyra 1970, Golub and Van Loan's Algorithm 4.6.2."""
    weights, count = list(moments), len(nodes)
    for k in range(count - 1):
        for i in range(count - 1, k, -1):
            weights[i] -= nodes[k] * weights[i - 1]
    for k in range(count - 2, -1, -1):
        for i in range(k + 1, count):
            weights[i] /= nodes[i] - nodes[i - k - 1]
        for i in range(k, count - 1):
            weights[i] -= weights[i + 1]
    return weights


def unified_weights(
    h: float, lengths: Sequence[float], *, new: bool = False, rate: float = 1.0, gain: float | None = None
) -> list[float]:
    """Weights of UniPC's and SA-Solver's predictor or corrector, newest output first.

    Both interpolate, but for two outputs, where the slope's term is half of `gain`: Zhao et al. 2023 (arXiv
    2302.04867), Xue et al. 2023 (arXiv 2309.05019).

    Args:
        h: length of the step in lambda.
        lengths: of the steps before, newest first.
        new: whether there is an output at the end of the step too, which is then the newest.
        rate: see above.
        gain: B(h) of UniPC, with the sign of `rate`; None integrates two outputs too.
    """
    nodes = [h, 0.0] if new else [0.0]
    for length in lengths:
        nodes.append(nodes[-1] - length)
    if len(nodes) != 2 or gain is None:
        return adams_weights(h, nodes, rate=rate)
    phi_1 = -math.expm1(-rate * h)
    if new:
        return [gain / 2, phi_1 - gain / 2]
    slope = gain / 2 * h / lengths[0]
    return [phi_1 + slope, -slope]
